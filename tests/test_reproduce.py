"""Reproduction: published numbers hold, or they do not and the command says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short import MODEL, OPTIONS, converted, image_folder, refused

import acmize
from acmize.environment import differences, environment
from acmize.errors import AcmizeError
from acmize.hub import from_pretrained, save_pretrained
from acmize.quickstart_model import digits_dataset
from acmize.reproduce import recipe_of, reproduce_saved, untrained

PACKAGED = Path(acmize.__file__).parent / "assets" / "vit_digits.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data"), {"train": 60, "test": 30})


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted with a limit and a seed of its own, so that the choice of samples has to be repeated."""
    model = converted({"phases": [], "limit": 20, "seed": 3}, data=str(data))
    return save_pretrained(model, tmp_path_factory.mktemp("reproduce") / "saved")


def figures(found: dict[str, Any]) -> list[tuple[Any, str]]:
    return [(row["budget"], row["figure"]) for row in found["rows"]]


def test_the_numbers_hold_to_the_last_bit(saved: Path) -> None:
    found = reproduce_saved(from_pretrained(saved), tolerance=0.0)
    assert found["ok"], found
    assert all(row["holds"] for row in found["rows"])
    assert figures(found)[0] == (None, "accuracy")
    assert set(figures(found)[1:]) == {(b, f) for b in (0.75, 0.6) for f in ("macs_ratio", "accuracy", "agreement")}
    assert (found["environment"], found["notes"]) == ([], [])


@pytest.mark.parametrize("figure", ["accuracy", "macs_ratio", "agreement"])
def test_a_number_that_was_made_better_does_not_hold(saved: Path, figure: str) -> None:
    model = from_pretrained(saved)
    model.results["results"][0][figure] += 0.02
    found = reproduce_saved(model)
    assert not found["ok"]
    assert [(r["budget"], r["figure"]) for r in found["rows"] if r["holds"] is False] == [(0.75, figure)]
    assert reproduce_saved(model, tolerance=0.03)["ok"]


def test_other_weights_do_not_hold(saved: Path) -> None:
    model = from_pretrained(saved)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    assert not reproduce_saved(model)["ok"]


def test_other_data_do_not_hold(saved: Path, tmp_path: Path) -> None:
    found = reproduce_saved(from_pretrained(saved), image_folder(tmp_path / "few", {"train": 9, "test": 7}))
    assert not found["ok"]
    assert any("published on 20 samples, found 7" in note for note in found["notes"])


def test_what_was_held_out_is_evaluated_where_there_is_no_test_split(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", {"train": 80})
    model = converted({"phases": [], "holdout": 0.5}, data=str(data))
    assert model.results["split"] == "held out of train"
    found = reproduce_saved(model, tolerance=0.0)
    assert found["ok"], found
    assert model.results["samples"] < 80


def test_a_trained_model_needs_the_dense_weights_for_some(data: Path) -> None:
    model = converted({"phases": ["distill"], "limit": 20}, data=str(data))
    assert not untrained(model)
    found = reproduce_saved(model)
    assert found["ok"]
    assert {row["figure"] for row in found["rows"] if row["holds"] is None} == {"agreement", "accuracy"}
    assert any("--weights" in note for note in found["notes"])
    found = reproduce_saved(model, weights=PACKAGED, tolerance=0.0)
    assert all(row["holds"] for row in found["rows"])


def test_converted_again(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    found = reproduce_saved(model, weights=PACKAGED, train=True, output=tmp_path / "again", tolerance=0.0)
    assert found["ok"], found
    assert found["notes"] == ["the new weights are bit for bit the published ones"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    model.recipe["seed"] = 4
    found = reproduce_saved(model, weights=PACKAGED, train=True, output=tmp_path / "other", tolerance=0.0)
    assert "the new weights differ" in found["notes"]


def test_the_recipe_comes_back_whole(saved: Path) -> None:
    stored = from_pretrained(saved)
    made = recipe_of(stored)
    assert made.seed == 3
    assert json.loads(json.dumps(made.to_dict())) == {k: v for k, v in stored.recipe.items() if k in made.to_dict()}
    assert made.config.num_learners == OPTIONS["acm"]["num_learners"]


def test_environments() -> None:
    here = environment()
    assert {"acmize", "torch", "timm", "python", "threads"} <= here.keys()
    assert differences(here, here) == []
    other = {**here, "torch": "1.0", "gone": "1"}
    assert differences(other, here) == [
        {"name": "torch", "published": "1.0", "here": here["torch"]},
        {"name": "gone", "published": "1", "here": None},
    ]


def test_what_cannot_be_reproduced(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    with pytest.raises(AcmizeError, match="--train: found no folder"):
        reproduce_saved(model, train=True)
    model.recipe = {}
    with pytest.raises(AcmizeError, match=r"recipe\.json: found no recipe"):
        reproduce_saved(model)
    given = converted({"phases": [], "limit": 20}, data=digits_dataset())
    with pytest.raises(AcmizeError, match=r"data: the recipe names none.*--data"):
        reproduce_saved(given)
    given.results = {}
    with pytest.raises(AcmizeError, match=r"results\.json: found no results"):
        reproduce_saved(given)


def test_the_command(saved: Path, run_command: Any, tmp_path: Path) -> None:
    status, captured = run_command("reproduce", saved, "--json")
    assert status == 0
    assert json.loads(captured.out)["ok"]
    status, captured = run_command("reproduce", saved)
    assert status == 0
    assert "macs_ratio" in captured.out
    model = from_pretrained(saved)
    model.results["results"][1]["accuracy"] -= 0.3
    model.results["environment"]["timm"] = "0.1"
    wrong = save_pretrained(model, tmp_path / "wrong")
    status, captured = run_command("reproduce", wrong)
    assert status == 1
    assert "NO" in captured.out
    assert "timm: published 0.1" in captured.out
    assert "do not hold" in captured.err
    status, captured = run_command("reproduce", wrong, "--train", "-o", tmp_path / "new", "--weights", tmp_path / MODEL)
    assert status == 2
    assert "--weights" in refused(captured)
