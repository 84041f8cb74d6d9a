"""Damage: first order, label-free, the same as its definition written out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Mine, adapted, half_width, images, inputs_for, vit
from torch import Tensor

from acmize.damage import GateData, collect_damage
from acmize.decision import Decision
from acmize.gates import DamageGate, Gate, GateSpec, choosing, full_width, gates_of, set_dial
from acmize.losses import gamma_deviance
from acmize.phases import pretrain_gates
from acmize.phases.pretrain_gates import fit_damage_gates


def collect(model: Any, dense: Any, x: Tensor, **kwargs: Any) -> dict[Gate, Any]:
    options: dict[str, Any] = {"choose": full_width, "generator": torch.Generator().manual_seed(0), "draws": 1}
    return collect_damage(model, dense, [x], **{**options, "keep_tokens": 1.0, **kwargs})


def drawn_class(dense: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        p = dense(x).softmax(-1)
    return torch.multinomial(p, 1, replacement=True, generator=torch.Generator().manual_seed(0))[:, 0]


def rows_in_order(data: Any, x: Tensor) -> Tensor:
    """Damages (M, G, N) in the order of the tokens x (M, D): tokens are kept in a drawn order."""
    match = torch.cdist(x.double(), data.x.double()).argmin(1)
    assert len(set(match.tolist())) == len(x)
    return data.damage[match]


def test_damage_of_an_mlp_is_its_definition() -> None:
    """E[(sum_{u >= r} g_u (z_u - mu_u))^2] at the hidden units, with g from autograd of the dense computation."""
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    x = images(3, seed=4)
    mlp = model.blocks[1].mlp
    seen: dict[str, Tensor] = {}

    def catch(_m: Any, inputs: Any, _o: Any) -> None:
        seen["x"] = inputs[0].detach()

    handle = mlp.register_forward_hook(catch)
    data = collect(model, dense, x)[mlp.gate]
    handle.remove()

    z = mlp.hidden(seen["x"]).detach().requires_grad_()
    full = torch.full((*z.shape[:-1], 1), 4)
    handle = mlp.register_forward_hook(lambda _m, _i, _o: mlp.fc2.masked(z, Decision(full[..., 0])))
    with choosing(model, full_width):
        loss = F.cross_entropy(model(x), drawn_class(dense, x), reduction="sum")
    handle.remove()
    g = torch.autograd.grad(loss, z)[0]
    # mu enters through the biases: s_n = W_n z_n + beta_n with beta_n = -W_n mu_n
    w, beta = mlp.fc2.weight, mlp.fc2.learner_bias
    with choosing(model, full_width):
        y = mlp(seen["x"]).detach().requires_grad_()
    loss = F.cross_entropy(run_with_output(model, mlp, y, x), drawn_class(dense, x), reduction="sum")
    upstream = torch.autograd.grad(loss, y)[0]
    per_learner = []
    for n, (a, b) in enumerate(pairwise(mlp.fc2.bounds)):
        torch.testing.assert_close(g[..., a:b], upstream @ w[:, a:b], rtol=1e-3, atol=1e-5)
        per_learner.append((g[..., a:b] * z[..., a:b]).sum(-1) + upstream @ beta[n])
    change = torch.stack(per_learner, -1).flatten(0, 1)
    expected = change.flip(-1).cumsum(-1).flip(-1).square()
    found = rows_in_order(data, seen["x"].flatten(0, 1))[:, 0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-6)


def run_with_output(model: Any, module: Any, y: Tensor, x: Tensor) -> Tensor:
    handle = module.register_forward_hook(lambda _m, _i, _o: y)
    try:
        with choosing(model, full_width):
            return model(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_damage_of_a_projection_is_its_definition(part: str) -> None:
    """The same at a head's rotated dimensions, where mu is zero."""
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    x = images(3, seed=4)
    qkv, g = model.blocks[1].attn.qkv, "qkv".index(part)  # in block 0 the class tokens are all alike
    seen: dict[str, Tensor] = {}

    def catch(_m: Any, inputs: Any, output: Tensor) -> Tensor:
        seen["x"], seen["z"] = inputs[0].detach(), output.detach().requires_grad_()
        return seen["z"]

    handle = qkv.register_forward_hook(catch)
    with choosing(model, full_width):
        loss = F.cross_entropy(model(x), drawn_class(dense, x), reduction="sum")
    handle.remove()
    grad = torch.autograd.grad(loss, seen["z"])[0]
    change = (grad * seen["z"]).chunk(3, -1)[g].unflatten(-1, (2, 4, 4)).sum((-1, -3)).flatten(0, 1)
    expected = change.flip(-1).cumsum(-1).flip(-1).square()
    found = rows_in_order(collect(model, dense, x)[qkv.gate], seen["x"].flatten(0, 1))[:, g]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-7)


def test_small_cuts_change_the_loss_as_predicted() -> None:
    """First order: with all learners scaled a little, the loss moves by the gradient that damage squares."""
    dense = Mine().eval()
    targets = ["blocks.*.attn:attention(q,k,v,out,heads=2)", "blocks.*:mlp(fc1,fc2)"]
    model, _ = adapted(dense, target_modules=targets)
    x = inputs_for(dense, 1)
    data = collect(model, dense, x)
    label = drawn_class(dense, x)
    gates = gates_of(model)
    for gate in gates:
        tokens = len(data[gate].x)
        assert data[gate].damage.shape == (tokens, gate.groups, 4)
        eps, losses = 1e-2, []
        for sign in (1, -1):
            scale = torch.ones(1, tokens, gate.groups, 4)
            scale[0, 3, 0, 2:] += sign * eps  # token 3, learners 2 and 3
            gate.forward = lambda h, gate=gate, scale=scale: Decision(full_width(gate, h), scale)
            with torch.no_grad(), choosing(model, full_width):
                losses.append(F.cross_entropy(model(x).double(), label).item())
            del gate.forward
        slope = (losses[0] - losses[1]) / (2 * eps)
        # the kept rows are in a drawn order: the predicted damage of that token is among them
        assert (data[gate].damage[:, 0, 2].sqrt() - abs(slope)).abs().min() < 2e-3 * max(1.0, abs(slope))


def test_a_row_knows_where_the_dial_stood() -> None:
    """Batches are run at different budgets, and gates are told at which."""
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    dials = (0.25, 0.5, 0.75)

    def batches() -> Iterator[Tensor]:
        for dial in dials:
            set_dial(model, dial)
            yield images(2, seed=4)

    options: dict[str, Any] = {"choose": None, "generator": torch.Generator().manual_seed(0), "draws": 1}
    for rows in collect_damage(model, dense, batches(), **options).values():
        told = rows.dial[:, 0].tolist()
        assert set(told) == set(dials)
        assert told == sorted(told)


def test_it_needs_no_labels_and_leaves_the_models_alone() -> None:
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    model.train()
    model.blocks[0].requires_grad_(False)
    needs = [p.requires_grad for p in model.parameters()]
    data = collect(model, dense, images(4), keep_tokens=0.5, draws=3)
    assert [p.requires_grad for p in model.parameters()] == needs
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(g.choose is None and not g.probe for g in gates_of(model))
    assert set(data) == set(gates_of(model))
    for gate, rows in data.items():
        count = round(0.5 * 4 * 17)
        assert rows.x.shape == (count, 32)
        assert rows.damage.shape == (count, gate.groups, 4)
        assert (rows.damage >= 0).all()
        assert not rows.damage.requires_grad


def test_flags_come_back_after_an_error() -> None:
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    model.train()
    with pytest.raises(ValueError, match="unpack"):
        collect(model, dense, torch.zeros(2, 3, 5))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_same_seed_same_damage_and_gates_on() -> None:
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    first, again = (collect(model, dense, images(4), draws=2) for _ in range(2))
    for gate in first:
        assert torch.equal(first[gate].damage, again[gate].damage)
    with choosing(model, half_width):
        cut = collect(model, dense, images(4), choose=None)  # errors come from earlier layers too
    last = gates_of(model)[-1]
    assert not torch.equal(cut[last].x, first[last].x)


def test_bf16_says_nearly_the_same() -> None:
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    x = images(4)
    full, half = (collect(model, dense, x, draws=2, bf16=bf16) for bf16 in (False, True))
    for gate in full:
        a, b = full[gate].damage, half[gate].damage
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert torch.corrcoef(torch.stack([a.flatten().sqrt(), b.flatten().sqrt()]))[0, 1] > 0.99


def test_inputs_are_held_in_half_of_the_memory_and_fitted_alike() -> None:
    dense: Any = vit()
    found = {}
    for half in (False, True):
        model: Any = adapted(dense)[0]
        data = collect(model, dense, images(8, seed=4), keep_bf16=half)
        fit_damage_gates(data, steps=30, batch_tokens=64)
        found[half] = (data, [gate.log_damage(rows.x.float()) for gate, rows in data.items()])
    (whole, expected), (half, fitted) = found[False], found[True]
    for a, b in zip(whole.values(), half.values(), strict=True):
        assert (a.x.dtype, b.x.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(a.damage, b.damage)
        torch.testing.assert_close(a.x.bfloat16(), b.x)
    assert max((a - a.mean()).abs().max() for a in expected) > 0.5, "a fit that says the same of every token"
    for a, b in zip(expected, fitted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.1)


def test_a_gate_that_is_wrong_beyond_bounds_starts_afresh_and_one_that_knows_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Present predictions of e^-20 for damages of about 1 have gradients that AdamW does not recover from."""
    monkeypatch.setattr(pretrain_gates, "FEW", 0)
    dense: Any = vit()
    model: Any = adapted(dense)[0]
    data = collect(model, dense, images(8, seed=4), draws=2)
    for rows in data.values():
        rows.damage /= rows.damage.mean()
    fit_damage_gates(data, steps=60, batch_tokens=64)
    known = {gate: gate.log_damage(rows.x).detach() for gate, rows in data.items()}
    fit_damage_gates(data, steps=1, batch_tokens=64, lr=1e-6, fresh=False)
    for gate, rows in data.items():
        torch.testing.assert_close(gate.log_damage(rows.x), known[gate], rtol=1e-3, atol=1e-3)
    for gate in data:
        gate.fc2.bias.data.sub_(20)
    fit_damage_gates(data, steps=60, batch_tokens=64, fresh=False)
    for gate, rows in data.items():
        mean = rows.damage.mean(0).log().expand_as(rows.damage)
        assert gamma_deviance(gate.log_damage(rows.x), rows.damage) < gamma_deviance(mean, rows.damage)


def noise_rows(count: int, seed: int) -> GateData:
    """Damages that the inputs say nothing about, but in the first learner, where they say all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 32, generator=generator)
    damage = torch.randn(count, 1, 4, generator=generator).mul(2).exp()
    damage[:, 0, 0] = x[:, 0].exp()
    return GateData(x, damage, torch.zeros(count, 1))


def test_few_rows_are_not_learnt_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = noise_rows(4000, 1)

    def predicted() -> Tensor:
        gate = DamageGate(GateSpec(dim=32, hidden=16, learner_macs=((1,) * 4,), gate_macs=(1,), macs_total=8))
        fit_damage_gates({gate: noise_rows(300, 0)}, steps=400, seed=1)
        return gate.log_damage(fresh.x, fresh.dial).detach()

    stopped = predicted()
    monkeypatch.setattr(pretrain_gates, "FEW", 0)
    by_heart, mean = predicted(), noise_rows(300, 0).damage.mean(0).log().expand_as(fresh.damage)
    nothing = gamma_deviance(mean, fresh.damage)
    assert gamma_deviance(by_heart, fresh.damage) > nothing + 1, "400 steps learn 300 rows by heart"
    assert gamma_deviance(stopped, fresh.damage) < nothing + 0.1
    assert (stopped - stopped.mean(0)).abs().max() > 0.1, "and what inputs do say is learnt"


def test_the_best_of_a_fit_survives_a_resume(tmp_path: Path) -> None:
    def fitted(folder: Path, resume: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        gate = DamageGate(GateSpec(dim=32, hidden=16, learner_macs=((1,) * 4,), gate_macs=(1,), macs_total=8))
        fit_damage_gates({gate: noise_rows(300, 0)}, steps=100, seed=1, checkpoint=folder, resume=resume)
        return tuple(p.detach().clone() for p in gate.parameters())

    whole = fitted(tmp_path, False)
    assert all(torch.equal(a, b) for a, b in zip(whole, fitted(tmp_path, True), strict=True))
