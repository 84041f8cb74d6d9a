"""Images that are read as they come: data sets in streaming mode, local tar shards in the manner of webdataset.

What has to be looked at again and again is kept, undecoded: images to fit on, images held out, test images, each from
the head of its split. Training alone goes through the whole. Its order is that of the shards, permuted within windows
of `WINDOW` rows by (seed, epoch, window), so that any position of any epoch is found again by its number alone; shards
should hold their samples in random order, as such shards do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from acmize.batches import Stream, numpy_generator, seeded
from acmize.data import Transform, decode_image
from acmize.errors import AcmizeError, UnreadableSample
from acmize.recipe import Recipe
from acmize.splits import NO_LABEL, ImageSplits, image_splits, load_splits
from acmize.unreadable import Unreadable

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("acmize")
WINDOW = 1024  # rows that are mixed; some 100 MB of undecoded photographs
HELD, TEST = 1024, 4096  # images kept at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The kept part of a stream, and the rest of it.

    Attributes:
        splits: the images kept for fitting as its train split, and for testing.
        held: those held out.
        rows: the training images, as they come.
    """

    splits: ImageSplits
    held: datasets.Dataset
    rows: Rows


class Rows:
    """The training rows of a stream by their numbers: those held out are passed over.

    Args:
        data: undecoded.
        name: of the data, for errors.
        count: rows of an epoch, those held out included.
        every: one row of so many is held out, the last of each.
        held: how many are held out, from the head.
    """

    def __init__(self, data: datasets.IterableDataset, name: str, count: int, every: int, held: int) -> None:
        self._data, self.name, self._every, self._held = data, name, every, held
        self.count = count - held

    def __len__(self) -> int:
        return self.count

    def window(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) from a number on, in stored order."""
        mixed = self._held * (self._every - 1)  # rows before the last one held out
        raw = start + (start // (self._every - 1) if start < mixed else self._held)
        number = start
        for place, row in enumerate(safely(self._data.skip(raw), self.name, raw), raw):
            if place % self._every == self._every - 1 and place // self._every < self._held:
                continue
            if number >= self.count:
                return
            yield number, row
            number += 1


def safely(rows: Any, name: str, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a stream; whatever a damaged shard raises is an error of ours."""
    place, stream = start, iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # kinds of archives, of parsers, of networks
            why = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise AcmizeError(f"data {name}: cannot be read behind row {place} ({why}); mend the shard") from error
        place += 1
        yield row


def open_stream(data: Any, recipe: Recipe) -> Head:
    """Open image data as a stream.

    Args:
        data: local folder (tar shards, parquet files, images), id on the Hub, or a loaded `IterableDatasetDict`.
        recipe: its `limit` is the number of samples an epoch takes, for data that do not know their number.

    Raises:
        AcmizeError: nothing there, no images in it, no known split, or a number of samples that is not known.
    """
    import datasets

    loaded, name = load_splits(data, streaming=True)
    splits = image_splits(loaded, name)
    if splits.train is None:
        raise AcmizeError(f"data {name}: found no train split, expected one to fit on; add train/")
    plain = {"train": splits.train, "test": splits.test}
    raw: dict[str, Any] = {
        key: stream.cast_column(splits.image_column, datasets.Image(decode=False))
        for key, stream in plain.items()
        if stream is not None
    }
    count = _count(splits.train, name, recipe.limit)
    every = max(2, round(1 / recipe.holdout))
    wanted = max(1, min(HELD, count // every))
    fitted = max(recipe.moments, recipe.gates.images, recipe.batch_size)
    held, fit = [], []
    for place, row in enumerate(islice(safely(raw["train"], name), count)):
        if place % every == every - 1 and len(held) < wanted:
            held.append(row)
        elif len(fit) < fitted:
            fit.append(row)
        if len(held) == wanted and len(fit) == fitted:
            break
    if not held or not fit:
        raise AcmizeError(f"data {name}: found {len(held) + len(fit)} images, expected {every} at least; give more")
    test = list(islice(safely(raw["test"], name), recipe.limit or TEST)) if "test" in raw else None
    log.info(
        "streaming %s: %d images kept to fit on, %d held out, %d to test on", name, len(fit), len(held), len(test or ())
    )

    def kept(rows: list[dict[str, Any]]) -> Any:
        return datasets.Dataset.from_list(rows, features=splits.train.features)  # pyright: ignore

    return Head(
        splits=dataclasses.replace(splits, train=kept(fit), test=None if test is None else kept(test)),
        held=kept(held),
        rows=Rows(raw["train"], name, count, every, len(held)),
    )


def _count(train: Any, name: str, limit: int | None) -> int:
    known = (getattr(train.info, "splits", None) or {}).get(str(train.split))
    count = getattr(known, "num_examples", None) or None
    if limit is None and count is None:
        raise AcmizeError(
            f"data {name}: found a stream of unknown length, expected the samples that an epoch takes; give --limit"
        )
    return min(n for n in (limit, count) if n is not None)


class StreamedImages:
    """Training images as they come: epoch -> (x_BCHW, labels_B) batches that can be begun anywhere.

    Args:
        rows: of the training split.
        transform: from a picture to x_CHW.
        image_column: with the pictures.
        label_column: with the class indices, or None.
        mode: "RGB" or "L".
        classes: of the model; a label beyond them is an error.
        seed: of order and augmentation.
        unreadable: where images that are left out are counted.
    """

    def __init__(
        self,
        rows: Rows,
        transform: Transform,
        *,
        image_column: str,
        label_column: str | None,
        mode: str,
        classes: int | None,
        seed: int,
        unreadable: Unreadable,
    ) -> None:
        self._rows, self._transform, self._mode, self._classes = rows, transform, mode, classes
        self._image, self._label, self._seed, self._unreadable = image_column, label_column, seed, unreadable

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, epoch: int, seed: int) -> StreamedBatches:
        """Full batches of one epoch."""
        return StreamedBatches(self, size, epoch, seed)

    def ordered(self, start: int, epoch: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) in the order of an epoch, from a place on."""
        first = start // WINDOW * WINDOW
        rows = self._rows.window(first)
        while window := list(islice(rows, WINDOW)):
            order = numpy_generator(Stream.ORDER, seed, epoch, first // WINDOW).permutation(len(window))
            yield from (window[i] for i in order[max(start - first, 0) :])
            first += len(window)

    def item(self, number: int, row: dict[str, Any], epoch: int) -> tuple[Tensor, int]:
        """One image and its label.

        Raises:
            UnreadableSample: it is damaged.
        """
        image = decode_image(row[self._image], self._mode, f"row {number} of {self._rows.name}")
        label = NO_LABEL if self._label is None or row.get(self._label) is None else int(row[self._label])
        if self._classes is not None and not NO_LABEL <= label < self._classes:
            raise AcmizeError(
                f"data {self._rows.name}, row {number}: found label {label}, expected 0 to {self._classes - 1}; "
                "choose the data that the model was trained for"
            )
        with seeded(Stream.AUGMENT, self._seed, epoch, number):
            return self._transform(image), label

    def stack(self, rows: list[tuple[int, dict[str, Any]]], epoch: int) -> tuple[Tensor, Tensor]:
        """A batch of those that can be read.

        Raises:
            AcmizeError: none can, or more than the limit could not.
        """
        made = []
        for number, row in rows:
            try:
                made.append(self.item(number, row, epoch))
            except UnreadableSample as error:
                self._unreadable.note(("train", number), error)
        if not made:
            raise AcmizeError(f"data {self._rows.name}: found a batch without a readable image; mend the data")
        return torch.stack([x for x, _ in made]), torch.tensor([label for _, label in made])


class StreamedBatches:
    """The batches of an epoch, from the first or from any other one on.

    Args:
        images: to read.
        size: of a batch; a last one that is not full is left out.
        epoch: whose order and augmentation they have.
        seed: of the order.
    """

    def __init__(self, images: StreamedImages, size: int, epoch: int, seed: int) -> None:
        self._images, self._size, self._epoch, self._seed = images, size, epoch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from one on, without decoding those before it."""
        rows = self._images.ordered(number * self._size, self._epoch, self._seed)
        while len(some := list(islice(rows, self._size))) == self._size:
            yield self._images.stack(some, self._epoch)


__all__ = ["Head", "StreamedImages", "open_stream"]
