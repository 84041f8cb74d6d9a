"""Data in streaming mode: tar shards, a position that is found again, and damaged shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from short import OPTIONS, Killed, converted, kill, same_state, timeless

from acmize import streaming
from acmize.api import convert
from acmize.data import train_transform
from acmize.errors import AcmizeError
from acmize.images import Images
from acmize.models import load_model
from acmize.quickstart_model import digits_dataset
from acmize.recipe import resolve

STREAM: dict[str, Any] = {"streaming": True, "limit": 64, "moments": 24, "gates": {"images": 16}}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shards(folder: Path, count: int = 64, size: int = 24, broken: tuple[int, ...] = ()) -> Path:
    """The first digits in tar shards, as webdataset has them: 0007.png and 0007.cls beside each other."""
    for split, number in (("train", count), ("test", 16)):
        rows = digits_dataset()[split].select(range(number))
        (folder / split).mkdir(parents=True)
        for start in range(0, number, size):
            with tarfile.open(folder / split / f"{start:05}.tar", "w") as tar:
                for place in range(start, min(start + size, number)):
                    picture = io.BytesIO()
                    rows[place]["image"].save(picture, "PNG")
                    bad = split == "train" and place in broken
                    add(tar, f"{place:05}.png", b"no picture" if bad else picture.getvalue())
                    add(tar, f"{place:05}.cls", str(rows[place]["label"]).encode())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def images(folder: Path) -> Images:
    return Images(str(folder), load_model("acmize_vit_digits"), resolve(OPTIONS, STREAM))


def labels(images: Images, epoch: int, start: int = 0) -> list[int]:
    of, _ = images.epochs(images.augmented, 0)
    return [int(label) for _, some in of(epoch).starting_at(start) for label in some]


def test_every_image_is_in_one_part(images: Images) -> None:
    """Held out: the last of every seven or so; what is trained on is the rest, each once an epoch."""
    rows = list(images.augmented._rows.window(0))
    held, every = len(images.held), round(1 / 0.15)
    assert held == 64 // every
    assert [number for number, _ in rows] == list(range(64 - held))
    names = {row["__key__"].rsplit("/", 1)[-1] for _, row in rows}
    away = {f"{every * i + every - 1:05}" for i in range(held)}
    assert names | away == {f"{i:05}" for i in range(64)}
    assert not names & away
    stored = digits_dataset()["train"]["label"][:64]
    assert images.held.labels_N.tolist() == [stored[int(name)] for name in sorted(away)]
    assert len(images.fit) == 24
    assert images.has_labels
    assert len(images.test) == 16


@pytest.mark.parametrize("start", [0, 1, 5, 13, 40, 54])
def test_any_row_is_found_by_its_number(images: Images, start: int) -> None:
    whole = [row["__key__"] for _, row in images.augmented._rows.window(0)]
    assert [row["__key__"] for _, row in images.augmented._rows.window(start)] == whole[start:]


@pytest.mark.parametrize("window", [7, 16, 1024])
def test_an_epoch_is_found_again_in_its_middle(images: Images, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(streaming, "WINDOW", window)
    of, steps = images.epochs(images.augmented, 0)
    whole = list(of(1))
    assert len(whole) == steps == 3
    for start in range(steps):
        for (x, y), (other, same) in zip(of(1).starting_at(start), whole[start:], strict=True):
            assert torch.equal(x, other)
            assert torch.equal(y, same)
    assert labels(images, 1) != labels(images, 0)
    numbers = [number for number, _ in images.augmented.ordered(0, 1, 0)]
    assert sorted(numbers) == list(range(len(images.augmented)))
    assert numbers != sorted(numbers)


def test_a_streamed_conversion_resumes_alike(folder: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch of the last phase; and with a picture that is none, which is named."""
    options = {"train": {"epochs": 2}, **STREAM}
    whole = converted(options, data=str(folder))
    assert not whole.results["left_out"]
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "finetune", 5)
        with pytest.raises(Killed):
            converted(options, data=str(folder), work=tmp_path / "work")
    made = converted(options, data=str(folder), work=tmp_path / "work", resume=True)
    assert same_state(made, whole)
    assert timeless(made.results) == timeless(whole.results)


def test_corrupt_samples_and_a_shard_cut_in_half(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", broken=(3, 30))
    made = converted({**STREAM, "phases": ["distill"]}, data=str(folder))
    assert sorted(line.split(":")[0] for line in made.results["left_out"])
    assert len(made.results["left_out"]) >= 2
    with pytest.raises(AcmizeError, match="unreadable samples, expected 0 at most"):
        converted({**STREAM, "phases": ["distill"], "max_corrupt": 0}, data=str(folder))
    last = folder / "train" / "00024.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(AcmizeError, match=r"cannot be read behind row \d+|of unknown length|found .* batches"):
        converted({**STREAM, "phases": ["distill"]}, data=str(folder))


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    """Nothing is unpacked: a member is bytes, whatever it calls itself."""
    folder = shards(tmp_path / "data", count=32)
    picture = io.BytesIO()
    digits_dataset()["train"][0]["image"].save(picture, "PNG")
    with tarfile.open(folder / "train" / "00000.tar", "w") as tar:
        for name in ("../../escaped", "/tmp/acmize-escaped", "inner/../../../escaped"):
            add(tar, f"{name}.png", picture.getvalue())
            add(tar, f"{name}.cls", b"0")
    before = {p for p in tmp_path.parent.rglob("*")}
    images = Images(str(folder), load_model("acmize_vit_digits"), resolve(OPTIONS, {**STREAM, "limit": 11}))
    assert len(images.held) + len(images.fit) > 2
    assert {p for p in tmp_path.parent.rglob("*")} == before
    assert not Path("/tmp/acmize-escaped.png").exists()


def test_what_a_stream_has_to_say(folder: Path) -> None:
    model = load_model("acmize_vit_digits")
    with pytest.raises(AcmizeError, match=r"found a stream of unknown length.* give --limit"):
        Images(str(folder), model, resolve(OPTIONS, {**STREAM, "limit": None}))
    parts = datasets.IterableDatasetDict(train=digits_dataset()["train"].to_iterable_dataset())
    given = Images(parts, model, resolve(OPTIONS, STREAM))
    assert given.test is None
    with pytest.raises(AcmizeError, match=r"expected a path, a hub id or a datasets.DatasetDict.*--streaming"):
        Images(parts, model, resolve(OPTIONS))
    texts = datasets.IterableDatasetDict(train=datasets.Dataset.from_dict({"text": ["a"] * 9}).to_iterable_dataset())
    with pytest.raises(AcmizeError, match="expected one image column"):
        convert(model, data=texts, recipe=resolve(OPTIONS, STREAM))
    assert train_transform(model) is not None


def test_labels_beyond_the_model(folder: Path) -> None:
    images = Images(str(folder), load_model("acmize_vit_digits"), resolve(OPTIONS, STREAM))
    number, row = next(iter(images.augmented._rows.window(0)))
    with pytest.raises(AcmizeError, match="found label 10, expected 0 to 9"):
        images.augmented.item(number, {**row, "cls": 10}, 0)
