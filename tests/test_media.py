"""Hostile images and recordings: odd ones are read, damaged ones left out by name, huge ones refused in time."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image
from short import config_file, converted, image_folder
from timm.data.transforms_factory import create_transform

from acmize import audio, data, unreadable
from acmize.audio import decode_audio, open_audio
from acmize.batches import cached, loader
from acmize.data import ImageSet, decode_image
from acmize.errors import AcmizeError, UnreadableSample
from acmize.unreadable import Unreadable

MEDIA = Path(__file__).parent / "corpus" / "media"
SOUNDS = (".wav", ".flac", ".ogg")
PICTURES = sorted(p.name for p in MEDIA.iterdir() if p.suffix not in SOUNDS)
RECORDINGS = sorted(p.name for p in MEDIA.iterdir() if p.suffix in SOUNDS)


def decoded(content: bytes | Path, mode: str = "RGB") -> Image.Image:
    kept = {"path": str(content), "bytes": None} if isinstance(content, Path) else {"path": None, "bytes": content}
    return decode_image(kept, mode, "image 7")


def heard(content: bytes | Path, rate: int = 16_000) -> np.ndarray:
    kept = {"path": str(content), "bytes": None} if isinstance(content, Path) else {"path": None, "bytes": content}
    return decode_audio(kept, "recording 7", rate)


def png(width: int, height: int, kind: int = 0) -> bytes:
    """A PNG of one bit a pixel that is all zeros; a huge one has but some of its rows, which nobody should miss."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    press = zlib.compressobj(9)
    row = bytes(min(1 + (width + 7) // 8, 10_000))
    rows = height if width * height < 20_000_000 else 10
    content = b"".join(press.compress(row) for _ in range(rows)) + press.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# --- images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_are_read(name: str, mode: str) -> None:
    """CMYK, palettes, one bit, 16 bits, floats, one pixel, several frames: each in the shape that the model takes."""
    image = decoded(MEDIA / name, mode)
    assert image.size == ((1, 1) if name == "pixel.png" else (13, 9))  # an orientation stored beside it is ignored
    x_CHW = create_transform((len(mode), 16, 16), is_training=False, mean=(0.5,) * len(mode), std=(0.5,) * len(mode))(
        image  # pyright: ignore
    )
    assert x_CHW.shape == (len(mode), 16, 16)


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "progressive.jpg", "rgb.webp", "lzw.tiff", "rgb.ppm"])
def test_the_same_picture_in_other_clothes(name: str) -> None:
    plain, other = (np.asarray(decoded(MEDIA / n), dtype=float) for n in ("rgb.png", name))
    assert plain.std() > 20
    assert np.abs(plain - other).mean() < 25


@pytest.mark.parametrize("name", ["sixteen.png", "float.tiff"])
def test_many_bits_are_scaled_not_clipped(name: str) -> None:
    """Both hold the ramp of the red channel of rgb.png."""
    ramp = np.asarray(Image.open(MEDIA / "rgb.png"))[..., 0]
    grey = np.asarray(decoded(MEDIA / name, "L"), dtype=int)
    assert ramp.min() < 30
    assert ramp.max() > 150
    assert np.abs(grey - ramp).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, 30_000), (60_000, 2)])
def test_bombs_are_refused_before_they_grow(width: int, height: int) -> None:
    before = peak()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableSample, match=r"image 7 .*(pixels|limit|too)"):
            decoded(png(width, height))
    assert peak() - before < 150 << 20


def test_the_largest_picture_is_read() -> None:
    side = int(data.MAX_PIXELS**0.5 / 3)
    assert decoded(png(side, side), "L").size == (side, side)


@pytest.mark.parametrize("part", [0, 1, 8, 40, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.gif", "rgb.webp", "lzw.tiff"])
def test_truncated_pictures(name: str, part: float) -> None:
    whole = (MEDIA / name).read_bytes()
    cut = whole[: part if isinstance(part, int) else int(part * len(whole))]
    try:  # a GIF or WebP can do without its end
        told, size = "", decoded(cut).size
    except UnreadableSample as error:
        told, size = str(error), (13, 9)
    assert not told or told.startswith("image 7 (stored in the data): expected a readable image, found")
    assert size == (13, 9)
    with pytest.raises(UnreadableSample):
        decoded(whole[:20])


def test_formats_that_run_programs_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", no)
    monkeypatch.setattr("subprocess.Popen", no)
    picture = io.BytesIO()
    Image.open(MEDIA / "rgb.png").save(picture, "EPS")
    with pytest.raises(UnreadableSample, match="cannot identify"):
        decoded(picture.getvalue())


@pytest.mark.parametrize("stored", [None, {"bytes": b"", "path": None}, {"bytes": None, "path": "/nowhere/x.png"}])
def test_no_picture_at_all(stored: Any) -> None:
    with pytest.raises(UnreadableSample, match="image 7"):
        decode_image(stored, "RGB", "image 7")


# --- left out -------------------------------------------------------------------------------------------------


def broken_folder(root: Path, numbers: tuple[int, ...], split: str = "train") -> Path:
    folder = image_folder(root, {"train": 40, "test": 20})
    for number in numbers:
        path = folder / split / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    return folder


def test_unreadable_images_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = broken_folder(tmp_path / "data", (3, 17))
    (folder / "test" / "5.png").write_bytes(b"no picture")
    with caplog.at_level("WARNING", logger="acmize"):
        made = converted(data=str(folder))
    assert made.results["samples"] == 19
    told = made.results["left_out"]
    assert len(told) == 3
    assert all(any(name in line for line in told) for name in ("train/3.png", "train/17.png", "test/5.png"))
    assert caplog.text.count("left out (") == 3  # each once, in however many phases and epochs it is met


def test_too_many_are_an_error(tmp_path: Path, run_command: Any) -> None:
    folder = broken_folder(tmp_path / "data", (3, 17, 20))
    options = config_file(tmp_path / "recipe.yaml", {"phases": []})
    words = ["convert", "acmize_vit_digits", "--data", folder, "--config", options, "-o", tmp_path / "out"]
    status, said = run_command(*words, "--max-corrupt", 2)
    assert status == 2
    assert "found 3 unreadable samples, expected 2 at most" in said.err
    assert not (tmp_path / "out").exists()
    assert run_command(*words, "--max-corrupt", 3)[0] in (0, 1)


def image_set(contents: list[bytes], **options: Any) -> ImageSet:
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": list(range(len(contents)))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    transform: Any = create_transform((3, 8, 8), is_training=False)
    return ImageSet(datasets.Dataset.from_dict(rows, features=features), transform, **options)


@pytest.fixture
def good() -> bytes:
    return (MEDIA / "rgb.png").read_bytes()


def test_batches_without_the_unreadable(good: bytes) -> None:
    images = image_set([good, b"bad", good, b"bad", b"bad", good], unreadable=Unreadable(4))
    assert [labels.tolist() for _, labels in loader(images, 2)] == [[0], [2], [5]]
    assert len(images.unreadable.found) == 3
    kept: Any = cached(images)
    assert kept.labels_N.tolist() == [0, 2, 5]
    assert len(images.unreadable.found) == 3
    with pytest.raises(UnreadableSample):
        images[1]


def test_a_batch_is_never_empty(good: bytes) -> None:
    """Training counts batches: one without a readable image takes the next of the data."""
    images = image_set([b"bad", b"bad", b"bad", good])
    assert [labels.tolist() for _, labels in loader(images, 2)] == [[3], [3]]
    with pytest.raises(AcmizeError, match="no readable sample among 2"):
        list(loader(image_set([b"bad", b"bad"]), 1))


def test_the_count_is_of_samples_not_of_meetings() -> None:
    counted = Unreadable(1)
    for _ in range(3):
        counted.note("a", UnreadableSample("a is broken"))
    with pytest.raises(AcmizeError, match=r"b is broken .found 2 unreadable samples, expected 1"):
        counted.note("b", UnreadableSample("b is broken"))
    assert unreadable.LIMIT > 1


# --- columns that are not there -------------------------------------------------------------------------------


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", labels=False)
    made = converted({"phases": []}, data=str(folder))
    assert {row["accuracy"] for row in made.results["results"]} == {None}
    with pytest.raises(AcmizeError, match="found no labels"):
        converted({"losses": {"task": 1.0, "teacher": 0.0, "features": 0.0}}, data=str(folder))


# --- recordings -----------------------------------------------------------------------------------------------


def wav(samples: np.ndarray, rate: int = 16_000, kind: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=kind)
    return file.getvalue()


def tone(count: int = 1600, rate: int = 16_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)).astype(np.float32)


@pytest.mark.parametrize("name", RECORDINGS)
def test_odd_recordings_are_read(name: str) -> None:
    wave = heard(MEDIA / name)
    info = soundfile.info(MEDIA / name)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(info.frames * 16_000 / info.samplerate, abs=2)
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() > 0.1 or name == "stereo.wav"  # whose channels cancel


def test_channels_are_averaged_and_rates_met() -> None:
    one = tone()
    both = np.stack([one, 0.5 * one], 1)
    np.testing.assert_allclose(heard(wav(both)), 0.75 * one, atol=1e-6)
    other = heard(wav(tone(800, 8_000), 8_000))
    assert len(other) == 1600
    np.testing.assert_allclose(other[200:-200], one[200:-200], atol=0.01)
    long = np.tile(one, 2000)  # several blocks
    assert len(long) > 1 << 20
    np.testing.assert_array_equal(heard(wav(long)), long)


def flac_promising(samples: int) -> bytes:
    """A FLAC file whose header promises any number of samples."""
    content = bytearray((MEDIA / "mono.flac").read_bytes())
    place = content.index(b"fLaC") + 8 + 10  # behind sizes of blocks and frames: rate, channels, bits, samples
    kept = int.from_bytes(content[place : place + 8], "big") >> 36 << 36
    content[place : place + 8] = (kept | samples).to_bytes(8, "big")
    return bytes(content)


def hostile() -> Iterator[tuple[str, bytes, str]]:
    yield "empty", wav(tone(0)), "no samples"
    yield "no bytes", b"", "found"
    yield "text", b"not a recording", "found"
    yield "nan", wav(np.where(np.arange(100) == 50, np.nan, tone(100)).astype(np.float32)), "no numbers"
    yield "inf", wav(np.full(10, np.inf, np.float32)), "no numbers"
    yield "slow", wav(tone(100), 1), "a rate of 1 Hz"
    yield "fast", wav(tone(100), 2_000_000), "a rate of 2000000 Hz"
    yield "cut", (MEDIA / "mono.flac").read_bytes()[:50], "found"


@pytest.mark.parametrize(("content", "told"), [pytest.param(c, t, id=n) for n, c, t in hostile()])
def test_hostile_recordings(content: bytes, told: str) -> None:
    with pytest.raises(UnreadableSample, match=rf"recording 7 \(stored in the data\): .*{told}"):
        heard(content)


@pytest.mark.parametrize("samples", [1 << 20, (1 << 36) - 1])
def test_a_header_that_promises_too_much(samples: int) -> None:
    before = peak()
    try:
        assert len(heard(flac_promising(samples))) <= 1 << 20
    except UnreadableSample:
        pass
    assert peak() - before < 100 << 20


def test_a_recording_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MAX_SAMPLES", 4000)
    assert len(heard(wav(tone(4000)))) == 4000
    with pytest.raises(UnreadableSample, match="more than 4000 samples"):
        heard(wav(tone(4001)))
    with pytest.raises(UnreadableSample, match="more than 2000 samples"):
        heard(wav(np.stack([tone(2001)] * 2, 1)))
    with pytest.raises(UnreadableSample, match="more than 2000 samples"):
        heard(wav(tone(2001, 8_000), 8_000))  # twice as many at the model's rate


def recordings(root: Path, table: bytes | None = None, name: str = "metadata.csv") -> Path:
    root.mkdir(parents=True)
    for number in range(4):
        (root / f"{number}.wav").write_bytes(wav(tone()) if number != 2 else b"RIFF....")
    if table is not None:
        (root / name).write_bytes(table)
    return root


def test_unreadable_recordings_are_left_out(tmp_path: Path) -> None:
    splits = open_audio(recordings(tmp_path / "a"))
    counted = Unreadable(2)
    heard_set = splits.audio(splits.split("train"), "train", 16_000, counted)
    assert heard_set.seconds() == [0.1, 0.1, 0.0, 0.1]
    assert [u.key[1] for u in heard_set.some([1, 2, 3])] == [1, 3]
    assert [u.key[1] for u in heard_set.some([2])] == [3]
    assert [u.key[1] for u in heard_set] == [0, 1, 3]
    assert [*counted.found] == [("train", 2)]
    joined = audio.JoinedAudio(heard_set, heard_set)
    assert [u.key for u in joined.some([1, 6])] == [("train", 1)]
    assert [*counted.found] == [("train", 2)]


@pytest.mark.parametrize(
    ("name", "table", "told"),
    [
        ("metadata.csv", b"file,text\n0.wav,hello\n", "found the columns file, text, expected file_name"),
        ("metadata.csv", b"file_name,text\n../../etc/passwd,hello\n", "which is no file in"),
        ("metadata.csv", b"file_name,text\n0.wav,a,b,c\n", "cannot be read"),
        ("metadata.csv", b"file_name\n\xff\xfe\n", "cannot be read"),
        ("metadata.csv", b'file_name\n"0.wav\n', "cannot be read"),
        ("metadata.jsonl", b'{"file_name": "0.wav"}\n[1]\n', "cannot be read"),
        ("metadata.jsonl", b'{"file_name": "0.wav"}\n{"text": "a"}\n', "expected file_name"),
        ("metadata.jsonl", b"[" * 100_000, "cannot be read"),
        ("metadata.jsonl", b'{"file_name": "a\\u0000b"}\n', "which is no file in"),
        ("metadata.jsonl", b'{"file_name": "' + b"x" * 5000 + b'"}\n', "which is no file in"),
    ],
)
def test_tables_that_are_damaged_or_lead_elsewhere(tmp_path: Path, name: str, table: bytes, told: str) -> None:
    with pytest.raises(AcmizeError, match=told):
        open_audio(recordings(tmp_path / "a", table, name))


def test_transcripts_that_are_not_there(tmp_path: Path) -> None:
    numbers = open_audio(recordings(tmp_path / "a", b'{"file_name": "0.wav", "text": 3}\n', "metadata.jsonl"))
    assert not numbers.audio(numbers.split("train"), "train", 16_000).has_transcripts
    none = open_audio(recordings(tmp_path / "b", b"file_name\n0.wav\n"))
    assert not none.audio(none.split("train"), "train", 16_000).has_transcripts
    data = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a", "b"]}))
    splits = open_audio(data)
    with pytest.raises(AcmizeError, match="found the columns text, expected one with audio"):
        splits.audio(splits.split("train"), "train", 16_000)
