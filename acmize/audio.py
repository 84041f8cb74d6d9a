"""Audio data sets from anything `datasets` opens with an audio column, decoded by soundfile, at the model's rate.

Transcripts are optional. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from acmize.batches import Stream, numpy_generator
from acmize.errors import AcmizeError, UnreadableSample
from acmize.splits import TEST_NAMES, limited, load_splits
from acmize.unreadable import Unreadable

if TYPE_CHECKING:
    import datasets

_AUDIO_NAMES = ("audio", "speech", "file")
_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff")
RATES = (1_000, 768_000)  # Hz that a recording can have
MAX_SAMPLES = 1 << 26  # 70 minutes at 16 kHz, as stored, channels counted, and at the model's rate; 268 MB
POOL = 16  # batches whose recordings are sorted by length together
_TEXT_NAMES = ("transcription", "transcript", "text", "sentence", "normalized_text", "txt")  # the last: of webdataset


@dataclass(frozen=True)
class Utterance:
    """One recording: `wave` (L,) float32 at the model's rate, `text` its transcript or None, `key` to tell it by."""

    wave: Tensor
    text: str | None
    key: tuple[str, int]


class AudioSet:
    """Utterances of one split, decoded when asked for.

    Args:
        data: rows with an audio column.
        name: of the split, part of every utterance's key.
        audio_column: column with the recordings.
        text_column: column with the transcripts, or None.
        rate: of the model, in Hz; recordings of another rate are resampled by soxr.
        unreadable: where recordings that cannot be read are counted; `some` leaves them out, a single one is an error.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        name: str,
        audio_column: str,
        text_column: str | None,
        rate: int,
        unreadable: Unreadable | None = None,
    ) -> None:
        import datasets

        undecoded = isinstance(data.features[audio_column], datasets.Audio)
        self._rows: Any = data.cast_column(audio_column, datasets.Audio(decode=False)) if undecoded else data
        self.name, self.rate = name, rate
        self._audio, self._text = audio_column, text_column
        self.unreadable = unreadable or Unreadable()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Utterance:
        return self.utterance(self._rows[index], index)

    def utterance(self, row: dict[str, Any], index: int) -> Utterance:
        """A recording from a row with this set's columns.

        Raises:
            UnreadableSample: it is damaged.
        """
        wave = decode_audio(row[self._audio], f"recording {index} of {self.name}", self.rate)
        text = row.get(self._text) if self._text else None
        return Utterance(torch.from_numpy(wave), text, (self.name, index))

    def some(self, indices: Sequence[int]) -> list[Utterance]:
        """The readable ones of some recordings; see `unreadable.Unreadable.read`."""
        return self.unreadable.read(self.__getitem__, indices, len(self), lambda index: (self.name, index))

    def __iter__(self) -> Iterator[Utterance]:
        for index in range(len(self)):
            try:
                yield self[index]
            except UnreadableSample as error:
                self.unreadable.note((self.name, index), error)

    @property
    def has_transcripts(self) -> bool:
        """Whether any recording has one."""
        return self._text is not None and any(self._rows[self._text])

    def seconds(self) -> list[float]:
        """Length of every recording, from the files' headers; 0 of those that have none."""
        return [self.length_of(row) for row in self._rows]

    def length_of(self, row: dict[str, Any]) -> float:
        """Seconds of a row's recording, from the file's header; 0 where it has none."""
        return _seconds(row[self._audio])


class JoinedAudio:
    """Several sets as one; each utterance keeps the key it has in its own.

    Args:
        parts: the sets, in order.
    """

    def __init__(self, *parts: AudioSet) -> None:
        self._parts = parts
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Utterance:
        part, i = self._places[index]
        return part[i]

    def some(self, indices: Sequence[int]) -> list[Utterance]:
        """The readable ones of some recordings."""

        def key(index: int) -> tuple[str, int]:
            part, i = self._places[index]
            return part.name, i

        return self._parts[0].unreadable.read(self.__getitem__, indices, len(self), key)

    def seconds(self) -> list[float]:
        """Length of every recording."""
        return [seconds for part in self._parts for seconds in part.seconds()]


@dataclass(frozen=True, kw_only=True)
class AudioSplits:
    """The splits of an audio data set: `train`, `test` (or None each), and what to call it in tables."""

    train: datasets.Dataset | None
    test: datasets.Dataset | None
    name: str

    def split(self, which: str) -> datasets.Dataset:
        """A split.

        Raises:
            AcmizeError: the data has no such split.
        """
        found = self.train if which == "train" else self.test
        if found is None:
            raise AcmizeError(f"data {self.name!r}: found no {which} split, expected one; add it")
        return found

    def audio(self, data: datasets.Dataset, split: str, rate: int, unreadable: Unreadable | None = None) -> AudioSet:
        """A split, or a part of it, as utterances."""
        return AudioSet(data, split, _audio_column(data, self.name), _text_column(data), rate, unreadable)


def open_audio(path: str | Path | datasets.DatasetDict, *, limit: int | None = None, seed: int = 0) -> AudioSplits:
    """Open an audio data set.

    Args:
        path: local folder (an audio folder with or without metadata.csv; parquet files), id on the Hugging Face Hub, or
            a loaded `DatasetDict`. Splits may have different columns: unlabelled train, test with transcripts.
        limit: take at most so many recordings of each split, at random.
        seed: of that choice.

    Raises:
        AcmizeError: nothing there, no audio in it, no known split.
    """
    if limit is not None and limit < 1:
        raise AcmizeError(f"limit: found {limit}, expected at least 1; leave it out to take all recordings")
    splits, name = _load(path)
    train, test = _train_and_test(splits)
    if train is None and test is None:
        found = ", ".join(map(repr, splits))
        raise AcmizeError(f"data {name!r}: found the splits {found}, expected 'train' or 'test'; rename the folders")
    return AudioSplits(train=limited(train, limit, seed, 0), test=limited(test, limit, seed, 1), name=name)


def stream_audio(path: Any) -> tuple[Any, Any, str]:
    """Open recordings as streams of undecoded rows.

    Args:
        path: local folder (tar shards, parquet files, an audio folder), id on the Hub, or a loaded
            `IterableDatasetDict`.

    Returns:
        The train and the test stream (or None each), and what to call the data.

    Raises:
        AcmizeError: nothing there, no audio in it.
    """
    import datasets

    splits, name = _load(path, streaming=True)
    found = _train_and_test(splits)
    for place, stream in enumerate(found):
        if stream is None:
            continue
        if stream.features is None:
            raise AcmizeError(f"data {name!r}: found columns of unknown types, expected audio; cast them to features")
        # Not Audio(decode=False), which wants torchcodec, and so FFmpeg, even to hand files through.
        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        found[place] = stream.cast_column(_audio_column(stream, name), stored)
    return found[0], found[1], name


def buckets(
    seconds: Sequence[float], size: int, *, seed: int | None = None, epoch: int = 0, window: int | None = None
) -> list[list[int]]:
    """Indices in batches of similar length: sorted within pools of `POOL` batches.

    Args:
        seconds: length of every recording.
        size: recordings in a batch at most.
        seed: of the order of pools and batches; None: stored order.
        epoch: another one each time.
        window: number of the window of a stream that the recordings are; None: they are all.
    """
    order = np.arange(len(seconds))
    numbers = (epoch,) if window is None else (epoch, window)
    if seed is not None:
        order = numpy_generator(Stream.ORDER, seed, *numbers).permutation(len(seconds))
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        if size > 1:
            pool = pool[np.argsort([seconds[i] for i in pool], kind="stable")]
        batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
    if seed is not None and size > 1:
        shuffled = numpy_generator(Stream.ORDER, seed, *numbers, 1).permutation(len(batches))
        batches = [batches[i] for i in shuffled]
    return batches


def _train_and_test(splits: Mapping[Any, Any]) -> list[Any]:
    """The two splits that are used, by the names they usually have; None where there is none."""
    by_name = {str(key).lower(): data for key, data in splits.items()}
    return [by_name.get("train"), next((by_name[key] for key in TEST_NAMES if key in by_name), None)]


def _load(path: Any, streaming: bool = False) -> tuple[Any, str]:
    """Splits by name, and a name for the data.

    A folder of recordings is read here, one split after another: `datasets` wants torchcodec, and so FFmpeg, to open
    one, and the same columns in every split.
    """
    folder = Path(path).expanduser() if isinstance(path, str | Path) and str(path) else None
    if folder is None or not folder.is_dir() or not any(_recordings(folder)):
        return load_splits(path, streaming=streaming)
    names = [n for n in ("train", *TEST_NAMES) if (folder / n).is_dir()]
    parts = {n: folder / n for n in names} or {"train": folder}
    splits = {n: _folder_split(part) for n, part in parts.items()}
    if streaming:
        splits = {n: data.to_iterable_dataset() for n, data in splits.items()}
    return splits, folder.resolve().name


def _recordings(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _SUFFIXES)


def _folder_split(folder: Path) -> datasets.Dataset:
    """Recordings of a folder with the columns of its metadata.csv or metadata.jsonl (`file_name` and others)."""
    import datasets

    rows: list[dict[str, Any]] = [{"file_name": str(file.relative_to(folder))} for file in _recordings(folder)]
    table = next((t for t in (folder / "metadata.csv", folder / "metadata.jsonl") if t.is_file()), folder)
    try:
        if table.suffix == ".csv":
            with table.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines, strict=True))
        elif table.suffix == ".jsonl":
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(row, dict) and {*map(type, row)} == {str} for row in rows):
            raise ValueError("rows that are no objects, or longer than the first line")
    except (ValueError, csv.Error, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise AcmizeError(f"{table}: cannot be read ({str(error)[:300]}); mend or remove it") from None
    lacking = next((row for row in rows if "file_name" not in row), None)
    if lacking is not None:
        found = ", ".join(lacking)[:300]
        raise AcmizeError(f"{table}: found the columns {found}, expected file_name among them; add it")
    files = [folder / str(row.pop("file_name")) for row in rows]
    missing = next((file for file in files if not _inside(file, folder)), None)
    if missing is not None:
        raise AcmizeError(
            f"{table}: names {str(missing)[:300]!r}, which is no file in {folder}; mend or remove the row"
        )
    made = [{**row, "audio": {"path": str(file), "bytes": None}} for file, row in zip(files, rows, strict=True)]
    try:
        return datasets.Dataset.from_list(made)
    except Exception as error:  # kinds of pyarrow: values of one column that have no type in common
        raise AcmizeError(f"{table}: its columns do not fit together ({str(error)[:300]}); mend the rows") from None


def _inside(file: Path, folder: Path) -> bool:
    """Whether a path leads to a file in a folder, links and dots followed."""
    try:
        return file.is_file() and file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # too long, or a zero byte
        return False


def _audio_column(data: datasets.Dataset, name: str) -> str:
    import datasets

    def holds_audio(feature: Any) -> bool:
        return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and {*feature} == {"path", "bytes"})

    columns = [column for column, feature in data.features.items() if holds_audio(feature)]
    usual = [column for column in _AUDIO_NAMES if column in columns] or columns
    if usual:
        return usual[0]
    found = ", ".join(data.features)
    raise AcmizeError(f"data {name!r}: found the columns {found}, expected one with audio; give a folder of recordings")


def _text_column(data: datasets.Dataset) -> str | None:
    texts = [column for column in _TEXT_NAMES if "string" in str(getattr(data.features.get(column), "dtype", ""))]
    return texts[0] if texts else None


def _file(stored: dict[str, Any]) -> Any:
    return stored["path"] if stored.get("bytes") is None else io.BytesIO(stored["bytes"])


def _seconds(stored: dict[str, Any] | None) -> float:
    import soundfile

    try:
        return 0.0 if stored is None else float(soundfile.info(_file(stored)).duration)
    except (OSError, RuntimeError, TypeError):
        return 0.0


def decode_audio(stored: dict[str, Any] | None, what: str, rate: int) -> np.ndarray:
    """(L,) float32 samples of a recording at a rate, channels averaged.

    Args:
        stored: "bytes", or None and the "path" of the file.
        what: to call it by in errors.
        rate: in Hz.

    Raises:
        UnreadableSample: there is none, it is damaged, empty, far too long, or holds numbers that are none.
        AcmizeError: soundfile or soxr is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError:
        raise AcmizeError("audio: soundfile or soxr is missing; pip install 'acmize[speech]'") from None
    if stored is None:
        raise UnreadableSample(f"{what}: found none, expected audio; take the row out of the data")
    where = str(stored.get("path") or "stored in the data")[:200]
    try:
        with soundfile.SoundFile(_file(stored)) as file:
            own, channels = int(file.samplerate), int(file.channels)
            most = MAX_SAMPLES // max(channels, 1, -(-rate // max(own, 1)))
            if not RATES[0] <= own <= RATES[1]:
                raise ValueError(f"a rate of {own} Hz, expected {RATES[0]} to {RATES[1]}")
            wave = _read(file, most)
        if not len(wave):
            raise ValueError("no samples")
        if not np.isfinite(wave).all():
            raise ValueError("samples that are no numbers")
        wave = soxr.resample(wave, own, rate) if own != rate else wave
        return np.ascontiguousarray(wave, dtype=np.float32)
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        why = (str(error) or type(error).__name__)[:300]
        raise UnreadableSample(
            f"{what} ({where}): expected readable audio, found: {why}; repair it or take it out"
        ) from error


def _read(file: Any, most: int) -> np.ndarray:
    """(L,) float32 samples, block by block: the header may promise any number of them."""
    blocks, left = [np.empty(0, np.float32)], most
    while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
        left -= len(block)
        if left < 0:
            raise ValueError(f"more than {most} samples")
        blocks.append(block.mean(1))
    return np.concatenate(blocks)
