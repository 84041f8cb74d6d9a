"""Recordings in streaming mode: tar shards and parquet, batches of similar lengths, a position that is found again."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from short import Killed, command, kill, refused, same_state, timeless
from test_speech import _tokenizer
from test_streaming import add
from tiny_speech import SIZES, _ctc

from acmize.api import convert
from acmize.audio import POOL, buckets
from acmize.errors import AcmizeError
from acmize.hf_models import Processor
from acmize.models import load_model
from acmize.recipe import resolve
from acmize.speech import Speech
from acmize.streaming import StreamedAudio

COUNT = 46
OPTIONS: dict[str, Any] = {
    "streaming": True, "limit": COUNT, "budget": 0.9, "budgets": [0.95], "moments": 8, "batch_size": 3,
    "holdout": 0.15, "acm": {"num_learners": 4, "gate_hidden": 2},
    "gates": {"rounds": 1, "draws": 1, "steps": 20, "images": 6}, "distill": {"tokens": 64},
    "train": {"epochs": 2, "interpolate": False}, "losses": {"task": 0.5},
}  # fmt: skip


def tone(number: int) -> bytes:
    """A digit in the manner of FSDD: 8 kHz, a quarter of a second or so, told by its pitch."""
    rng = np.random.default_rng(number)
    t = np.arange(1500 + 60 * int(rng.integers(30))) / 8000
    wave = 0.3 * np.sin(2 * np.pi * (200 + 60 * (number % 10)) * t) + 0.02 * rng.normal(size=len(t))
    file = io.BytesIO()
    soundfile.write(file, wave, 8000, format="FLAC")
    return file.getvalue()


def text(number: int) -> str:
    return "ABCDEFGHI"[number % 9]


def shards(folder: Path, count: int = COUNT, size: int = 20, broken: tuple[int, ...] = ()) -> Path:
    """Recordings in tar shards, as webdataset has them: 0007.flac and 0007.txt beside each other."""
    for split, number in (("train", count), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for start in range(0, number, size):
            with tarfile.open(folder / split / f"{start:05}.tar", "w") as tar:
                for place in range(start, min(start + size, number)):
                    add(tar, f"{place:05}.flac", b"no audio" if split == "train" and place in broken else tone(place))
                    add(tar, f"{place:05}.txt", text(place).encode())
    return folder


def parquet(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir()
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(audio=stored, transcription=datasets.Value("string"))
    for split, number in (("train", count), ("test", 4)):
        rows = [{"audio": {"bytes": tone(i), "path": None}, "transcription": text(i)} for i in range(number)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CTC model at 16 kHz, whose batches may be of unequal lengths."""
    folder = tmp_path_factory.mktemp("ctc")
    _ctc("Wav2Vec2", **SIZES)().save_pretrained(folder)
    features = tf.Wav2Vec2FeatureExtractor(sampling_rate=16_000, return_attention_mask=True, do_normalize=False)
    Processor(features, _tokenizer(folder, "ctc")).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("stream") / "tones")


@pytest.fixture
def speech(saved: Path, folder: Path) -> Speech:
    return Speech(str(folder), load_model(str(saved)), resolve(OPTIONS))


def drawn(which: StreamedAudio, epoch: int, start: int = 0, size: int = 3) -> list[list[int]]:
    return [[number for number, _ in rows] for rows in which.groups(start, size, epoch, 0)]


# --- reading --------------------------------------------------------------------------------------------------


def test_every_recording_is_in_one_part(speech: Speech) -> None:
    """Held out: the last of every seven or so; what is trained on is the rest, each once an epoch."""
    every = round(1 / 0.15)
    rows = [row["__key__"].rsplit("/", 1)[-1] for _, row in speech.augmented._rows.window(0)]
    away = [f"{i:05}" for i in range(COUNT) if i % every == every - 1 and i // every < len(speech.held)]
    assert len(speech.held) == len(away) == COUNT // every
    assert sorted([*rows, *away]) == [f"{i:05}" for i in range(COUNT)]
    assert [u.text for u in speech.held] == [text(int(name)) for name in away]
    assert [u.text for u in speech.fit][:3] == [text(i) for i in range(3)]
    assert len(speech.fit) == 8
    assert len(speech.test) == 4
    assert speech.has_labels


def test_they_are_decoded_and_resampled_as_ever(speech: Speech, saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "plain"
    for split, count in (("train", COUNT), ("test", 4)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            (root / split / f"{number:05}.flac").write_bytes(tone(number))
    plain = Speech(str(root), load_model(str(saved)), resolve(OPTIONS, {"streaming": False}))
    (number, row), *_ = speech.augmented._rows.window(9)
    name = int(row["__key__"].rsplit("/", 1)[-1])
    streamed, read = speech.augmented.item(number, row, 0), plain.test[0]
    assert torch.equal(speech.test[0].wave, read.wave)
    whole = soundfile.read(io.BytesIO(tone(name)))[0]
    assert len(streamed.wave) == 2 * len(whole)
    assert streamed.text == text(name)


def test_batches_are_of_similar_lengths_and_hold_everything_once(speech: Speech) -> None:
    which, count = speech.augmented, len(speech.augmented)
    first, second = drawn(which, 0), drawn(which, 1)
    of, steps = speech.epochs(which, 0)
    assert len(first) == len(second) == steps == -(-count // 3)
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(count))
    assert first != second
    lengths = {number: speech.fit.length_of(row) for number, row in which._rows.window(0)}
    spread = np.mean([max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first if len(b) > 1])
    assert spread < 0.3 * (max(lengths.values()) - min(lengths.values()))
    inputs, labels = next(iter(of(0)))
    assert inputs.tensors["input_values"].shape[0] == len(labels) == len(first[0])
    assert (labels >= 0).any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_epoch_is_found_again_in_its_middle(speech: Speech, size: int) -> None:
    """In windows of 16 batches: with one recording a batch, several of them."""
    which = speech.augmented
    whole = drawn(which, 1, size=size)
    assert size > 1 or len(whole) > 2 * POOL
    for start in range(len(whole)):
        assert drawn(which, 1, start, size) == whole[start:]
    for place in range(0, len(whole), POOL):  # no more than a window is held
        window = [number for batch in whole[place : place + POOL] for number in batch]
        assert sorted(window) == list(range(place * size, min((place + POOL) * size, len(which))))


def test_windows_have_orders_of_their_own() -> None:
    seconds = np.random.default_rng(0).uniform(1, 20, 32).tolist()
    orders = [buckets(seconds, 4, seed=0, epoch=e, window=w) for e in (0, 1) for w in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6


# --- the whole way --------------------------------------------------------------------------------------------


def test_parquet_and_shards_are_the_same(saved: Path, folder: Path, tmp_path: Path) -> None:
    files = parquet(tmp_path / "parquet")
    cases = ((folder, ["distill"]), (files, ["distill"]), (files, []))
    made, other, untrained = (
        convert(load_model(str(saved)), data=str(data), **{**OPTIONS, "phases": phases}) for data, phases in cases
    )
    assert not same_state(other, untrained)
    assert same_state(made, other)


def test_a_streamed_conversion_resumes_alike(saved: Path, folder: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch of the last phase."""
    data = str(folder)
    whole = convert(load_model(str(saved)), data=data, **OPTIONS)
    assert not whole.results["left_out"]
    assert {row["budget"] for row in whole.results["results"]} == {0.95, 0.9}
    with pytest.MonkeyPatch.context() as patch:
        seen = kill(patch, "finetune", 19)
        with pytest.raises(Killed):
            convert(load_model(str(saved)), data=data, work=tmp_path / "work", **OPTIONS)
    assert len(seen) == 20
    made = convert(load_model(str(saved)), data=data, work=tmp_path / "work", resume=True, **OPTIONS)
    assert same_state(made, whole)
    assert timeless(made.results) == timeless(whole.results)


def test_corrupt_recordings_are_left_out_counted_and_named(saved: Path, tmp_path: Path) -> None:
    data = str(shards(tmp_path / "data", broken=(3, 30)))
    options = {**OPTIONS, "phases": ["distill"]}
    made = convert(load_model(str(saved)), data=data, **options)
    told = made.results["left_out"]
    assert len(told) == 2  # the one that is also among those kept to fit on counts once
    assert all("expected readable audio" in line for line in told)
    with pytest.raises(AcmizeError, match="unreadable samples, expected 1 at most"):
        convert(load_model(str(saved)), data=data, **{**options, "max_corrupt": 1})


def test_what_a_stream_has_to_say(saved: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(saved))
    with pytest.raises(AcmizeError, match=r"found a stream of unknown length.* give --limit"):
        Speech(str(folder), model, resolve(OPTIONS, {"limit": None}))
    texts = datasets.IterableDatasetDict(train=datasets.Dataset.from_dict({"text": ["a"] * 9}).to_iterable_dataset())
    with pytest.raises(AcmizeError, match="expected one with audio"):
        Speech(texts, model, resolve(OPTIONS))
    only = datasets.IterableDatasetDict(test=datasets.load_dataset(str(folder), streaming=True)["test"])
    with pytest.raises(AcmizeError, match="found no train split"):
        Speech(only, model, resolve(OPTIONS))


def test_a_folder_of_recordings_and_the_command(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 20), ("test", 4)):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "plain" / split / f"{number:05}.flac").write_bytes(tone(number))
    table = "\n".join(["file_name,transcription", *(f"{number:05}.flac,{text(number)}" for number in range(4))])
    (tmp_path / "plain" / "test" / "metadata.csv").write_text(table)
    heard = Speech(str(tmp_path / "plain"), load_model(str(saved)), resolve(OPTIONS, {"limit": 20}))
    assert not heard.has_labels
    assert [u.text for u in heard.test] == [text(number) for number in range(4)]  # columns that train has not
    assert sorted(i for batch in drawn(heard.augmented, 0) for i in batch) == list(range(20 - len(heard.held)))
    words = ["convert", saved, "--data", tmp_path / "plain", "--streaming", "--phases", "none", "-o", tmp_path / "out"]
    assert command(monkeypatch, *words) == 2
    assert "give --limit" in refused(capfd.readouterr())
    assert not (tmp_path / "out").exists()
