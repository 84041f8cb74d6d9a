"""The images of a conversion: some to fit on, some held out of train for calibration, and those of the test split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acmize.batches import cached, loader
from acmize.data import ImageSet, eval_transform, open_images, split_holdout, train_transform
from acmize.errors import AcmizeError
from acmize.phases.finetune import Task
from acmize.recipe import Recipe
from acmize.streaming import StreamedImages, open_image_stream
from acmize.unreadable import Unreadable


class Images:
    """The data of a conversion: images to fit on, images held out of train for calibration, and test images.

    Attributes:
        calibration: what budgets are calibrated on: the held-out images.
        unreadable: images that were left out, since they could not be read.
        task: loss of the labels in phase 3; None: the cross-entropy of classes.
    """

    example: tuple[Any, ...] | None = None  # the size of images is the model's own
    task: Task | None = None

    def __init__(self, data: Any, model: nn.Module, recipe: Recipe) -> None:
        head = None
        if recipe.streaming:
            splits, head = open_image_stream(data, recipe)
        else:
            splits = open_images(data, limit=recipe.limit, seed=recipe.seed)
        self.name = splits.name
        splits = checked(splits, model)
        if splits.train is None:
            raise AcmizeError(f"data {splits.name}: found no train split, expected one to fit on; add train/")
        if head is None:
            fit, held = split_holdout(splits.train, recipe.holdout, recipe.seed)
        else:
            fit, held = splits.train, head.held
        read: dict[str, Any] = {"image_column": splits.image_column, "label_column": splits.label_column}
        read["in_chans"] = _channels(model)
        self.unreadable = read["unreadable"] = Unreadable(recipe.max_corrupt)
        plain = eval_transform(model)
        self.fit: Any = cached(ImageSet(fit, plain, **read, name="train"))
        self.held: Any = cached(ImageSet(held, plain, **read, name="held out"))
        self.calibration = self.held
        self.test = None if splits.test is None else cached(ImageSet(splits.test, plain, **read, name="test"))
        train = recipe.train
        augment = train_transform(
            model, crop_scale=train.crop_scale, crop_pad=train.crop_pad, hflip=train.hflip,
            randaugment=train.randaugment,
        )  # fmt: skip
        if head is None:
            self.augmented: Any = ImageSet(fit, augment, **read, seed=recipe.seed, name="train")
        else:
            rest = {k: v for k, v in read.items() if k != "in_chans"}
            rest |= {"mode": "L" if read["in_chans"] == 1 else "RGB", "classes": getattr(model, "num_classes", None)}
            self.augmented = StreamedImages(head.rows, augment, **rest, seed=recipe.seed)
        self.batch_size, self.device = recipe.batch_size, next(model.parameters()).device

    def batches(self, which: Any, limit: int | None = None, size: int | None = None) -> Iterator[Tensor]:
        """Inputs of a set in a fixed shuffled order, without labels."""
        seen = 0
        for inputs, _ in loader(which, min(size or self.batch_size, len(which)), shuffle=True):
            if limit is not None and seen >= limit:
                return
            yield (inputs if limit is None else inputs[: limit - seen]).to(self.device)
            seen += len(inputs)

    @property
    def has_labels(self) -> bool:
        """Whether any image to train on has a label."""
        return bool((self.fit.labels_N >= 0).any())

    def training(self, _model: nn.Module) -> AbstractContextManager[None]:
        """Open while phase 3 trains a model: nothing of it is set apart."""
        return nullcontext()

    def labelled(self, which: Any) -> Batches:
        """(inputs, labels) batches in stored order."""
        return Batches(which, self.batch_size, self.device)

    def epochs(self, which: Any, seed: int) -> tuple[Callable[[int], Any], int]:
        """Epoch -> shuffled (inputs, labels) batches, and how many there are."""
        if isinstance(which, StreamedImages):
            size = min(self.batch_size, len(which))
            return partial(which.batches, size, seed=seed), len(which) // size
        batches = loader(which, min(self.batch_size, len(which)), seed=seed, shuffle=True, drop_last=True)

        def of(epoch: int) -> Any:
            batches.set_epoch(epoch)
            return batches

        return of, len(batches)


class Batches:
    """(inputs, labels) batches of a set in stored order, which can be gone through again and again.

    Args:
        data: set of (image, label).
        batch_size: images in a batch.
        device: where the inputs go.
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device) -> None:
        self._data, self._size, self._device = data, min(batch_size, len(data)), device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in loader(self._data, self._size):
            yield inputs.to(self._device), labels


def images_to_test(
    data: Any, model: nn.Module, *, limit: int | None = None, seed: int = 0
) -> tuple[Any, Literal["train", "test"], Any]:
    """Labelled images to measure a model on, decoded once: the test split, or train where there is none.

    Args:
        data: anything `datasets.load_dataset` opens.
        model: whose preprocessing they go through, and whose outputs the labels mean.
        limit: images at most.
        seed: of the choice of those.

    Returns:
        The set, the name of its split, and all the splits as they are stored.

    Raises:
        AcmizeError: data that cannot be opened, or labels that do not fit the model.
    """
    splits = checked(open_images(data, limit=limit, seed=seed), model)
    which = "test" if splits.test is not None else "train"
    return cached(ImageSet.of(splits, which, model)), which, splits


def _channels(model: nn.Module) -> int:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return int((cfg.get("input_size") or (3,))[0])


def checked(splits: Any, model: nn.Module) -> Any:
    """The splits; labels, where there are any, have to mean the model's outputs."""
    classes = getattr(model, "num_classes", None)
    some = splits.train if splits.train is not None else splits.test
    names = getattr(some.features.get(splits.label_column), "names", None) or ["a class"]
    if {str(n).lower() for n in names} <= {"train", "test", "validation", "val", "valid", "dev"}:
        splits = dataclasses.replace(splits, label_column=None)  # `datasets` took the folders of splits for classes
    if splits.label_column is not None and isinstance(classes, int) and classes > 0:
        splits.check_labels(classes)
    return splits
