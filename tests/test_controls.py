"""Controls spend what they are asked to, and draw from what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from acmize.controls import by_name, gates_share, histograms, random_choice, static_width
from acmize.cost import count_macs
from acmize.evaluate import evaluate_at, reference
from acmize.gates import choosing, gates_of, set_dial
from acmize.hosts import example_input, make_plan
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.methods.token_merging import set_schedule
from acmize.models import load_model
from acmize.plan import Plan
from acmize.quickstart_model import digits
from acmize.recording import record

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4)


def build(merge: str = "none", **options: Any) -> tuple[Any, Any, Plan]:
    dense = load_model("acmize_vit_digits")
    plan = make_plan(dense, AcmConfig(gate_hidden=8, **options), merge=merge)
    return dense, convert_(load_model("acmize_vit_digits"), plan).eval(), plan


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    x, y = digits("test")
    return x[:24], y[:24]


@pytest.mark.parametrize("num_learners", [4, 8])
@pytest.mark.parametrize("merge", ["none", "auto"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_static_width_meets_the_budget(images: Any, budget: float, merge: str, num_learners: int) -> None:
    dense, model, plan = build(merge, num_learners=num_learners)
    set_schedule(model, plan.schedule(budget))
    row = evaluate_at(model, plan, [images], reference(dense, [images]), static_width(model, plan, budget))
    assert budget - 0.01 <= row["macs_ratio"] <= budget + 1e-6
    assert row["macs_ratio_std"] == pytest.approx(0, abs=1e-9)  # every sample alike


def test_static_width_gives_every_site_about_the_same_share() -> None:
    dense, model, plan = build()
    x, y = digits("test")
    batch = [(x[:4], y[:4])]
    row = evaluate_at(model, plan, batch, reference(dense, batch), static_width(model, plan, 0.6))
    shares = list(row["sites"].values())
    assert max(shares) - min(shares) <= 1 / 8 + 1e-6
    assert len(set(shares)) == 2  # the rest is spent on some sites


def test_static_width_at_full_budget_runs_everything(images: Any) -> None:
    dense, model, plan = build()
    row = evaluate_at(model, plan, [images], reference(dense, [images]), static_width(model, plan, 2.0))
    assert set(row["sites"].values()) == {1.0}
    assert row["macs_ratio"] == pytest.approx(plan.budget_range[1])


def test_static_width_leaves_the_fewest_learners_where_one_must_run(images: Any) -> None:
    dense, model, plan = build(projections="lowrank", num_learners=4)
    row = evaluate_at(model, plan, [images], reference(dense, [images]), static_width(model, plan, 0.0))
    assert row["macs_ratio"] == pytest.approx(plan.budget_range[0])
    assert min(row["sites"][e.fqn] for e in plan.entries if e.min_choice) > 0


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_gates_share_is_what_the_gates_cost(images: Any, budget: float) -> None:
    """With nothing else running, the counted work is the rest of the model and the gates."""
    _, model, plan = build("auto")
    set_schedule(model, plan.schedule(budget))
    none = by_name(model, {e.fqn: 0 for e in plan.entries})
    with choosing(model, none), record(model, len(images[0])) as seen, torch.no_grad():
        model(images[0])
    assert seen.executed().double().mean().item() / plan.macs_dense == pytest.approx(gates_share(model, plan), rel=1e-5)


def test_static_width_is_what_the_flop_counter_sees() -> None:
    """Executed MACs of the sorted backend; a static choice calls no gate, so their share is left out."""
    _, model, plan = build()
    choose = static_width(model, plan, 0.6)
    with choosing(model, choose), record(model, 1) as seen, torch.no_grad():
        model(example_input(model))
    expected = plan.macs_rest() + seen.executed().sum().item() - gates_share(model, plan) * plan.macs_dense
    with choosing(model, choose):
        counted = count_macs(model, example_input(model))
    assert counted == pytest.approx(expected, rel=0.01)


def test_random_choice_has_the_histograms_mean_and_no_memory_of_the_input() -> None:
    _, model, plan = build()
    x, _ = digits("test")
    set_dial(model, 0.5)
    generator = torch.Generator().manual_seed(0)
    wanted = {e.fqn: torch.rand(e.num_learners + 1, generator=generator) for e in plan.entries}
    with choosing(model, random_choice(model, wanted, generator)):
        found = histograms(model, [x[:200], x[200:400]])
    numbers = torch.arange(9.0)
    for name, weights in wanted.items():
        expected = (weights / weights.sum() * numbers).sum().item()
        assert (found[name] / found[name].sum() * numbers).sum().item() == pytest.approx(expected, abs=0.12), name
        assert found[name].sum() == 400 * 17


def test_random_choice_depends_on_its_generator_alone() -> None:
    _, model, plan = build()
    gate = gates_of(model)[0]
    wanted = {e.fqn: torch.ones(e.num_learners + 1) for e in plan.entries}
    x = torch.randn(5, 17, gate.fc1.in_features)
    one, two, other = (random_choice(model, wanted, torch.Generator().manual_seed(s))(gate, x) for s in (0, 0, 1))
    assert one.shape == (5, 17, gate.groups)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_histograms_are_those_of_the_gates_as_set() -> None:
    _, model, plan = build()
    x, _ = digits("test")
    set_dial(model, 1.0)
    cheap = histograms(model, [x[:32]])
    set_dial(model, 0.0)
    dear = histograms(model, [x[:32]])
    assert set(cheap) == {e.fqn for e in plan.entries}
    mean = lambda h: sum((c * torch.arange(9.0)).sum() / c.sum() for c in h.values()).item()  # noqa: E731
    assert mean(cheap) < mean(dear)
