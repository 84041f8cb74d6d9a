"""Phase 3: every loss term, what reaches the gates, which budgets are drawn, what stays as it was."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from short import converted
from torch import Tensor

from acmize.batches import mixup
from acmize.gates import gates_of, set_dial
from acmize.losses import diversity_loss, entropy_loss, teacher_loss
from acmize.models import load_model
from acmize.phases._loop import FitConfig
from acmize.phases.finetune import FinetuneConfig, drawn_budget, features_and_logits, finetune
from acmize.quickstart_model import digits
from acmize.recording import record

TERMS = {"loss", "teacher", "task", "features", "budget", "diversity", "entropy", "compute", "asked"}
CONFIG = FitConfig(epochs=1, lr=1e-3, log_every=1)


@pytest.fixture(scope="module")
def start() -> Any:
    return converted({"phases": [], "gates": {"steps": 60}})


@pytest.fixture
def model(start: Any) -> Any:
    return copy.deepcopy(start)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_model("acmize_vit_digits")


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits("train")
    return [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]


def run(model: Any, teacher: Any, batches: Any, losses: FinetuneConfig | None = None, **options: Any) -> list[dict]:
    history = finetune(
        model, teacher, model.plan, model.calibration, lambda epoch: batches, steps_per_epoch=len(batches),
        losses=losses or FinetuneConfig(), config=options.pop("config", CONFIG), **options,
    )  # fmt: skip
    return history.logs


def only(**weights: float) -> FinetuneConfig:
    none = dict.fromkeys(("task", "teacher", "features", "budget", "entropy", "diversity"), 0.0)
    return FinetuneConfig(**{**none, **weights})


def test_every_term_is_there_and_finite(model: Any, teacher: Any, batches: Any) -> None:
    logs = run(model, teacher, batches)
    assert len(logs) == 4
    for terms in logs:
        assert terms.keys() == TERMS
        assert all(torch.isfinite(torch.tensor(v)) for v in terms.values())
        assert terms["teacher"] > 0
        assert terms["task"] > 0
        assert terms["features"] > 0
        assert terms["entropy"] <= 0
        assert terms["diversity"] <= 0
        assert abs(terms["compute"] - terms["asked"]) == pytest.approx(terms["budget"], abs=1e-5)
    assert not model.training


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_temperature_is_that_of_both(
    model: Any, teacher: Any, batches: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The term is the KL of the softened answers, times the square of the temperature."""
    answers: list[Tensor] = []

    def spy(*args: Any) -> Any:
        features, logits = features_and_logits(*args)
        answers.append(logits.detach() / temperature)
        return features, logits

    monkeypatch.setattr("acmize.phases.finetune.features_and_logits", spy)
    logs = run(model, teacher, batches[:1], FinetuneConfig(temperature=temperature))
    dense, adaptive = (a.log_softmax(-1) for a in answers)
    expected = (dense.exp() * (dense - adaptive)).sum(-1).mean() * temperature**2
    assert logs[0]["teacher"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_is_not_changed(model: Any, teacher: Any, batches: Any) -> None:
    before = copy.deepcopy(teacher.state_dict())
    run(model, teacher, batches)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("term", ["task", "teacher", "features", "budget", "entropy", "diversity"])
def test_each_term_alone_moves_the_gates(model: Any, teacher: Any, batches: Any, term: str) -> None:
    before = [copy.deepcopy(g.state_dict()) for g in gates_of(model)]
    run(model, teacher, batches[:1], only(**{term: 1.0}), config=FitConfig(epochs=1, lr=1e-2, log_every=1))
    after = [g.state_dict() for g in gates_of(model)]
    moved = [not torch.equal(a["fc2.weight"], b["fc2.weight"]) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > len(moved) // 2


def test_weights_of_zero_leave_a_term_out(model: Any, teacher: Any, batches: Any) -> None:
    logs = run(model, teacher, batches, only(task=2.0))
    assert all(terms["loss"] == pytest.approx(2 * terms["task"]) for terms in logs)


def test_dropout_is_off_since_its_noise_would_be_learnt_against(model: Any, teacher: Any, batches: Any) -> None:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    x = batches[0][0]
    with torch.no_grad():
        assert not torch.allclose(twin.train()(x), twin(x))
    plain, dropping = (run(m, teacher, batches)[0] for m in (model, twin))
    assert dropping == plain
    assert {m.p for m in twin.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}  # afterwards as it was


def test_the_hard_forward_of_training_is_that_of_evaluation(model: Any, batches: Any) -> None:
    set_dial(model, model.calibration.dial(0.6))
    images = batches[0][0]
    with torch.no_grad():
        model.eval()
        still = model(images)
        model.train()
        for gate in gates_of(model):
            gate.temperature = getattr(gate, "temperature", 1.0)
        with record(model, len(images)):
            moving = model(images)
    assert (still - moving).abs().max() < 1e-4


def test_budgets_drawn_cover_the_range() -> None:
    drawn = sorted(drawn_budget((0.4, 0.9), 0, step) for step in range(20))
    assert 0.4 <= drawn[0] < 0.43
    assert 0.87 < drawn[-1] <= 0.9
    assert max(b - a for a, b in pairwise(drawn)) < 0.06
    assert {drawn_budget((0.5, 0.5), 3, step) for step in range(5)} == {0.5}


def test_labels_may_be_unknown(model: Any, teacher: Any, batches: Any) -> None:
    blind = [(x, torch.full_like(y, -1)) for x, y in batches]
    assert all(terms["task"] == 0 and terms["teacher"] > 0 for terms in run(model, teacher, blind))
    some = [(x, torch.where(torch.arange(len(y)) % 2 == 0, y, -1)) for x, y in batches]
    assert all(terms["task"] > 0 for terms in run(model, teacher, some))


@pytest.mark.parametrize("labelled", [True, False])
def test_mixup(model: Any, teacher: Any, batches: Any, labelled: bool) -> None:
    mix = mixup(10, mixup_alpha=0.8, cutmix_alpha=1.0, seed=0)
    given = batches if labelled else [(x, torch.full_like(y, -1)) for x, y in batches]
    logs = run(model, teacher, given, mix=mix)
    assert all((terms["task"] > 0) is labelled for terms in logs)


def test_a_model_without_separate_features() -> None:
    plain = torch.nn.Linear(3, 2)
    features, logits = features_and_logits(plain, torch.ones(4, 3))
    assert features is None
    assert logits.shape == (4, 2)


def test_the_losses_on_values_worked_by_hand() -> None:
    assert diversity_loss(torch.tensor([0.2, 0.6])).item() == pytest.approx(-0.2)
    even = torch.full((1, 4, 2), 0.5)
    assert entropy_loss([even]).item() == pytest.approx(-1)
    one = torch.tensor([[[1.0, 0.0]] * 4])
    assert entropy_loss([one]).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(5, 3)
    assert teacher_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert teacher_loss(logits, logits + 1).item() == pytest.approx(0, abs=1e-6)
    assert teacher_loss(logits, -logits).item() > 0


@pytest.mark.parametrize(
    "options", [{"task": -1.0}, {"budgets": (0.0, 0.5)}, {"budgets": (0.6, 0.5)}, {"budgets": (0.5, 1.1)}]
)
def test_weights_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        FinetuneConfig(**options)
