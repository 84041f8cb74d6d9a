"""Image data sets from anything `datasets.load_dataset` opens: which splits, which columns, clear errors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from acmize.batches import Stream, numpy_generator
from acmize.errors import AcmizeError

if TYPE_CHECKING:
    import datasets

NO_LABEL = -1
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls")  # the last: of webdataset
TEST_NAMES = ("test", "validation", "val", "valid", "dev")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """The splits of an image data set, as they are stored, undecoded.

    Attributes:
        train: Images to fit on, or None.
        test: Images to report on, or None: the split 'test', else a validation split.
        image_column: Column with the images.
        label_column: Column with the class indices, or None where there are no labels.
        name: What to call the data in tables.
    """

    train: datasets.Dataset | None
    test: datasets.Dataset | None
    image_column: str
    label_column: str | None
    name: str

    def split(self, which: Literal["train", "test"]) -> datasets.Dataset:
        """Return a split.

        Raises:
            AcmizeError: The data has no such split.
        """
        found = self.train if which == "train" else self.test
        if found is None:
            other = "test" if which == "train" else "train"
            raise AcmizeError(f"data {self.name!r}: found only a {other} split, expected {which!r} as well; add it")
        return found

    def check_labels(self, num_classes: int) -> None:
        """Make sure that label i can mean output i of a model with `num_classes` outputs.

        Raises:
            AcmizeError: There are no labels, other classes than outputs, or a label out of range.
        """
        if self.label_column is None:
            raise AcmizeError(f"data {self.name!r}: found no labels, expected one per image; add a label column")
        for data in (self.train, self.test):
            if data is None:
                continue
            classes = getattr(data.features.get(self.label_column), "num_classes", num_classes)
            if classes != num_classes:
                raise AcmizeError(
                    f"data {self.name!r}: found {classes} classes, expected the {num_classes} of the model, "
                    "in its order; give class indices in a metadata.csv with columns file_name and label"
                )
            labels = labels_of(data, self.label_column)
            if len(labels) and not NO_LABEL <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise AcmizeError(
                    f"data {self.name!r}: found labels from {int(labels.min())} to {int(labels.max())}, "
                    f"expected 0 to {num_classes - 1}; choose the data that the model was trained for"
                )


def open_images(
    path: str | Path | datasets.DatasetDict,
    *,
    limit: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSplits:
    """Open an image data set.

    Args:
        path: Local folder (an image folder, with or without metadata.csv; parquet files), id on the Hugging
            Face Hub, or a loaded `DatasetDict`.
        limit: Take at most so many images of each split, at random; a smaller limit takes a part of a
            larger one's.
        seed: Seed of that choice.
        image_column: Column with the images; found by its type if not given.
        label_column: Column with the class indices; found by its name and type if not given.

    Raises:
        AcmizeError: Nothing there, no images in it, labels that are no class indices, no known split.
    """
    if limit is not None and limit < 1:
        raise AcmizeError(f"limit: found {limit}, expected at least 1; leave it out to take all images")
    splits, name = load_splits(path)
    found = image_splits(splits, name, image_column, label_column)
    return dataclasses.replace(
        found, train=limited(found.train, limit, seed, 0), test=limited(found.test, limit, seed, 1)
    )


def image_splits(
    splits: Mapping[str, Any], name: str, image_column: str | None = None, label_column: str | None = None
) -> ImageSplits:
    """Which splits and columns, of data or of streams of them.

    Raises:
        AcmizeError: no images, labels that are no class indices, no known split.
    """
    features = splits["train" if "train" in splits else next(iter(splits))].features
    if features is None:
        raise AcmizeError(f"data {name!r}: found columns of unknown types, expected images; cast them to features")
    image_column = _image_column(features, image_column, name)
    label_column = _label_column(features, label_column, name)

    by_name = {str(key).lower(): data for key, data in splits.items()}
    tests = [by_name[key] for key in TEST_NAMES if key in by_name]
    # Public test splits often hide their labels; a validation split then is what one can report on.
    labelled = [data for data in tests if not hasattr(data, "__len__") or _has_labels(data, label_column)]
    train, test = by_name.get("train"), next(iter(labelled or tests), None)
    if train is None and test is None:
        found = ", ".join(map(repr, splits))
        raise AcmizeError(f"data {name!r}: found the splits {found}, expected 'train' or 'test'; rename the folders")
    return ImageSplits(train=train, test=test, image_column=image_column, label_column=label_column, name=name)


def split_holdout(
    train: datasets.Dataset, fraction_or_count: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Part the training images at random into some to fit on and some to hold out.

    Args:
        train: Training images.
        fraction_or_count: Share to hold out (a float between 0 and 1) or how many (an int).
        seed: Seed of the choice.

    Returns:
        The images to fit on and those held out, each in stored order.

    Raises:
        AcmizeError: One of the two would be empty.
    """
    total = len(train)
    is_count = isinstance(fraction_or_count, int)
    count = int(fraction_or_count) if is_count else round(fraction_or_count * total)
    if not 0 < count < total:
        raise AcmizeError(
            f"holdout: found {fraction_or_count} of {total} images, expected at least 1 held out and at "
            "least 1 left; choose a share such as 0.1, or give more images"
        )
    order = numpy_generator(Stream.HOLDOUT, seed).permutation(total)
    return train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))


def labels_of(data: datasets.Dataset, column: str | None) -> Tensor:
    """Return the class indices (N,) int64 of all items without decoding an image; -1 where there is none."""
    if column is None or column not in data.features:
        return torch.full((len(data),), NO_LABEL)
    values = data.select_columns([column])[:][column]
    return torch.tensor([NO_LABEL if value is None else value for value in values], dtype=torch.int64)


def load_splits(path: Any, *, streaming: bool = False) -> tuple[Any, str]:
    """Return what the path names, or the given data itself, and a short name for it; as streams if asked to."""
    import datasets

    if isinstance(path, str | Path):
        loaded, name = _load_path(path, streaming)
    else:
        loaded, name = path, "given in Python"
    kind = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    if not isinstance(loaded, kind) or not loaded:
        found = f"an empty {kind.__name__}" if isinstance(loaded, kind) else type(loaded).__name__
        raise AcmizeError(
            f"data {name!r}: found {found}, expected a path, a hub id or a datasets.{kind.__name__}; give "
            f"datasets.{kind.__name__}(train=..., test=...)" + ("" if streaming else ", or --streaming for streams")
        )
    return loaded, name


def _load_path(path: str | Path, streaming: bool) -> tuple[object, str]:
    """Return what `datasets.load_dataset` makes of a local folder or a hub id, and a short name for it."""
    import datasets

    folder = Path(path).expanduser()
    if folder.is_file():
        raise AcmizeError(f"data {path}: found a file, expected a folder or a hub id; give the folder it is in")
    is_local = folder.is_dir() and path != ""  # Path("") is the current folder
    if not is_local and (isinstance(path, Path) or not _HUB_ID.fullmatch(path)):
        raise AcmizeError(f"data {path}: found no such folder, expected one with images; check the path")
    try:
        if is_local:
            return datasets.load_dataset(str(folder.resolve()), streaming=streaming), folder.resolve().name
        return datasets.load_dataset(str(path), streaming=streaming), str(path)
    except Exception as error:  # many kinds, by builder and by state of the network; the first line tells
        why = (str(error) or type(error).__name__).splitlines()[0]
        if is_local:
            raise AcmizeError(
                f"data {path}: expected images that can be loaded, found: {why}; lay them out as "
                "train/CLASS/*.jpg and test/CLASS/*.jpg, or as parquet files"
            ) from error
        raise AcmizeError(
            f"data {path}: found no such folder here, and not on the Hub either ({why}); check the name, "
            "or give a local folder"
        ) from error


def _image_column(features: Mapping[str, object], asked: str | None, name: str) -> str:
    """Return the column with the images: as asked, of a usual name, or the only one."""
    import datasets

    columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None and asked in columns:
        return asked
    usual = [column for column in _IMAGE_NAMES if column in columns] or columns
    if asked is None and (len(usual) == 1 or usual[:1] == ["image"]):
        return usual[0]
    found = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    expected = "one image column" if asked is None else f"an image column {asked!r}"
    remedy = "name one of them as image_column" if columns else "give a folder of image files, or another data set"
    raise AcmizeError(f"data {name!r}: found the columns {found}, expected {expected}; {remedy}")


def _label_column(features: Mapping[str, object], asked: str | None, name: str) -> str | None:
    """Return the column with the class indices: as asked, of a usual name, the only one, or None."""
    import datasets

    usual = [column for column in _LABEL_NAMES if column in features]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = asked or next(iter(usual), None) or (classes[0] if len(classes) == 1 else None)
    if column is None:
        return None
    feature = features.get(column)
    if isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", None)):
        return column
    found = _type_name(feature) if feature is not None else "no such column"
    raise AcmizeError(
        f"data {name!r}, column {column!r}: found {found}, expected class indices; make them with "
        f"dataset.class_encode_column({column!r}), or remove the column"
    )


def _type_name(feature: object) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _has_labels(data: datasets.Dataset, column: str | None) -> bool:
    return bool((labels_of(data, column) != NO_LABEL).any())


def limited(data: datasets.Dataset | None, limit: int | None, seed: int, split: int) -> datasets.Dataset | None:
    """Return at most `limit` items at random, in stored order."""
    if data is None or limit is None or limit >= len(data):
        return data
    order = numpy_generator(Stream.LIMIT, seed, split).permutation(len(data))
    return data.select(np.sort(order[:limit]))
