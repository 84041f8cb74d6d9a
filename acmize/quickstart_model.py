"""The model and the data that `acmize quickstart` needs, both offline: a small ViT for handwritten digits.

Importing this module registers `acmize_vit_digits` with timm. The weights lie in the package
(`assets/vit_digits.safetensors`, fp16, trained by `recipes/train_vit_digits.py`); the images are the 1797
digits of 8x8 pixels that scikit-learn carries (UCI "Optical Recognition of Handwritten Digits"). The split is
over images, not over writers: test accuracy is a demonstration's, not a benchmark's.

Shape suffixes: N images, B batch, C channels (1), H height (8), W width (8).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

if TYPE_CHECKING:
    from datasets import DatasetDict

Split = Literal["train", "test"]
WEIGHTS = Path(__file__).parent / "assets" / "vit_digits.safetensors"
MEAN, STD = 0.3058, 0.3759  # of the training pixels, scaled to 0..1
SPLIT_SEED = 0

_CFG = PretrainedCfg(
    file=str(WEIGHTS),
    input_size=(1, 8, 8),
    fixed_input_size=True,
    crop_pct=1.0,  # 8x8 images pass through resize and crop untouched
    mean=(MEAN,),
    std=(STD,),
    num_classes=10,
    first_conv="patch_embed.proj",
    classifier="head",
    license="apache-2.0",
)
default_cfgs = generate_default_cfgs({"acmize_vit_digits": _CFG})  # the name under which timm looks for it


@register_model
def acmize_vit_digits(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT for 1x8x8 digits: 16 tokens of 2x2 pixels and a class token, width 96, depth 6, 0.67 M parameters.

    Args:
        pretrained: Load the packaged weights, fp16 on disk and fp32 here. Touches no network.
        **kwargs: Passed to timm's `VisionTransformer`.

    Returns:
        The model, from (B, 1, 8, 8) to (B, 10) logits.
    """
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3}
    kwargs = {"pretrained_filter_fn": checkpoint_filter_fn, **sizes, **kwargs}
    return build_model_with_cfg(VisionTransformer, "acmize_vit_digits", pretrained, **kwargs)


def _digits_uint8(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the (N, 8, 8) uint8 images, 0..255, and the (N,) int64 labels of a split.

    `RandomState(SPLIT_SEED)`, whose stream numpy has frozen, shuffles the images; in that order every third
    image of each class goes to 'test', beginning with the first: each class is split 2:1.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: found {split!r}, expected 'train' or 'test'")
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    test = np.sort(np.concatenate([order[labels[order] == label][::3] for label in range(10)]))
    keep = test if split == "test" else np.setdiff1d(order, test)
    images_NHW = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images_NHW[keep], labels[keep].astype(np.int64)


def digits(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split, ready for the model: images (N, 1, 8, 8) float32, normalised, and labels (N,) int64.

    Args:
        split: 'train' (1195 images) or 'test' (602), disjoint, stratified and always the same.
    """
    images_NHW, labels_N = (torch.from_numpy(part) for part in _digits_uint8(split))
    return (images_NHW[:, None].float() / 255 - MEAN) / STD, labels_N


def digits_dataset() -> DatasetDict:
    """Return both splits with the columns `image` (PIL, mode L, 8x8, 0..255) and `label`."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as PILImage

    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=[str(i) for i in range(10)])})
    out = DatasetDict()
    for split in ("train", "test"):
        images, labels = _digits_uint8(split)
        columns = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
        out[split] = Dataset.from_dict(columns, features=features)
    return out
