"""Images through the model's own preprocessing: `open_images`, `ImageSet`, the transforms, `loader`.

Opening data sets lies in splits.py; order, augmentation seeds, caching and mixing in batches.py. Both are
meant to be imported from here.

Shape suffixes: N images of a split, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from acmize.batches import CachedImages, Loader, SeededMixup, Stream, cached, loader, mixup, seeded
from acmize.errors import AcmizeError, UnreadableSample
from acmize.splits import NO_LABEL, ImageSplits, labels_of, open_images, split_holdout
from acmize.unreadable import Unreadable

if TYPE_CHECKING:
    import datasets

__all__ = [
    "NO_LABEL",
    "CachedImages",
    "ImageSet",
    "ImageSplits",
    "Loader",
    "SeededMixup",
    "Transform",
    "cached",
    "data_config",
    "decode_image",
    "eval_transform",
    "loader",
    "mixup",
    "open_images",
    "split_holdout",
    "train_transform",
]

Transform: TypeAlias = Callable[[Image.Image], Tensor]
_MODES = {1: "L", 3: "RGB"}
# Others run programs (EPS), are no pictures of things (PDF, WMF), or are read by code that few have looked at.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
MAX_PIXELS = 90_000_000  # 270 MB decoded; a file of some kilobytes can hold a hundred times as many
MAX_ASPECT = 200  # resizing the short side to 224 makes 10 million pixels of a line of 200 times its width


class ImageSet(Dataset):
    """Items `(x_CHW float32, label int)`; the label is -1 where there is none.

    An item depends on (seed, epoch, index) alone. Stored EXIF orientation is ignored, as in the usual
    evaluation of ImageNet models.

    Args:
        data: Images and labels, as in `ImageSplits`.
        transform: From a PIL image to x_CHW, such as `eval_transform(model)`.
        image_column: Column with the images.
        label_column: Column with the class indices, or None.
        in_chans: Channels that the model takes: 3 (RGB) or 1 (grey).
        seed: Seed of the augmentation.
        unreadable: Where images that cannot be read are counted; a batch leaves them out, a single one is an error.
        name: Of the images, by which those of several sets are counted apart.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        transform: Transform,
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        in_chans: int = 3,
        seed: int = 0,
        unreadable: Unreadable | None = None,
        name: str = "",
    ) -> None:
        import datasets

        if in_chans not in _MODES:
            raise AcmizeError(f"in_chans: found {in_chans}, expected 1 (grey) or 3 (RGB); bring your own data set")
        # Decoding here, not in `datasets`, names the file of a broken image and leaves the orientation alone.
        self._images = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._image_column = image_column
        self._mode = _MODES[in_chans]
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.unreadable = unreadable or Unreadable()
        self.name = name
        self.labels_N = labels_of(data, label_column)

    @classmethod
    def of(
        cls,
        splits: ImageSplits,
        which: Literal["train", "test"],
        model: nn.Module,
        *,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> ImageSet:
        """Make the set of a split as `model` wants it, with `eval_transform(model)` unless told otherwise."""
        return cls(
            splits.split(which),
            transform or eval_transform(model),
            image_column=splits.image_column,
            label_column=splits.label_column,
            in_chans=data_config(model)["input_size"][0],
            seed=seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the items have."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._decode(index)
        with seeded(Stream.AUGMENT, self.seed, self.epoch, index):
            return self.transform(image), int(self.labels_N[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The readable ones of a batch, which is how a `DataLoader` asks; see `unreadable.Unreadable.read`."""
        return self.unreadable.read(self.__getitem__, indices, len(self), lambda index: (self.name, index))

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self._images[index][self._image_column], self._mode, f"image {index}")


def decode_image(stored: dict[str, Any] | None, mode: str, what: str) -> Image.Image:
    """A picture from its file, in 8 bits.

    Args:
        stored: "bytes", or None and the "path" of the file.
        mode: "RGB" or "L".
        what: to call it by in errors.

    Raises:
        UnreadableSample: there is none, it is damaged, of no known format, or far too large or too long.
    """
    if stored is None:
        raise UnreadableSample(f"{what}: found none, expected an image; take the row out of the data")
    where = str(stored["path"] or "stored in the data")[:200]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it can work around, and of large pictures
            with Image.open(io.BytesIO(_bytes(stored)), formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * max(min(width, height), 1):
                    raise ValueError(f"{width} x {height} pixels, more or longer than {MAX_PIXELS} or {MAX_ASPECT} : 1")
                if image.mode == "P" and "transparency" in image.info:
                    return image.convert("RGBA").convert(mode)  # what Pillow asks for here
                return _eight_bits(image).convert(mode)
    except (Exception, MemoryError) as error:  # Pillow raises many kinds; each means that this image cannot be read
        why = (str(error) or type(error).__name__)[:300]
        raise UnreadableSample(
            f"{what} ({where}): expected a readable image, found: {why}; repair it or take it out"
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can read; it knows only a few before it is asked for all."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats from 0 to 1, as 8 bits; Pillow's own conversion would clip it to white."""
    if not image.mode.startswith("I;16") and image.mode not in ("I", "F"):
        return image
    grey = np.array(image, dtype=np.float32)
    np.nan_to_num(grey, copy=False)
    if image.mode != "F":  # a 16-bit PNG of grey comes as "I" from some releases of Pillow
        grey /= 257
    elif grey.max() <= 1:
        grey *= 255
    return Image.fromarray(np.rint(grey.clip(0, 255, out=grey), out=grey).astype(np.uint8))


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return how the model wants its images: timm's data config, with the input size it really has.

    Raises:
        AcmizeError: The model does not say (it has no `pretrained_cfg`).
    """
    stated = getattr(model, "pretrained_cfg", None)
    if not stated:
        raise AcmizeError(
            f"{type(model).__name__}: found no pretrained_cfg, expected one with input_size, mean and std; "
            "set model.pretrained_cfg, or pass your own transform"
        )
    config = resolve_data_config({}, pretrained_cfg=stated)
    # timm keeps the pretrained size in the config when img_size=... or in_chans=... ask for another.
    embed = getattr(model, "patch_embed", None)
    channels, *size = config["input_size"]
    size = getattr(embed, "img_size", None) or size
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    config["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def eval_transform(model: nn.Module) -> Transform:
    """Return timm's transform for evaluation: resize, centre crop, normalise; PIL image to x_CHW float32."""
    return create_transform(**data_config(model), is_training=False)  # type: ignore[return-value]


def train_transform(
    model: nn.Module,
    *,
    crop_scale: tuple[float, float] = (0.35, 1.0),
    crop_pad: int | None = None,
    hflip: float = 0.5,
    randaugment: str | None = "rand-m6-n2-mstd0.5",
    color_jitter: float | None = None,
) -> Transform:
    """Return timm's transform for training: random crop, flip, RandAugment; PIL image to x_CHW float32.

    Args:
        model: The model that the images are for.
        crop_scale: Least and largest share of the image's area that a crop takes.
        crop_pad: Pad by this many pixels and crop at random, in place of a scaled crop; or None.
        hflip: Probability of a flip from left to right.
        randaugment: timm's `auto_augment` string, or None for none.
        color_jitter: Strength of brightness, contrast and saturation changes, or None.
    """
    config = data_config(model)
    made = create_transform(
        config["input_size"],
        is_training=True,
        scale=crop_scale,
        hflip=hflip,
        auto_augment=randaugment,
        color_jitter=color_jitter,  # type: ignore[arg-type] - timm takes None for none
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
    if crop_pad is not None:
        from torchvision.transforms import RandomCrop, Resize

        size = config["input_size"][1:]
        made.transforms[:1] = [Resize(size), RandomCrop(size, padding=crop_pad)]  # type: ignore[union-attr]
    return made  # type: ignore[return-value]


def _bytes(stored: dict[str, Any]) -> bytes:
    """Return the file's content: kept in the data, or read from where it lies (perhaps inside an archive)."""
    if stored["bytes"] is not None:
        return stored["bytes"]
    if "://" not in stored["path"]:
        return Path(stored["path"]).read_bytes()
    import fsspec

    with fsspec.open(stored["path"], "rb") as file:
        return file.read()  # type: ignore[union-attr] - one path gives one file
