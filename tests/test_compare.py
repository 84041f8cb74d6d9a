"""The comparison: equal MACs, one set of images, and a loss that is said to be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest
from short import MODEL, converted, image_folder, refused
from torch import Tensor, nn

import acmize
from acmize import compare
from acmize.api import evaluate_saved
from acmize.compare import Contestant, compare_saved, verdicts_of
from acmize.errors import AcmizeError
from acmize.gates import gates_of
from acmize.hub import save_pretrained
from acmize.quickstart_model import digits_dataset
from acmize.timing import Setting

PACKAGED = Path(acmize.__file__).parent / "assets" / "vit_digits.safetensors"
QUICK: dict[str, Any] = {"batch_sizes": (1, 2), "setting": Setting(repeats=1), "limit": 40}


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": [], "merge": "auto"})


@pytest.fixture(scope="module")
def found(model: Any) -> dict[str, Any]:
    return compare_saved(model, digits_dataset(), weights=PACKAGED, against={MODEL: PACKAGED}, **QUICK)


def rows(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["model"] == name]


def test_all_rivals_at_equal_macs(found: dict[str, Any]) -> None:
    names = [row["model"] for row in found["rows"]]
    assert names == ["dense", *["adaptive", "token merging", "masks alone", "static width"] * 2, MODEL]
    adaptive = rows(found, "adaptive")
    assert [row["budget"] for row in adaptive] == [0.75, 0.6]
    for name in ("token merging", "static width"):
        for mine, rival in zip(adaptive, rows(found, name), strict=True):
            assert rival["budget"] == mine["budget"]
            assert rival["macs_ratio"] == pytest.approx(mine["macs_ratio"], abs=0.02)
            assert rival["agreement"] != mine["agreement"] or rival["macs_ratio"] != mine["macs_ratio"]
    assert all([time["batch_size"] for time in row["latency"]] == [1, 2] for row in found["rows"])
    assert all(time["p50"] > 0 for row in found["rows"] for time in row["latency"])


def test_masks_alone_answer_alike_and_save_nothing(found: dict[str, Any]) -> None:
    for mine, masked in zip(rows(found, "adaptive"), rows(found, "masks alone"), strict=True):
        assert (masked["accuracy"], masked["agreement"]) == (mine["accuracy"], mine["agreement"])
        assert mine["macs_ratio"] + 0.05 < masked["macs_ratio"] < 1.05


def test_the_figures_are_those_of_eval(found: dict[str, Any], model: Any) -> None:
    again = evaluate_saved(model, digits_dataset(), [0.75, 0.6], weights=PACKAGED, limit=40)
    for mine, row in zip(rows(found, "adaptive"), again["results"], strict=True):
        for key in ("macs_ratio", "accuracy", "agreement"):
            assert mine[key] == row[key], key
    assert rows(found, "dense")[0]["accuracy"] == again["dense"]["accuracy"]
    assert rows(found, "dense")[0]["agreement"] == 1


def test_another_model_is_run_as_itself(found: dict[str, Any]) -> None:
    """The dense model once more, by name: the same answers at the same MACs."""
    (other,), (dense,) = rows(found, MODEL), rows(found, "dense")
    for key in ("accuracy", "agreement", "macs_ratio"):
        assert other[key] == pytest.approx(dense[key])


def test_the_model_stays_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TIMED", 3)  # time is measured on fewer images than accuracy
    model.set_budget(0.65)
    before = [(float(g.dial), g.choose) for g in gates_of(model)]
    compare_saved(model, digits_dataset(), weights=PACKAGED, budgets=[0.7], **QUICK)
    assert [(float(g.dial), g.choose) for g in gates_of(model)] == before
    assert model.budget == 0.65


def test_a_model_that_merges_tokens_alone_has_no_static_rival() -> None:
    model = converted({"phases": [], "merge": "auto", "exclude": ["*"]})
    found = compare_saved(model, digits_dataset(), weights=PACKAGED, budgets=[0.7], **QUICK)
    assert [row["model"] for row in found["rows"]] == ["dense", "adaptive", "token merging"]
    assert "static width: this conversion merges tokens and has no sites to cut" in found["left_out"]
    assert rows(found, "adaptive")[0]["macs_ratio"] < 0.75


def test_twins_share_parameters_alone(model: Any) -> None:
    twin = compare._twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    model.set_budget(0.75)
    twin.set_budget(0.6)
    assert [float(g.price) for g in gates_of(model)] != [float(g.price) for g in gates_of(twin)]


# --- verdicts -------------------------------------------------------------------------------------------------

LABELS = torch.arange(100)


def contestant(name: str, right: Tensor, macs: float, ms: float, budget: float | None = 0.5) -> Contestant:
    """A model that has the images right that `right` says."""
    guess = torch.where(right, LABELS, -1 - LABELS)
    row = {"model": name, "budget": budget, "macs_ratio": macs, "accuracy": right.double().mean().item()}
    row |= {"agreement": 0.9, "latency": [{"batch_size": 1, "p50": ms}]}
    return Contestant(name=name, module=nn.Identity(), guess=guess, row=row, images=None)


def first(count: int) -> Tensor:
    return LABELS < count


def test_a_loss_at_equal_macs_is_said() -> None:
    adaptive, rival = contestant("adaptive", first(80), 0.5, 1.0), contestant("merging", LABELS >= 12, 0.505, 2.0)
    (line,) = verdicts_of([adaptive, rival], LABELS)
    p = binomtest(12, 12 + 20, 0.5).pvalue
    assert line.startswith("budget 0.5: loses to merging at 0.505 of the MACs: 80.0 against 88.0 % accuracy")
    assert f"p = {p:.2f}" in line


def test_more_macs_are_no_rival_and_another_budget_neither() -> None:
    adaptive = contestant("adaptive", first(80), 0.5, 1.0)
    dear = contestant("dense", first(90), 1.0, 2.0, None)
    other = contestant("merging", first(90), 0.5, 0.5, 0.6)
    (line,) = verdicts_of([adaptive, dear, other], LABELS)
    assert line.startswith("no rival here wins")


def test_a_loss_in_time_is_said() -> None:
    adaptive = contestant("adaptive", first(80), 0.5, 3.0)
    dense, worse = contestant("dense", first(80), 1.0, 2.0, None), contestant("static", first(79), 0.5, 1.0)
    (line,) = verdicts_of([adaptive, dense, worse], LABELS)
    assert line == "budget 0.5: slower than dense, which is no less accurate: 3.0 against 2.0 ms a batch of 1"


def test_without_labels_agreement_decides() -> None:
    adaptive, rival = contestant("adaptive", first(80), 0.5, 1.0), contestant("merging", first(80), 0.5, 2.0)
    for row in (adaptive.row, rival.row):
        row["accuracy"] = None
    rival.row["agreement"] = 0.95
    (line,) = verdicts_of([adaptive, rival], LABELS)
    assert "90.0 against 95.0 % agreement" in line
    assert "McNemar" not in line


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 3), (1, 9), (20, 12)])
def test_mcnemar(a: int, b: int) -> None:
    only_a, only_b = first(a), (LABELS >= 50) & (LABELS < 50 + b)
    one, two = (torch.where(right, LABELS, -1) for right in (only_a, only_b))
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert compare._chance(one, two, LABELS) == pytest.approx(expected)


# --- what the user can mend, and the command ------------------------------------------------------------------


def test_what_cannot_be_compared(model: Any, tmp_path: Path) -> None:
    with pytest.raises(AcmizeError, match=r"weights: found none.*--weights FILE"):
        compare_saved(model, digits_dataset(), **QUICK)
    with pytest.raises(AcmizeError, match="batch_size: found 41, expected 1 to 40"):
        compare_saved(model, digits_dataset(), weights=PACKAGED, **{**QUICK, "batch_sizes": (41,)})
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(AcmizeError, match="found 1000 classes, expected 10"):
        compare_saved(
            model, digits_dataset(), weights=PACKAGED, budgets=[0.7], against={"test_vit": tmp_path / "w.safetensors"},
            **QUICK,
        )  # fmt: skip


def test_the_command(model: Any, run_command: Any, tmp_path: Path) -> None:
    saved = save_pretrained(model, tmp_path / "model")
    data = image_folder(tmp_path / "data", {"train": 2, "test": 12})
    words = ("compare", saved, "--data", data, "--weights", PACKAGED, "--no-compile", "--repeats", 1)
    status, captured = run_command(*words, "--budget", 0.7, "--batch-size", 2, "--save", "--json")
    assert status == 0
    assert json.loads(captured.out) == json.loads((saved / "comparison.json").read_text())
    status, captured = run_command(*words, "--budget", 0.7, "--batch-size", 2)
    for text in ("token merging", "static width", "ms, batch 2", "early exit"):
        assert text in captured.out
    status, captured = run_command(*words, "--against", "resnet18")
    assert status == 2
    assert "expected NAME=WEIGHTS" in refused(captured)
