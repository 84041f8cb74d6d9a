"""Images and recordings that are read as they come, by `datasets` in streaming mode: tar shards of webdataset, the Hub.

What has to be looked at again and again is kept, undecoded: samples to fit on, held out and to test on, each from the
head of its split. Training alone goes through the whole. Its order is that of the shards, permuted within windows by
(seed, epoch, window), so that any position of any epoch is found again by its number alone; shards should hold their
samples in random order, as such shards do. Recordings of a window are put into batches of similar lengths.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from acmize.audio import POOL, AudioSet, AudioSplits, Utterance, buckets, stream_audio
from acmize.batches import Stream, numpy_generator, seeded
from acmize.data import Transform, decode_image
from acmize.errors import AcmizeError, UnreadableSample
from acmize.recipe import Recipe
from acmize.splits import NO_LABEL, ImageSplits, image_splits, load_splits
from acmize.unreadable import Unreadable

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("acmize")
WINDOW = 1024  # images that are mixed; some 100 MB of undecoded photographs
IMAGES, RECORDINGS = (1024, 4096), (256, 1024)  # kept at most: held out, to test on
Numbered = tuple[int, dict[str, Any]]  # the number of a row, and the row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The kept part of a stream, and the rest of it.

    Attributes:
        fit: samples kept to fit on.
        held: those held out.
        test: those to test on, or None.
        rows: the training samples, as they come.
    """

    fit: datasets.Dataset
    held: datasets.Dataset
    test: datasets.Dataset | None
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

    def windows(self, number: int, size: int) -> Iterator[tuple[int, list[Numbered]]]:
        """(number, rows) of windows of a size, from one on."""
        rows = self.window(number * size)
        while window := list(islice(rows, size)):
            yield number, window
            number += 1

    def window(self, start: int) -> Iterator[Numbered]:
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


def open_image_stream(data: Any, recipe: Recipe) -> tuple[ImageSplits, Head]:
    """Open image data as a stream; the splits hold what is kept of it.

    Args:
        data: local folder (tar shards, parquet files, images), id on the Hub, or a loaded `IterableDatasetDict`.
        recipe: its `limit` is the number of samples an epoch takes, for data that do not know their number.

    Raises:
        AcmizeError: nothing there, no images in it, no known split, or a number of samples that is not known.
    """
    import datasets

    splits = image_splits(*load_splits(data, streaming=True))
    column = splits.image_column
    raw = [s and s.cast_column(column, datasets.Image(decode=False)) for s in (splits.train, splits.test)]
    head = _head(raw[0], raw[1], splits.name, recipe, IMAGES)
    return dataclasses.replace(splits, train=head.fit, test=head.test), head


def open_audio_stream(data: Any, recipe: Recipe) -> tuple[AudioSplits, Head]:
    """Open recordings as a stream, as `open_image_stream` does it."""
    train, test, name = stream_audio(data)
    head = _head(train, test, name, recipe, RECORDINGS)
    return AudioSplits(train=head.fit, test=head.test, name=name), head


def _head(train: Any, test: Any, name: str, recipe: Recipe, most: tuple[int, int]) -> Head:
    """What is kept of streams of undecoded rows.

    Args:
        train: stream to train on.
        test: stream to test on, or None.
        name: of the data.
        recipe: of the conversion.
        most: rows held out and to test on, at most.
    """
    import datasets

    if train is None:
        raise AcmizeError(f"data {name}: found no train split, expected one to fit on; add train/")
    count = _count(train, name, recipe.limit)
    every = max(2, round(1 / recipe.holdout))
    wanted = max(1, min(most[0], count // every))
    fitted = max(recipe.moments, recipe.gates.images, recipe.batch_size)
    held, fit = [], []
    for place, row in enumerate(islice(safely(train, name), count)):
        if place % every == every - 1 and len(held) < wanted:
            held.append(row)
        elif len(fit) < fitted:
            fit.append(row)
        if len(held) == wanted and len(fit) == fitted:
            break
    if not held or not fit:
        raise AcmizeError(f"data {name}: found {len(held) + len(fit)} samples, expected {every} at least; give more")
    tested = None if test is None else list(islice(safely(test, name), min(recipe.limit or most[1], most[1])))
    counts = len(fit), len(held), len(tested or ())
    log.info("streaming %s: %d samples kept to fit on, %d held out, %d to test on", name, *counts)

    def kept(rows: list[dict[str, Any]], stream: Any) -> Any:
        return datasets.Dataset.from_list(rows, features=stream.features)

    return Head(
        fit=kept(fit, train),
        held=kept(held, train),
        test=None if tested is None else kept(tested, test),
        rows=Rows(train, name, count, every, len(held)),
    )


def _count(train: Any, name: str, limit: int | None) -> int:
    known = (getattr(train.info, "splits", None) or {}).get(str(train.split))
    count = getattr(known, "num_examples", None) or None
    if limit is None and count is None:
        raise AcmizeError(
            f"data {name}: found a stream of unknown length, expected the samples that an epoch takes; give --limit"
        )
    return min(n for n in (limit, count) if n is not None)


class Streamed(ABC):
    """Training samples as they come: epoch -> batches that can be begun anywhere.

    Args:
        rows: of the training split.
        unreadable: where samples that are left out are counted.
    """

    def __init__(self, rows: Rows, unreadable: Unreadable) -> None:
        self._rows, self._unreadable = rows, unreadable

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, epoch: int, seed: int) -> StreamedBatches:
        """Those of one epoch."""
        return StreamedBatches(self, size, epoch, seed)

    @abstractmethod
    def groups(self, number: int, size: int, epoch: int, seed: int) -> Iterator[list[Numbered]]:
        """The rows of each batch, from one on, undecoded."""

    @abstractmethod
    def item(self, number: int, row: dict[str, Any], epoch: int) -> Any:
        """One sample.

        Raises:
            UnreadableSample: it is damaged.
        """

    @abstractmethod
    def together(self, samples: list[Any]) -> Any:
        """A batch."""

    def stack(self, rows: list[Numbered], epoch: int) -> Any:
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
            raise AcmizeError(f"data {self._rows.name}: found a batch without a readable sample; mend the data")
        return self.together(made)


class StreamedBatches:
    """The batches of an epoch, from the first or from any other one on.

    Args:
        samples: to read.
        size: of a batch.
        epoch: whose order and augmentation they have.
        seed: of the order.
    """

    def __init__(self, samples: Streamed, size: int, epoch: int, seed: int) -> None:
        self._samples, self._size, self._epoch, self._seed = samples, size, epoch, seed

    def __iter__(self) -> Iterator[Any]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[Any]:
        """Batches from one on, without decoding those before it."""
        for rows in self._samples.groups(number, self._size, self._epoch, self._seed):
            yield self._samples.stack(rows, self._epoch)


class StreamedImages(Streamed):
    """(x_BCHW, labels_B) batches, full ones alone.

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
        super().__init__(rows, unreadable)
        self._transform, self._mode, self._classes = transform, mode, classes
        self._image, self._label, self._seed = image_column, label_column, seed

    def groups(self, number: int, size: int, epoch: int, seed: int) -> Iterator[list[Numbered]]:
        """Full batches of rows in the order of an epoch."""
        rows = self.ordered(number * size, epoch, seed)
        while len(some := list(islice(rows, size))) == size:
            yield some

    def ordered(self, start: int, epoch: int, seed: int) -> Iterator[Numbered]:
        """(number, row) in the order of an epoch, from a place on."""
        for place, window in self._rows.windows(start // WINDOW, WINDOW):
            order = numpy_generator(Stream.ORDER, seed, epoch, place).permutation(len(window))
            yield from (window[i] for i in order[max(start - place * WINDOW, 0) :])

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

    def together(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """(x_BCHW, labels_B)."""
        return torch.stack([x for x, _ in samples]), torch.tensor([label for _, label in samples])


class StreamedAudio(Streamed):
    """Batches of recordings of similar lengths: a window is `POOL` batches.

    Args:
        rows: of the training split.
        like: the kept part of that split, by whose columns and rate they are read.
        make: from recordings to a batch.
    """

    def __init__(self, rows: Rows, like: AudioSet, make: Callable[[list[Utterance]], Any]) -> None:
        super().__init__(rows, like.unreadable)
        self._like, self._make = like, make

    @property
    def has_transcripts(self) -> bool:
        """Whether any recording that is kept has one."""
        return self._like.has_transcripts

    def groups(self, number: int, size: int, epoch: int, seed: int) -> Iterator[list[Numbered]]:
        """Batches of rows in the order of an epoch, from one on; the last of an epoch may be smaller."""
        skipped = number % POOL
        for place, window in self._rows.windows(number // POOL, POOL * size):
            seconds = [self._like.length_of(row) for _, row in window]
            drawn = buckets(seconds, size, seed=seed, epoch=epoch, window=place)
            yield from ([window[i] for i in batch] for batch in drawn[skipped:])
            skipped = 0

    def item(self, number: int, row: dict[str, Any], epoch: int) -> Utterance:
        """One recording.

        Raises:
            UnreadableSample: it is damaged.
        """
        return self._like.utterance(row, number)

    def together(self, samples: list[Utterance]) -> Any:
        """What the phases take."""
        return self._make(samples)


__all__ = ["Head", "StreamedAudio", "StreamedImages", "open_audio_stream", "open_image_stream"]
