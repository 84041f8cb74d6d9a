"""How far to go from the weights before training: both ends and the way between, the least score chosen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from short import converted
from torch import nn

from acmize import stages
from acmize.evaluate import KL_FLOOR, evaluate, mean_error, reference
from acmize.images import Images
from acmize.losses import teacher_loss
from acmize.models import load_model
from acmize.phases.calibrate import set_budget
from acmize.phases.interpolate import interpolate_
from acmize.quickstart_model import digits_dataset
from acmize.recipe import resolve


class Scalar(nn.Module):
    """One weight and one buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.register_buffer("kept", torch.tensor(7.0))


@pytest.mark.parametrize(("wanted", "share"), [(3.0, 1.0), (2.5, 0.75), (2.1, 0.5), (1.4, 0.25), (0.0, 0.0)])
def test_the_share_of_least_score_is_left(wanted: float, share: float) -> None:
    model = Scalar(3.0)
    found = interpolate_(model, {"weight": torch.tensor(1.0)}, lambda: abs(model.weight.item() - wanted))
    assert next(iter(found)) == share
    assert found[share] == min(found.values())
    assert len(found) == 5
    assert model.weight.item() == pytest.approx(1 + 2 * share)
    assert model.kept == 7


def test_training_that_changed_nothing_for_the_better_is_kept_whole() -> None:
    model = Scalar(3.0)
    found = interpolate_(model, {"weight": torch.tensor(1.0)}, lambda: 0.0)
    assert next(iter(found)) == 1.0
    assert model.weight == 3


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": []})


@pytest.mark.parametrize("labelled", [True, False])
def test_the_score_is_the_error_rate_or_without_labels_the_divergence(model: Any, labelled: bool) -> None:
    dense = load_model("acmize_vit_digits")
    images = Images(digits_dataset(), dense, resolve({"limit": 60, "batch_size": 4}))
    batches = [(x, y if labelled else torch.full_like(y, -1)) for x, y in images.labelled(images.held)]
    batches[0][1][:1] = -1  # one label unknown
    answers, budgets = reference(dense, batches), model.calibration.budgets
    found = mean_error(evaluate(model, model.plan, model.calibration, batches, answers, budgets)["results"])
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert len(inputs) % 4  # a last batch smaller than the others weighs less
    expected = []
    with torch.no_grad():
        for budget in model.calibration.budgets:
            set_budget(model, model.plan, model.calibration, budget)
            logits = model(inputs)
            wrong = (logits.argmax(-1) != labels)[labels >= 0].double().mean()
            expected.append((wrong if labelled else teacher_loss(logits, dense(inputs))).item())
    if not labelled:
        expected = [math.log(kl + KL_FLOOR) for kl in expected]
    mean = sum(expected) / len(expected)
    assert found == pytest.approx(mean if labelled else math.exp(mean) - KL_FLOOR, rel=1e-4)
    assert found > 0


def test_a_budget_out_of_reach_does_not_decide_alone() -> None:
    before = [{"kl": 0.5, "accuracy": None}, {"kl": 0.1, "accuracy": None}, {"kl": 20.0, "accuracy": None}]
    after = [{"kl": 0.1, "accuracy": None}, {"kl": 0.02, "accuracy": None}, {"kl": 22.0, "accuracy": None}]
    assert mean_error(after) < mean_error(before)
    assert mean_error([{"kl": 0.0, "accuracy": None}]) == pytest.approx(0.0)


def test_training_ruined_by_its_rate_is_left_behind() -> None:
    options = {"phases": ["gates", "finetune"], "train": {"lr": 1.0}}
    ruined = converted(options, {"train": {"lr": 1.0, "interpolate": False}})
    kept = converted(options)
    scores = kept.recipe["interpolated"]
    assert next(iter(scores)) != "1"
    assert scores["1"] > 2 * min(scores.values())
    assert "interpolated" not in ruined.recipe
    at = [[row["kl"] for row in m.results["results"]] for m in (kept, ruined)]
    assert max(at[0]) < min(at[1])


def test_the_share_is_chosen_at_budgets_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    real = stages.evaluate

    def evaluate(*args: Any) -> Any:
        asked.append(list(args[5]))
        return real(*args)

    monkeypatch.setattr(stages, "evaluate", evaluate)
    converted({"phases": ["finetune"], "budget": 0.7, "budgets": (0.9, 0.8, 0.65, 0.6)})
    *scores, last = asked
    assert len(scores) == 5
    assert all(budgets == [0.9, 0.7, 0.6] for budgets in scores)
    assert last == [0.9, 0.8, 0.7, 0.65, 0.6]
