"""The defects of the released ACM code (METHODS, section 1), each with a test that would catch it in ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny import CONFIG, Random, adapted, images, vit

from acmize import AcmConfig
from acmize.adaptive import AcmMlp, AcmProjections
from acmize.cost import count_macs
from acmize.damage import GateData, collect_damage
from acmize.gates import ClassificationGate, DamageGate, Gate, GateSpec, choosing, full_width, gates_of
from acmize.losses import classification, threshold_labels
from acmize.ops import use_backend
from acmize.phases.calibrate import calibrate, realised, set_budget
from acmize.phases.finetune import FinetuneConfig
from acmize.phases.pretrain_gates import fit_classification_gates, fit_damage_gates


@torch.no_grad()
def test_1_the_last_learner_runs_for_the_highest_choice_of_a_batch() -> None:
    """The released loop stops one learner early for tokens at the batch's highest choice."""
    model: Any = adapted(vit())[0]
    mlp = model.blocks[0].mlp
    x = torch.randn(2, 3, 32)
    for top in range(1, 5):
        choice = torch.tensor([[0, top, 1], [0, 1, top]])[..., None]
        with choosing(model, lambda gate, x, choice=choice: choice):
            for backend in ("masked", "sorted"):
                with use_backend(backend):
                    y = mlp(x)
                every = mlp.all_choices(x.flatten(0, 1))[0]
                expected = every[torch.arange(6), choice.flatten()].view(2, 3, -1)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_1_outputs_do_not_depend_on_the_other_samples() -> None:
    model, _ = adapted(vit())
    for gate in gates_of(model):
        gate.price.fill_(1 / float(gate.cost.max()))
    x = images(6, seed=3)
    together = model(x)
    for i in range(6):
        torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=0, atol=1e-5)
        mates = model(torch.cat([x[i : i + 1], 50 * torch.randn(3, 3, 16, 16)]))  # extreme mates, extreme choices
        torch.testing.assert_close(mates[0], together[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["damage", "classification"])
def test_2_the_task_loss_reaches_the_gate(kind: Any) -> None:
    """The released gate multiplies nothing."""
    model, _ = adapted(vit(), AcmConfig(num_learners=4, gate_hidden=2, gate=kind))
    model.train()
    for gate in gates_of(model):
        gate.price.fill_(1 / float(gate.cost.max()) if kind == "damage" else 0.0)
    torch.nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
    for gate in gates_of(model):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in gate.named_parameters() if "weight" in n)


def test_2_a_gate_step_lowers_the_task_loss() -> None:
    """The gradient is not only there but points the right way: full width is worth its damage when compute is free."""
    torch.manual_seed(0)
    dense = vit()
    model, _ = adapted(dense)
    for p in model.parameters():
        p.requires_grad_(False)
    gates = [g for g in gates_of(model) if isinstance(g, DamageGate)]
    for gate in gates:
        gate.price.fill_(1 / float(gate.cost.max()))
        gate.requires_grad_(True)
    x = images(16, seed=8)
    with torch.no_grad():
        target = dense(x).softmax(-1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_3_labels_0_1_and_n_all_occur() -> None:
    """The released search confuses "no match" with "first match"."""
    errors = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0], [27.0, 9.0, 3.0, 1.0]])
    assert threshold_labels(errors, 1.2).tolist() == [0, 1, 3]


def test_3_the_gate_is_trained_on_its_logits_and_learns_every_label() -> None:
    """The released loss scores a sampled one-hot."""
    torch.manual_seed(0)
    gate = ClassificationGate(GateSpec(dim=4, hidden=8, learner_macs=((1, 1, 1),), gate_macs=(1,), macs_total=100))
    label = torch.randint(0, 4, (800,))
    x = torch.eye(4)[label] + 0.1 * torch.randn(800, 4)
    errors = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0], [9.0, 3.0, 1.0, 1.0], [27.0, 9.0, 3.0, 1.0]])
    data: dict[Gate, GateData] = {gate: GateData(x, errors[label][:, None], torch.zeros(800, 1))}
    logits = gate.logits(x).flatten(0, 1)
    assert classification(logits, label).item() == classification(logits, label).item()  # nothing is sampled
    fit_classification_gates(data, steps=150, batch_tokens=256)
    found = gate.eval()(x).choice[:, 0]
    assert (found == label).float().mean() > 0.98
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_4_a_misspelled_option_cannot_exist() -> None:
    """The released detach option is written to a misspelled attribute and ignored."""
    for config in (AcmConfig, FinetuneConfig):
        option = next(iter(inspect.signature(config).parameters))
        with pytest.raises(TypeError, match="unexpected keyword"):
            config(**{option + "_": 1})
    frozen: Any = CONFIG
    with pytest.raises(AttributeError):
        frozen.num_learner = 3
    with pytest.raises(AttributeError):
        frozen.num_learners = 3


def test_5_one_training_many_budgets_and_no_drift_between_training_and_inference() -> None:
    """The released code trains once for each budget, which drifts from sampled training to argmax inference."""
    torch.manual_seed(0)
    dense = vit()
    model, plan = adapted(dense)
    data = collect_damage(
        model, dense, [images(16, seed=7)], choose=full_width, generator=torch.Generator().manual_seed(0)
    )
    fit_damage_gates(data, steps=60, batch_tokens=256)
    batches = [images(32, seed=9)]
    calibration = calibrate(model, plan, batches, (0.85, 0.7, 0.55))
    for budget in (0.85, 0.7, 0.55):  # one set of weights, a knob at inference
        set_budget(model, plan, calibration, budget)
        assert realised(model, plan, batches).mean().item() == pytest.approx(budget, abs=0.01)
        x = torch.randn(50, 32)
        for gate in gates_of(model):
            with torch.no_grad():
                assert torch.equal(gate.train()(x).choice, gate.eval()(x).choice)


def test_6_phase_3_has_a_teacher() -> None:
    options = inspect.signature(FinetuneConfig).parameters
    assert any("teacher" in name or "feature" in name for name in options), list(options)


@torch.no_grad()
def test_6_fast_execution_does_less_work_for_the_same_result() -> None:
    """The released code has no fast path: here the sorted one skips what is not chosen, and agrees."""
    model, plan = adapted(vit())
    spent = {}
    for backend in ("masked", "sorted"):
        with choosing(model, Random(0)), use_backend(backend):
            spent[backend] = count_macs(model, images(4))
    assert spent["sorted"] < 0.8 * 4 * plan.macs_dense <= spent["masked"]


def test_6_more_than_one_architecture() -> None:
    modules: list[Any] = [m for m in adapted(vit())[0].modules() if isinstance(m, AcmMlp | AcmProjections)]
    assert len(modules) == 4  # the matrix of hosts is in test_hosts.py
