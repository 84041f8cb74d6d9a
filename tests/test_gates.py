"""Gates: one price, straight-through gradients, recording of decisions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import CONFIG, Random, adapted, half_width, images, vit
from torch import Tensor, nn

from acmize import AcmConfig
from acmize.decision import Decision, hard_keep
from acmize.gates import ClassificationGate, DamageGate, Gate, GateSpec, choosing, full_width, gates_of, set_dial
from acmize.recording import record

SPEC = {"dim": 6, "hidden": 4, "learner_macs": ((10, 20, 30), (5, 5, 5)), "gate_macs": (7, 7), "macs_total": 1000}
KINDS: tuple[type[Gate], ...] = (DamageGate, ClassificationGate)


def gate_of(kind: type[Gate] = DamageGate, **kwargs: Any) -> Any:
    return kind(GateSpec(**{**SPEC, **kwargs}))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_cost(kind: type[Gate]) -> None:
    gate, x = gate_of(kind), torch.randn(2, 5, 6)
    assert gate.eval()(x).choice.shape == (2, 5, 2)
    assert gate.energies(x).shape == (2, 5, 2, 4)
    torch.testing.assert_close(gate.cost, torch.tensor([[0, 0.01, 0.03, 0.06], [0, 0.005, 0.01, 0.015]]))
    assert gate(x[:0]).choice.shape == (0, 5, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_has_least_energy(kind: type[Gate]) -> None:
    gate, x = gate_of(kind).eval(), torch.randn(40, 6)
    gate.price.fill_(20.0)
    energy, choice = gate.energies(x), gate(x).choice
    assert torch.equal(energy.gather(-1, choice[..., None])[..., 0], energy.min(-1).values)
    assert gate(x).keep is None


def test_damage_falls_with_learners_and_ends_at_none() -> None:
    gate, x = gate_of().eval(), torch.randn(40, 6)
    energy = gate.energies(x)  # at price 0 the energy is the damage
    assert (energy.diff(dim=-1) <= 0).all()
    assert (energy[..., -1] == 0).all()
    assert (gate(x).choice == 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_price_never_means_more_compute(kind: type[Gate]) -> None:
    gate, x = gate_of(kind).eval(), torch.randn(200, 6)
    before = None
    for dial in torch.linspace(0, 1, 21).tolist():
        gate.price.fill_(gate.price_at(dial))  # the input that tells the gate where the dial stands is left alone
        choice = gate(x).choice
        assert before is None or (choice <= before).all()
        before = choice
    assert before is not None
    assert (before == 0).all()
    gate.price.fill_(gate.price_at(0.0))
    assert (gate(x).choice == 3).float().mean() > 0.99


def test_the_end_of_the_dial_outbids_any_damage_and_the_rest_is_a_logarithmic_scale() -> None:
    """Samples of a CNN, and words that are a frame long, have damages beyond what the scale of tokens reaches."""
    gate: Any = gate_of(DamageGate)
    nn.init.constant_(gate.fc2.bias, 50.0)  # beyond what it may say
    x = torch.randn(64, gate.fc1.in_features)
    gate.price.fill_(gate.price_at(0.95))
    assert gate(x).choice.max() == gate.num_learners
    gate.price.fill_(gate.price_at(1.0))
    assert (gate(x).choice == gate.min_choice).all()
    prices = [math.log(gate.price_at(d / 20)) for d in range(21)]
    steps = [b - a for a, b in pairwise(prices)]
    assert steps[:-1] == pytest.approx([math.log(1e11) / 20] * 19)
    assert steps[-1] > 10
    assert gate.price_at(torch.tensor(0.97)).item() == pytest.approx(gate.price_at(0.97), rel=1e-4)


def test_the_classification_gate_at_price_0_is_argmax() -> None:
    gate, x = gate_of(ClassificationGate).eval(), torch.randn(200, 6)
    assert gate.price == 0
    assert torch.equal(gate(x).choice, gate.logits(x).argmax(-1))
    assert gate.price_at(0.5) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_min_choice(kind: type[Gate], training: bool) -> None:
    gate, x = gate_of(kind, min_choice=1).train(training), torch.randn(50, 6)
    gate.price.fill_(1e6)
    decision = gate(x)
    assert (decision.choice == 1).all()
    if training:
        assert decision.keep is not None
        torch.testing.assert_close(decision.keep[..., 0], torch.ones(50, 2))


def balanced(model: Any) -> None:
    """Prices at which a fresh gate hesitates: damage is about 1, and so is the cost of its site."""
    for gate in gates_of(model):
        gate.price.fill_(1 / gate.cost.max() if isinstance(gate, DamageGate) else 0.0)


# --- straight-through -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_hard_and_backward_soft(kind: type[Gate]) -> None:
    gate, x = gate_of(kind).train(), torch.randn(50, 6)
    gate.price.fill_(20.0)
    decision = gate(x)
    assert decision.keep is not None
    torch.testing.assert_close(decision.keep, hard_keep(decision.choice, 3).float(), rtol=0, atol=1e-6)
    (decision.keep * torch.randn(3)).sum().backward()
    for p in (gate.fc1.weight, gate.fc2.weight):
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 0


def test_the_damage_gate_chooses_in_training_as_in_inference() -> None:
    gate, x = gate_of(), torch.randn(200, 6)
    gate.price.fill_(5.0)
    assert torch.equal(gate.train()(x).choice, gate.eval()(x).choice)


def test_the_classification_gate_samples_in_training() -> None:
    gate, x = gate_of(ClassificationGate).train(), torch.randn(1, 6).expand(4000, 6)
    shares = torch.stack([(gate(x).choice[:, 0] == k).float().mean() for k in range(4)])
    torch.testing.assert_close(shares, gate.logits(x)[0, 0].softmax(-1), rtol=0, atol=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_price_0_gives_no_nan(kind: type[Gate]) -> None:
    decision = gate_of(kind).train()(torch.randn(5, 6))
    assert decision.keep is not None
    assert decision.keep.isfinite().all()


def test_soft_keep_is_the_chance_that_a_learner_runs() -> None:
    gate = gate_of(ClassificationGate).train()
    energy = torch.randn(5, 2, 4, requires_grad=True)
    p = (-energy / gate.temperature).softmax(-1)
    grad = torch.autograd.grad(gate._straight_through(energy).keep[..., 1].sum(), energy)[0]
    noiseless = torch.autograd.grad((p[..., 2] + p[..., 3]).sum(), energy)[0]
    assert torch.equal(grad.sign().sum((0, 1)).sign(), noiseless.sign().sum((0, 1)).sign())


@pytest.mark.parametrize("gate", ["damage", "classification"])
def test_the_task_loss_reaches_every_gate(gate: Any) -> None:
    dense = vit()
    model, _ = adapted(dense, AcmConfig(num_learners=4, gate_hidden=2, gate=gate))
    balanced(model)
    model.train()
    torch.nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
    for g in gates_of(model):
        assert isinstance(g, DamageGate | ClassificationGate)
        assert g.fc1.weight.grad is not None
        assert g.fc1.weight.grad.isfinite().all()
        assert g.fc1.weight.grad.abs().max() > 0


# --- the model's gates ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_dial_turns_compute_down() -> None:
    model, _ = adapted(vit())
    spent = []
    for dial in (0.0, 0.3, 0.5, 0.7, 1.0):
        set_dial(model, dial)
        with record(model, 4) as seen:
            model(images())
        spent.append(seen.executed().mean().item())
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 2 * spent[-1]


def test_choosing_is_undone() -> None:
    model, _ = adapted(vit())
    with choosing(model, half_width):
        with choosing(model, None, probe=True):
            assert all(g.choose is half_width and g.probe for g in gates_of(model))
        assert all(g.choose is half_width and not g.probe for g in gates_of(model))
    with pytest.raises(RuntimeError, match="inside"), choosing(model, full_width):
        raise RuntimeError("inside")
    assert all(g.choose is None and not g.probe for g in gates_of(model))


@torch.no_grad()
def test_the_recorder_sums_what_ran() -> None:
    model, plan = adapted(vit())
    with record(model, 4, keep_inputs=True) as seen, choosing(model, Random(3)):
        model(images())
    entries = {e.fqn: e for e in plan.entries}
    assert seen.macs.keys() == entries.keys()
    total = torch.zeros(4)
    for name, e in entries.items():
        table = torch.tensor([0, *e.learner_macs]).cumsum(0)
        executed = table[seen.per_token[name]].sum(1)
        assert torch.equal(seen.macs[name][-1].long(), executed)
        assert int(seen.choices[name].sum()) == 4 * e.tokens
        assert torch.equal(seen.choices[name], torch.bincount(seen.per_token[name].flatten(), minlength=5))
        assert seen.most[name] == e.tokens * sum(e.learner_macs)
        total += executed + e.tokens * e.gate_macs
    torch.testing.assert_close(seen.executed(), total)
    assert len(seen.seen) == len(gates_of(model))
    assert all(m.recorder is None for m, _, _ in seen.seen)


def test_differentiable_compute_is_the_executed_one() -> None:
    model, _ = adapted(vit())
    balanced(model)
    model.train()
    with record(model, 4) as seen:
        model(images())
    spent = seen.differentiable()
    torch.testing.assert_close(spent.detach(), seen.executed(), rtol=1e-4, atol=1.0)
    spent.mean().backward()
    assert all(g.fc1.weight.grad.abs().max() > 0 for g in gates_of(model))  # pyright: ignore


@torch.no_grad()
def test_macs_of_a_decision() -> None:
    model: Any = adapted(vit())[0]
    mlp = model.blocks[0].mlp
    choice = torch.tensor([[[0], [1]], [[4], [2]]])
    learner = 2 * 32 * 32
    assert mlp.macs(Decision(choice)).tolist() == [[[0], [learner]], [[4 * learner], [2 * learner]]]
    assert CONFIG.num_learners == 4


def test_keep_of_a_group() -> None:
    keep: Tensor = torch.rand(5, 2, 3)
    decision = Decision(torch.tensor([[0, 1]] * 5), keep)
    one = decision.group(1)
    assert torch.equal(one.keep_or_hard(3, torch.float64), keep[:, 1].double())
    assert torch.equal(Decision(one.choice).keep_or_hard(3, torch.float32)[0], torch.tensor([1.0, 0.0, 0.0]))
