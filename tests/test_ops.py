"""The two primitives: backends agree, and tokens do not depend on each other."""

from __future__ import annotations

from itertools import pairwise
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acmize import ops, products
from acmize.decision import Decision
from acmize.layers import Contract, Dense, Expand, LowRank, fast_products_

HERE = tuple(name for name in ops.BACKENDS if name != "triton")  # see test_kernels.py

BOUNDS = {"even": (0, 4, 8, 12), "uneven": (0, 1, 7, 12)}
D, OUT = 6, 5


def choices(kind: str) -> Tensor:
    return {
        "random": torch.randint(0, 4, (23,)),
        "empty": torch.zeros(0, dtype=torch.long),
        "all zero": torch.zeros(9, dtype=torch.long),
        "all equal": torch.full((9,), 2),
        "all full": torch.full((9,), 3),
        "one token": torch.tensor([1]),
        "gaps": torch.tensor([3, 0, 3, 0, 1]),
    }[kind]


KINDS = ("random", "empty", "all zero", "all equal", "all full", "one token", "gaps")


def by_loops(layer: Expand | Contract, x: Tensor, choice: Tensor) -> Tensor:
    """The definition, a token at a time."""
    rows, heads = [], layer.heads
    for row, k in zip(x, choice.tolist(), strict=True):
        width = layer.bounds[k]
        if isinstance(layer, Expand):
            h = (layer.weight @ row + layer.bias).view(heads, -1).clone()
            h[:, width:] = 0
            rows.append(h.flatten())
        else:
            h = row.view(heads, -1).clone()
            h[:, width:] = 0
            rows.append(layer.weight @ h.flatten() + layer.bias + layer.learner_bias[:k].sum(0))
    return torch.stack(rows) if rows else x.new_zeros(0, layer.out_features)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_backends_agree_with_the_definition(kind: str, bounds: tuple[int, ...], heads: int) -> None:
    choice = choices(kind)
    expand = Expand(D, 12 * heads, True, bounds, heads)
    contract = Contract(12 * heads, OUT, bounds, heads)
    contract.learner_bias.normal_()
    x, h = torch.randn(len(choice), D), torch.randn(len(choice), 12 * heads)
    for layer, z in ((expand, x), (contract, h)):
        expected = by_loops(layer, z, choice)
        for backend in HERE:
            with ops.use_backend(backend):
                torch.testing.assert_close(layer(z, Decision(choice)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_low_rank_backends_agree(kind: str) -> None:
    layer, choice = LowRank(D, OUT, BOUNDS["uneven"]), choices(kind)
    layer.fc2.learner_bias.normal_()
    x = torch.randn(len(choice), D)
    with ops.use_backend("masked"):
        masked = layer(x, Decision(choice))
    with ops.use_backend("sorted"):
        torch.testing.assert_close(layer(x, Decision(choice)), masked, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_leading_axes_are_kept() -> None:
    layer, x = Expand(D, 12, False, BOUNDS["even"]), torch.randn(2, 3, 4, D)
    choice = torch.randint(0, 4, (2, 3, 4))
    for backend in HERE:
        with ops.use_backend(backend):
            assert layer(x, Decision(choice)).shape == (2, 3, 4, 12)
            assert layer(x[:0], Decision(choice[:0])).shape == (0, 3, 4, 12)


@pytest.mark.parametrize("backend", HERE)
@torch.no_grad()
def test_a_token_does_not_depend_on_its_mates(backend: str) -> None:
    choice = choices("random")
    expand, contract = Expand(D, 12, True, BOUNDS["uneven"]), Contract(12, OUT, BOUNDS["uneven"])
    contract.learner_bias.normal_()
    x = torch.randn(len(choice), D)
    with ops.use_backend(backend):
        together = contract(F.gelu(expand(x, Decision(choice))), Decision(choice))
        for i in range(len(x)):
            one = Decision(choice[i : i + 1])
            alone = contract(F.gelu(expand(x[i : i + 1], one)), one)
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_choices_is_each_choice() -> None:
    expand, contract = Expand(D, 24, True, BOUNDS["uneven"], 2), Contract(24, OUT, BOUNDS["uneven"], 2)
    contract.learner_bias.normal_()
    for layer, z in ((expand, torch.randn(7, D)), (contract, torch.randn(7, 24))):
        every = layer.all_choices(z)
        for k in range(4):
            one = layer.masked(z, Decision(torch.full((7,), k)))
            torch.testing.assert_close(every[:, k], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("unit_macs", "heads", "runs"),
    [
        (2_000_000, 1, [(3, 0, 2), (2, 2, 6)]),  # learners of the same tokens are one product
        (1_000_000, 1, [(3, 0, 6)]),  # one token computed in vain for two units costs less than another product
        (1_000_001, 1, [(3, 0, 2), (2, 2, 6)]),
        (2_000_000, 2, [(3, 0, 6)]),  # a product of several heads' slices costs more
        (2_000_001, 2, [(3, 0, 2), (2, 2, 6)]),
    ],
)
def test_learners_are_joined_where_it_pays(unit_macs: int, heads: int, runs: list[tuple[int, int, int]]) -> None:
    (order,) = ops.sort_tokens(torch.tensor([[3], [3], [1]]), 4)
    assert order.counts == [3, 2, 2, 0]
    assert order.choice.tolist() == [3, 3, 1]
    assert ops.plan_runs(order.counts, (0, 2, 4, 6, 8), unit_macs, heads) == [ops.Run(*run) for run in runs]


@pytest.mark.parametrize("overhead", [0, 10**9], ids=["a product each", "one product"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_joined_or_not_the_outputs_agree(kind: str, overhead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "OVERHEAD_MACS", overhead)
    choice, bounds = choices(kind), BOUNDS["uneven"]
    expand, contract = Expand(D, 36, True, bounds, 3), Contract(36, OUT, bounds, 3)
    low = LowRank(D, OUT, bounds)
    for layer in (contract, low.fc2):
        layer.learner_bias.normal_()
    x, h = torch.randn(len(choice), D), torch.randn(len(choice), 36)
    for layer, z in ((expand, x), (contract, h), (low, x)):
        found, expected = layer(z, Decision(choice)), layer.masked(z, Decision(choice))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_onednn_and_rounded_rows_agree(kind: str, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._thread, "ragged", int(ragged))
    used = []
    gemm = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(products, "ONEDNN_MACS", 0)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: (used.append(len(x)), gemm(x, *rest))[1]
    )
    choice, bounds = choices(kind), BOUNDS["uneven"]
    expand, contract = Expand(D, 36, True, bounds, 3), Contract(36, OUT, bounds, 3)
    low = LowRank(D, OUT, bounds)
    for layer, z in ((expand, torch.randn(len(choice), D)), (contract, torch.randn(len(choice), 36)), (low, None)):
        z = torch.randn(len(choice), D) if z is None else z
        found, expected = layer(z, Decision(choice)), layer.masked(z, Decision(choice))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert bool(used) == bool(choice.sum())
    assert all(rows % 16 == 0 or (rows == len(choice) and not ragged) for rows in used)


@pytest.mark.parametrize("together", [True, False], ids=["together", "sorted"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_tokens_together_or_sorted_agree(kind: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving tokens to their places in the order may cost more than what they would compute in vain."""
    moved, gathered = [], ops.gathered
    monkeypatch.setattr(ops, "MOVE_MACS", 10**9 if together else -(10**9))
    monkeypatch.setattr(ops, "gathered", lambda x, index: (moved.append(len(x)), gathered(x, index))[1])
    choice, low = choices(kind), LowRank(D, OUT, BOUNDS["uneven"])
    low.fc2.learner_bias.normal_()
    x = torch.randn(len(choice), D)
    torch.testing.assert_close(low(x, Decision(choice)), low.masked(x, Decision(choice)), rtol=1e-5, atol=1e-5)
    assert bool(moved) == (not together and kind not in ("empty", "all zero", "all full"))


@torch.no_grad()
def test_very_large_products_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among inputs of ever new lengths: a kernel more is small beside them, more rows in every layer are not."""
    used: list[int] = []
    gemm = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(products._thread, "ragged", 1)
    monkeypatch.setattr(products, "ONEDNN_MACS", 0)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: (used.append(len(x)), gemm(x, *rest))[1]
    )
    x, weight = torch.randn(23, D), torch.randn(OUT, D)
    for most in (23 * D * OUT + 1, 23 * D * OUT):
        monkeypatch.setattr(products, "KERNEL_MACS", most)
        torch.testing.assert_close(products.gemm(x, weight), F.linear(x, weight))
    assert used == [32, 23]


@torch.no_grad()
def test_a_product_of_windows_reads_them_where_they_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_MACS", 0)
    windows = torch.randn(50, 4).unfold(0, 7, 3).mT.flatten(-2)
    weight, bias = torch.randn(OUT, 28), torch.randn(OUT)
    assert windows.stride() == (12, 1)  # each shares 4 of its frames with the next
    torch.testing.assert_close(products.gemm(windows, weight, bias), F.linear(windows.contiguous(), weight, bias))


def test_two_outputs_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What products share inside is used again, what they return is not; each thread has its own."""
    monkeypatch.setattr(products, "WORK", 0)
    monkeypatch.setattr(products, "ONEDNN_MACS", 0)
    choice, bounds = torch.tensor([3, 1, 2, 0, 3, 2, 1, 1]), BOUNDS["uneven"]
    layers = (Expand(D, 36, True, bounds, 3), Contract(36, OUT, bounds, 3), LowRank(D, OUT, bounds))
    one, two = ([torch.randn(8, n) for n in (D, 36, D)] for _ in range(2))

    def run(inputs: list[Tensor]) -> list[Tensor]:
        with torch.inference_mode():  # what is kept in it is written to outside as well
            return [layer(x, Decision(choice)) for layer, x in zip(layers, inputs, strict=True)]

    with torch.no_grad():
        expected = [
            [layer.masked(x, Decision(choice)) for layer, x in zip(layers, some, strict=True)] for some in (one, two)
        ]
        first = run(one)
        second = [layer(x, Decision(choice)) for layer, x in zip(layers, two, strict=True)]
    kept = {key: memory.data_ptr() for key, memory in products._thread.kept.items()}
    assert {purpose for purpose, _ in kept} >= {"order"}
    for found, wanted in zip((first, second), expected, strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    others: list[dict[Any, int]] = []
    thread = Thread(
        target=lambda: (run(one), others.append({k: m.data_ptr() for k, m in products._thread.kept.items()}))
    )
    thread.start()
    thread.join()
    assert others[0]
    assert not set(others[0].values()) & set(kept.values())


@pytest.mark.parametrize(("units", "num"), [(12, 4), (10, 4), (7, 7), (64, 8), (5, 1)])
def test_even_bounds(units: int, num: int) -> None:
    bounds = ops.even_bounds(units, num)
    widths = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == units
    assert len(widths) == num
    assert max(widths) - min(widths) <= 1
    assert min(widths) >= 1


def test_dispatch() -> None:
    x = torch.zeros(1)
    assert ops.pick_backend(x) == "masked"  # gradients are on
    with torch.no_grad():
        assert ops.pick_backend(x) == "sorted"
        with ops.use_backend("masked"):
            assert ops.pick_backend(x) == "masked"
            with ops.use_backend("sorted"):
                assert ops.pick_backend(x) == "sorted"
            assert ops.pick_backend(x) == "masked"
        assert ops.pick_backend(torch.zeros(1, device="meta")) == "masked"
    with pytest.raises(ValueError, match="'fast', expected one of"), ops.use_backend("fast"):
        pass
    assert ops._forced == []


def test_masked_is_differentiable_where_sorted_would_run() -> None:
    layer = Contract(12, OUT, BOUNDS["even"])
    keep = torch.ones(3, 3, requires_grad=True)
    layer(torch.randn(3, 12), Decision(torch.full((3,), 3), keep)).sum().backward()
    assert keep.grad is not None
    assert keep.grad.abs().min() > 0


def test_autocast_takes_the_masked_backend() -> None:
    x = torch.zeros(2, 3)
    with torch.no_grad():
        assert ops.pick_backend(x) == "sorted"
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.pick_backend(x) == "masked"


@pytest.mark.parametrize("act", [None, "gelu", "gelu_tanh", "relu", "silu", "sigmoid"])
@torch.no_grad()
def test_an_activation_inside_the_product_is_the_same(act: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(7, D), torch.randn(OUT, D), torch.randn(OUT)
    after = None if act is None else products.ACTS[act]
    assert act is None or products.act_name(products.ACTS[act]) == act
    expected = F.linear(x, weight, bias)
    for least in (0, 1 << 60):
        monkeypatch.setattr(products, "ONEDNN_MACS", least)
        found = products.gemm(x, weight, bias, after)
        torch.testing.assert_close(found, expected if after is None else after(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", [0, 1 << 40], ids=["learner by learner", "by a mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_cutting_zeroes_what_is_not_run_and_nothing_else(kind: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "FEW", few)
    choice, bounds = choices(kind), BOUNDS["uneven"]
    (order,) = ops.sort_tokens(choice[:, None], 3)
    width = torch.tensor(bounds)[order.choice]
    for first, last in ((0, 12), (1, 7)):
        h = torch.ones(len(choice), 2, last - first)
        ops.cut_(h, order, bounds, first)
        expected = (torch.arange(first, last) < width[:, None]).float()[:, None].expand_as(h)
        assert torch.equal(h, expected)


def test_all_groups_are_sorted_at_once() -> None:
    choice = torch.randint(0, 4, (23, 3))
    whole = ops.sort_tokens(choice, 3)
    for g, order in enumerate(whole):
        assert order.counts == [(choice[:, g] > n).sum().item() for n in range(3)]
        assert torch.equal(choice[:, g][order.index], order.choice)
        assert torch.equal(order.choice[order.inverse], choice[:, g])
    decision = Decision(choice)
    first, second = decision.group(0).order, decision.group(2).order
    assert first is not None
    assert second is not None
    assert torch.equal(first(3).choice, whole[0].choice)
    assert torch.equal(second(3).choice, whole[2].choice)
    assert len(decision._orders) == 3  # sorted by the first to ask


@torch.no_grad()
def test_what_stays_dense_is_still_the_linear_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x, state = torch.randn(2, 40, 64), model.state_dict()
    expected = model(x)
    fast_products_(model)
    assert [type(m) for m in model] == [Dense, torch.nn.GELU, Dense]
    assert isinstance(model[0], torch.nn.Linear)
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        model(x).sum().backward()
    assert model[0].weight.grad is not None
