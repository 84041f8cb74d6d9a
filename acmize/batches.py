"""Seeded order, augmentation and mixing, and images decoded once.

Every random choice depends on numbers alone: the order of a loader on (seed, epoch), the augmentation of an
item on (seed, epoch, index), the mixing of a batch on (seed, step). A resumed run therefore sees what the
unbroken run saw, with any number of workers, and the global generators are left as they were.

Shape suffixes: N images, B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from acmize import parallel
from acmize.errors import AcmizeError


class Stream(IntEnum):
    """What random numbers are for: each purpose has a stream of its own, though the seed be the same."""

    ORDER = 1
    AUGMENT = 2
    MIX = 3
    HOLDOUT = 4
    LIMIT = 5


def numpy_generator(stream: Stream, *numbers: int) -> np.random.Generator:
    """Return a generator that depends on the purpose and the numbers (each >= 0) only."""
    return np.random.default_rng([int(stream), *numbers])


@contextmanager
def seeded(stream: Stream, *numbers: int) -> Iterator[None]:
    """Seed the global generators of random, numpy and torch (CPU) inside, and restore them afterwards.

    timm and torchvision draw from all three and take no generator.
    """
    words = np.random.SeedSequence([int(stream), *numbers]).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed every GPU for each image
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class EpochSampler(Sampler[int]):
    """Indices of a data set in an order that depends on (seed, epoch) alone.

    Args:
        size: Number of items.
        shuffle: Permute them; otherwise the stored order.
        seed: Seed of the permutation.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.size))
        return iter(numpy_generator(Stream.ORDER, self.seed, self.epoch).permutation(self.size).tolist())


class OwnRows(Sampler[list[int]]):
    """Of each batch of indices, those that this process reads.

    Args:
        batches: of every process's indices.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (indices[parallel.part(len(indices))] for indices in self.batches)


class Loader(DataLoader):
    """A `DataLoader` of batches `(x_BCHW, labels_B int64)`; made by `loader`."""

    def __iter__(self) -> Any:
        """Batches; a worker process that dies is an error of ours."""
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            why = str(error).splitlines()[0]
            raise AcmizeError(
                f"data: a process that decodes samples ended ({why}); it may lack memory: use fewer workers, and resume"
            ) from error

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for the order and for the augmentation, before iterating.

        `accelerate` calls the `set_epoch` of sampler and data set itself when the loader is wrapped.
        """
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)  # type: ignore[union-attr]

    def own(self) -> DataLoader:
        """The same batches in this process's part.

        Raises:
            AcmizeError: A batch has fewer items than there are processes.
        """
        if (self.batch_size or 1) < parallel.processes():
            found = f"{self.batch_size} for {parallel.processes()} processes"
            raise AcmizeError(f"batch_size: found {found}, expected one a process at least; make it larger")
        if parallel.processes() == 1:
            return self
        options: Any = {"num_workers": self.num_workers, "generator": self.generator}
        return DataLoader(self.dataset, batch_sampler=OwnRows(self.batch_sampler), **options)


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
    workers: int = 0,
) -> Loader:
    """Load batches in an order that depends on (seed, epoch) alone; call `set_epoch` before each epoch.

    Args:
        dataset: Items `(x_CHW, label)`, such as an `ImageSet`.
        batch_size: Images in a batch.
        seed: Seed of the order.
        shuffle: Permute the items, differently in each epoch.
        drop_last: Leave out a last batch that is not full.
        workers: Processes that decode; 0 decodes in this one.

    Raises:
        AcmizeError: There would be no batch.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if batch_size < 1 or size < (batch_size if drop_last else 1):
        raise AcmizeError(f"batch_size: found {batch_size} for {size} images, expected 1 to {size}; make it smaller")
    return Loader(
        dataset,
        batch_size,
        sampler=EpochSampler(size, shuffle=shuffle, seed=seed),
        drop_last=drop_last,
        num_workers=workers,
        # Otherwise each iteration draws the workers' base seed from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )


class CachedImages(TensorDataset):
    """Images kept in float16; items as of the data set they were taken from: `(x_CHW float32, label int)`.

    Args:
        images_NCHW: float16, any values within its range.
        labels_N: int64.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        super().__init__(images_NCHW, labels_N)
        self.labels_N = labels_N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensors[0][index].float(), int(self.labels_N[index])


def cached(dataset: Dataset, *, max_bytes: int = 2 << 30, workers: int = 0) -> Dataset:
    """Decode and transform every image once, for many passes over the same images.

    Half precision rounds a normalised pixel by less than one part in two thousand, a fraction of what an
    8-bit image resolves.

    Args:
        dataset: Items `(x_CHW, label)` that do not change from epoch to epoch, such as an `ImageSet` with the
            transform for evaluation.
        max_bytes: Size up to which the images are kept.
        workers: Processes that decode.

    Returns:
        A `CachedImages` of those that can be read, or the data set itself if it is cached already, empty, or larger
        than `max_bytes`.

    Raises:
        ValueError: The items are augmented: the cache would freeze one epoch.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0 or isinstance(dataset, CachedImages):
        return dataset
    first_CHW = _first(dataset)
    if 2 * size * first_CHW.numel() > max_bytes:
        return dataset
    if hasattr(dataset, "set_epoch"):
        epoch = dataset.epoch  # type: ignore[attr-defined]
        dataset.set_epoch(epoch + 1)  # type: ignore[attr-defined]
        other_CHW = _first(dataset)
        dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        if not torch.equal(first_CHW, other_CHW):
            raise ValueError("dataset: found images that change from epoch to epoch; cache those for evaluation")
    images_NCHW = torch.empty((size, *first_CHW.shape), dtype=torch.float16)
    labels_N = torch.empty(size, dtype=torch.int64)
    start = 0
    for x_BCHW, labels_B in loader(dataset, min(64, size), workers=workers):
        stop = start + len(labels_B)
        images_NCHW[start:stop], labels_N[start:stop] = x_BCHW, labels_B
        start = stop
    return CachedImages(images_NCHW[:start], labels_N[:start])


def _first(dataset: Any) -> Tensor:
    """The first image (C, H, W) that can be read."""
    return dataset.__getitems__([0])[0][0] if hasattr(dataset, "__getitems__") else dataset[0][0]


class SeededMixup:
    """Mixup and CutMix of timm, chosen by (seed, step), not by the global generator; made by `mixup`."""

    def __init__(self, *, seed: int, **options: Any) -> None:
        self.seed = seed
        self._mix = Mixup(**options)

    def __call__(self, x_BCHW: Tensor, labels_B: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Mix each image with another one of the batch.

        Args:
            x_BCHW: Images; left as they are.
            labels_B: Class indices, int64; all -1 where there are none.
            step: Number of the batch since the start of the training.

        Returns:
            The mixed images and the probabilities (B, K) float32 of their classes, None without labels. timm mixes
            pairs: the last image of an odd batch stays as it is.

        Raises:
            AcmizeError: Only some of the images have a label.
        """
        unlabelled = labels_B < 0
        has_labels = not bool(unlabelled.any())
        if not has_labels and not bool(unlabelled.all()):
            raise AcmizeError("mixup: found images with and without label in a batch, expected all or none labelled")
        labels_B = labels_B.clamp(min=0)
        mix, even = self._mix, len(labels_B) // 2 * 2
        mixed_BCHW, targets_BK = (
            x_BCHW.clone(),
            mixup_target(labels_B, mix.num_classes, 1.0, mix.label_smoothing),
        )
        if even:
            with seeded(Stream.MIX, self.seed, step):
                mixed_BCHW[:even], targets_BK[:even] = mix(mixed_BCHW[:even], labels_B[:even])
        return mixed_BCHW, targets_BK if has_labels else None


def mixup(
    num_classes: int,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    label_smoothing: float = 0.1,
    seed: int = 0,
) -> SeededMixup:
    """Make the mixing of batches for a model with `num_classes` outputs.

    Args:
        num_classes: Outputs of the model.
        mixup_alpha: Beta parameter of mixup; 0 for none.
        cutmix_alpha: Beta parameter of CutMix; 0 for none.
        prob: Probability that a batch is mixed at all.
        switch_prob: Probability of CutMix where both are on.
        label_smoothing: Share of the target spread over all classes.
        seed: Seed of every choice, together with the step.

    Raises:
        AcmizeError: Neither kind of mixing is on.
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        raise AcmizeError(
            f"mixup: found mixup_alpha={mixup_alpha} and cutmix_alpha={cutmix_alpha}, expected one above 0; "
            "leave mixing out instead"
        )
    return SeededMixup(
        seed=seed,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        prob=prob,
        switch_prob=switch_prob,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
