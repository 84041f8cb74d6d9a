"""Learners from pretrained weights: orders, rotations and biases that are exact and best first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import CONFIG, adapted, images, inputs_for, plan_of, vit
from torch import Tensor, nn

from acmize import AcmizeError, Site
from acmize.gates import choosing
from acmize.hosts import make_plan
from acmize.init import collect_moments, init_, initialise_, order_units, portions, roots, rotate_qk, rotate_vo
from acmize.insert import convert_, converted

DOUBLE = torch.float64


def augmented(z: Tensor) -> Tensor:
    z = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    return z.T @ z


def test_moments_are_those_of_the_activations() -> None:
    dense: Any = vit()
    seen: dict[str, Tensor] = {}
    block = dense.blocks[0]
    handles = [
        block.mlp.fc2.register_forward_hook(lambda _m, i, _o: seen.update(hidden=i[0])),
        block.attn.qkv.register_forward_hook(lambda _m, _i, o: seen.update(qkv=o)),
    ]
    x = images(6)
    with torch.no_grad():
        dense(x)
    for handle in handles:
        handle.remove()
    moments = collect_moments(dense, plan_of(dense), [x[:2], x[2:]])
    hidden = moments["blocks.0.mlp.fc2"]
    assert hidden.shape == (1, 129, 129)
    assert hidden.dtype == DOUBLE
    torch.testing.assert_close(hidden[0], augmented(seen["hidden"].flatten(0, 1).double()), rtol=1e-4, atol=1e-3)
    qkv = moments["blocks.0.attn.qkv"]
    assert qkv.shape == (6, 17, 17)
    key_of_head_1 = seen["qkv"].flatten(0, 1)[:, 32 + 16 : 32 + 32].double()
    torch.testing.assert_close(qkv[3], augmented(key_of_head_1), rtol=1e-4, atol=1e-3)
    assert not any(m._forward_hooks for m in dense.modules())
    assert not dense.training


def test_order_is_greedy_by_explained_output_variance() -> None:
    z = torch.randn(400, 9, dtype=DOUBLE) @ torch.randn(9, 9, dtype=DOUBLE)
    w2 = torch.randn(4, 9, dtype=DOUBLE)
    order = order_units(augmented(z), w2).tolist()
    assert sorted(order) == list(range(9))
    centred = z - z.mean(0)
    y = centred @ w2.T
    chosen: list[int] = []

    def left(units: list[int]) -> float:
        a = centred[:, units]
        return (y - a @ torch.linalg.lstsq(a, y).solution).square().sum().item()

    for unit in order[:6]:
        gains = {u: left([*chosen, u]) for u in range(9) if u not in chosen}
        assert gains[unit] == pytest.approx(min(gains.values()), rel=1e-6)
        chosen.append(unit)


def test_dead_and_constant_units_come_last() -> None:
    z = torch.randn(200, 6, dtype=DOUBLE)
    z[:, 1], z[:, 4] = 0.0, 3.0
    assert set(order_units(augmented(z), torch.randn(3, 6, dtype=DOUBLE)).tolist()[-2:]) == {1, 4}
    silent = augmented(torch.zeros(5, 6, dtype=DOUBLE))
    assert sorted(order_units(silent, torch.randn(3, 6, dtype=DOUBLE)).tolist()) == list(range(6))


def test_units_of_which_only_rounding_is_left_come_last() -> None:
    """Sums of float32 products give a constant unit a variance just below zero, and covariances that are not zero."""
    units, constant = 12, 6
    root = torch.randn(units, units, dtype=DOUBLE)
    moments = torch.eye(units + 1, dtype=DOUBLE)
    moments[:-1, :-1] = root @ root.T / units
    noise = 1e-2 * torch.randn(constant, units, dtype=DOUBLE)
    moments[:constant, :-1], moments[:-1, :constant] = noise, noise.T
    moments[:constant, :constant] = -5e-6 * torch.eye(constant, dtype=DOUBLE)
    order = order_units(moments, torch.randn(5, units, dtype=DOUBLE)).tolist()
    assert set(order[-constant:]) == set(range(constant))


@pytest.mark.parametrize("rank", [8, 3])
def test_roots_are_inverse_even_without_energy(rank: int) -> None:
    a = torch.randn(8, rank, dtype=DOUBLE)
    half, inverse = roots(a @ a.T)
    torch.testing.assert_close(half @ inverse, torch.eye(8, dtype=DOUBLE), rtol=0, atol=1e-6)
    torch.testing.assert_close(half @ half, a @ a.T, rtol=0, atol=1e-5)


def test_rotation_of_q_and_k_keeps_their_product_and_leads_with_energy() -> None:
    q, k = (torch.randn(300, 8, dtype=DOUBLE) @ torch.randn(8, 8, dtype=DOUBLE) for _ in range(2))
    tq, tk = rotate_qk(q.T @ q / 300, k.T @ k / 300)
    torch.testing.assert_close(tq.T @ tk, torch.eye(8, dtype=DOUBLE), rtol=0, atol=1e-6)
    exact = q @ k.T
    errors = [(exact - (q @ tq.T)[:, :r] @ (k @ tk.T)[:, :r].T).square().sum().item() for r in range(9)]
    assert errors == sorted(errors, reverse=True)
    best = torch.linalg.svdvals(exact)
    for r in range(8):  # no rank r approximation of the products is better
        assert errors[r] == pytest.approx(best[r:].square().sum().item(), rel=1e-6)


def test_rotation_of_v_and_out_keeps_the_output_and_leads_with_energy() -> None:
    v, out = torch.randn(300, 8, dtype=DOUBLE) @ torch.randn(8, 8, dtype=DOUBLE), torch.randn(12, 8, dtype=DOUBLE)
    tv, rotated = rotate_vo(out, v.T @ v / 300)
    torch.testing.assert_close(rotated @ tv, out, rtol=0, atol=1e-6)
    exact = v @ out.T
    best = torch.linalg.svdvals(exact)
    for r in range(8):
        error = (exact - (v @ tv.T)[:, :r] @ rotated[:, :r].T).square().sum().item()
        assert error == pytest.approx(best[r:].square().sum().item(), rel=1e-6)


@torch.no_grad()
def test_what_is_left_out_is_replaced_by_its_mean() -> None:
    torch.manual_seed(1)
    x = torch.randn(500, 16)
    dense: Any = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    plan = make_plan(dense, CONFIG, example=(x[:1],), sites=[Site.mlp("0", "2")])
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [x]))
    errors = []
    for k in range(5):
        with choosing(model, lambda gate, x, k=k: torch.full((*x.shape[:-1], 1), k)):
            y = model(x)
        torch.testing.assert_close(y.mean(0), dense(x).mean(0), rtol=0, atol=1e-4)  # no choice shifts the mean
        errors.append((y - dense(x)).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10
    with choosing(model, lambda gate, x: torch.zeros(*x.shape[:-1], 1, dtype=torch.long)):
        torch.testing.assert_close(model(x), dense(x).mean(0).expand(500, -1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_dense_model_is_left_alone_and_flags_come_back() -> None:
    dense = vit().train()
    before = copy.deepcopy(dense.state_dict())
    _model, _plan = adapted(dense)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert dense.training


# --- bounded memory -------------------------------------------------------------------------------------------


def test_a_few_sites_at_a_time_end_the_same() -> None:
    dense = vit()
    plan = plan_of(dense)
    at_once, few = converted(dense, plan), converted(dense, plan)
    few.load_state_dict(at_once.state_dict())
    batches = [inputs_for(dense, 8, seed=seed) for seed in (1, 2)]
    init_(at_once, dense, plan, collect_moments(dense, plan, batches))
    one, *_ = portions(dense, plan, 1)
    together = [e.fqn for e in one.entries]
    assert len(portions(dense, plan, 1 << 40)) == 1
    assert len(portions(dense, plan, 1)) == 4  # two blocks: an attention, whose parts stay together, and an MLP
    assert together == [f"blocks.0.attn.qkv.{k}" for k in "qkv"] + ["blocks.0.attn.proj"]
    before = few.state_dict()["blocks.1.mlp.fc1.weight"].clone()
    initialise_(few, dense, plan, lambda: batches, limit=1)
    assert not torch.equal(few.state_dict()["blocks.1.mlp.fc1.weight"], before)
    for name, weight in at_once.state_dict().items():
        assert torch.equal(few.state_dict()[name], weight), name


def test_missing_moments_are_named_and_nothing_is_filled() -> None:
    dense = vit()
    plan = plan_of(dense)
    model = converted(dense, plan)
    before = copy.deepcopy(model.state_dict())
    moments = collect_moments(dense, plan, [inputs_for(dense, 4)])
    del moments["blocks.1.mlp.fc2"]
    with pytest.raises(AcmizeError, match=r"found none of blocks\.1\.mlp\.fc2 \(1 missing in all\)"):
        init_(model, dense, plan, moments)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_converted_copy_shares_nothing() -> None:
    dense = vit()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    model = converted(dense, plan_of(dense))
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not own & {p.data_ptr() for p in (*dense.parameters(), *dense.buffers())}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert not torch.equal(model.state_dict()["cls_token"], before["cls_token"])


def test_tied_weights_of_a_copy_stay_tied() -> None:
    dense: Any = vit()
    dense.again = dense.head
    dense.blocks[1].norm1.weight = dense.blocks[0].norm1.weight
    model: Any = converted(dense, plan_of(dense))
    assert model.again is model.head
    assert model.blocks[1].norm1.weight is model.blocks[0].norm1.weight
    assert model.head.weight is not dense.head.weight
    assert model.blocks[1].norm1.weight is not dense.blocks[0].norm1.weight
