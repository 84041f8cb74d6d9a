"""Properties of what reads untrusted files, over inputs that hypothesis makes up; and artefacts of earlier releases."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import acmize
from acmize.checkpoint import load_tensors, read_json, save_tensors, write_json
from acmize.data import decode_image
from acmize.errors import HALF, AcmizeError, UnreadableSample
from acmize.phases.calibrate import Calibration
from acmize.plan import Plan
from acmize.saved import read_saved
from acmize.unreadable import Unreadable

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
sys.path.insert(0, str(ROOT / "bench"))

import fuzz  # noqa: E402 - of bench/

quick = settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@quick
@given(JSON)
def test_json_comes_back(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@quick
@given(st.binary(max_size=200), st.sampled_from([read_json, load_tensors]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, read: Callable[[Path], Any]) -> None:
    (tmp_path / "a").write_bytes(content)
    try:
        read(tmp_path / "a")
        told = str(tmp_path)
    except AcmizeError as error:
        told = str(error)
    assert str(tmp_path) in told
    assert len(told) <= 2 * HALF + 5


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "[NaN]", "[1e999]", "[-Infinity]", "[" * 100_000, '["\\ud800"]', "1" * 5000, "\ufeff{}"],
    ids=lambda text: text[:12],
)
def test_json_that_readers_would_take_differently(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(AcmizeError, match="expected a whole JSON file"):
        read_json(tmp_path / "a.json")


def test_json_of_a_size_that_no_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acmize.checkpoint.MAX_JSON", 100)
    (tmp_path / "a.json").write_text("1" + " " * 99)
    assert read_json(tmp_path / "a.json") == 1
    (tmp_path / "a.json").write_text("1" + " " * 100)
    with pytest.raises(AcmizeError, match="101 bytes, more than 100"):
        read_json(tmp_path / "a.json")
    with pytest.raises(AcmizeError, match="a folder or a device"):
        read_json(tmp_path)


@quick
@given(st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 3), max_size=3)))
def test_tensors_come_back(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    kept = {name: torch.rand(shape) for name, shape in shapes.items()}
    save_tensors(tmp_path / "a.safetensors", kept)
    found = load_tensors(tmp_path / "a.safetensors")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads((CORPUS / "schema1" / "plan.json").read_text())["plan"]


@quick
@given(st.floats(0.01, 1.0), st.integers(2, 300), st.integers(1, 12), st.floats(0, 2), st.floats(0, 2))
def test_merging_never_takes_more_than_there_is(
    stored: dict[str, Any], budget: float, tokens: int, every: int, slope: float, start: float
) -> None:
    merging = {**stored["merging"], "tokens": tokens, "prefix": 1, "every": every, "slope": slope, "start": start}
    plan = Plan.from_dict({**stored, "merging": merging})
    assert plan.merging is not None
    left = tokens - 1
    for pairs in plan.schedule(budget):
        assert 0 <= pairs <= left // 2
        left -= pairs


@quick
@given(st.randoms(use_true_random=False))
def test_a_mutated_plan_is_sound_or_refused(stored: dict[str, Any], draw: random.Random) -> None:
    """What is accepted can be asked for its budgets and comes back from its own dictionary."""
    try:
        plan = Plan.from_dict(fuzz.changed(json.loads(json.dumps(stored)), draw))
    except AcmizeError:
        return
    low, high = plan.budget_range
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert Plan.from_dict(plan.to_dict()) == plan


@quick
@given(st.dictionaries(st.floats(0.01, 1.5), st.floats(0, 1), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_the_dial_stays_between_its_rows(rows: dict[float, float], budget: float) -> None:
    budgets = tuple(sorted(rows, reverse=True))
    table = Calibration(budgets=budgets, dials=tuple(rows[b] for b in budgets))
    assert min(rows.values()) - 1e-9 <= table.dial(budget) <= max(rows.values()) + 1e-9
    assert table.dial(budgets[0]) == rows[budgets[0]]


@quick
@given(st.randoms(use_true_random=False), st.sampled_from(["rgb.png", "cmyk.jpg", "lzw.tiff", "moving.gif"]))
def test_a_mutated_picture_is_a_picture_or_refused(draw: random.Random, name: str) -> None:
    content = fuzz.damaged((CORPUS / "media" / name).read_bytes(), draw)
    try:
        image = decode_image({"bytes": content, "path": None}, "RGB", "image 0")
    except UnreadableSample:
        return
    assert image.mode == "RGB"
    assert min(image.size) >= 1


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_what_is_left_out(good: list[bool], data: st.DataObject) -> None:
    """The readable ones in their order; where there is none, another one; and each unreadable one is counted once."""
    indices = data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=8))
    counted = Unreadable(len(good))

    def get(index: int) -> int:
        if not good[index]:
            raise UnreadableSample(f"{index} is broken")
        return index

    if not any(good):
        with pytest.raises(AcmizeError, match="no readable sample"):
            counted.read(get, indices, len(good), lambda index: index)
        return
    found = counted.read(get, indices, len(good), lambda index: index)
    readable = [index for index in indices if good[index]]
    assert found == readable if readable else len(found) == 1 and good[found[0]]
    assert {index for index in indices if not good[index]} <= {*counted.found}
    assert not any(good[index] for index in counted.found)  # pyright: ignore


# --- artefacts of earlier releases ----------------------------------------------------------------------------


def test_schema_1_loads_for_ever() -> None:
    """A model that acmize 0.1.0 saved, with the outputs it then gave."""
    model = acmize.from_pretrained(CORPUS / "schema1")
    kept = load_file(CORPUS / "schema1.safetensors")
    assert model.budget == 0.6
    outputs = []
    for budget in (0.75, 0.6):
        model.set_budget(budget)
        with torch.no_grad():
            outputs.append(model(kept["x"]))
        torch.testing.assert_close(outputs[-1], kept[f"at {budget}"], atol=1e-5, rtol=1e-4)
    assert not torch.equal(*outputs)
    assert read_saved(CORPUS / "schema1").results["samples"] == 8


def test_saved_again_it_is_read_alike(tmp_path: Path) -> None:
    model = acmize.from_pretrained(CORPUS / "schema1")
    model.save_pretrained(tmp_path / "again")
    one, two = read_saved(CORPUS / "schema1"), read_saved(tmp_path / "again")
    assert (one.plan, one.calibration, one.base, one.results) == (two.plan, two.calibration, two.base, two.results)


def test_the_corpus_stays_small() -> None:
    assert sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file()) < 150_000
    assert sum(p.stat().st_size for p in (CORPUS / "schema1").iterdir()) < 100_000
