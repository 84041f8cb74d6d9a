"""Chains of cut convolutions and routed partial convolutions: every path against the plain reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from acmize.branches import PartialBranches
from acmize.channels import ChannelChain
from acmize.cost import count_macs
from acmize.cut import Between, CutLayer, chain_macs, steps
from acmize.decision import Decision, hard_keep
from acmize.gates import DamageGate, GateSpec, choosing
from acmize.ops import even_bounds, use_backend
from acmize.recording import record
from acmize.samples import grouped, in_groups

NUM = 4


def noisy(module: nn.Module) -> nn.Module:
    """Random norms and biases, so that no term is right only for being zero."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                tensor.data.normal_(0.5, 0.5)  # pyright: ignore[reportOptionalMemberAccess]
            part.running_var.data.uniform_(0.5, 2.0)  # pyright: ignore[reportOptionalMemberAccess]
        elif isinstance(part, CutLayer):
            for tensor in (part.bias, part.learner_bias):
                if tensor is not None:
                    tensor.data.normal_()
    return module.eval()


def gate(dim: int, macs: tuple[int, ...], min_choice: int = 0) -> DamageGate:
    return DamageGate(
        GateSpec(dim=dim, hidden=4, learner_macs=(macs,), gate_macs=(0,), macs_total=1, min_choice=min_choice)
    )


def chain(kind: str) -> tuple[ChannelChain, torch.Tensor, list[int]]:
    """A chain of a kind, an input, and the output positions of its layers."""
    x, bounds = torch.randn(6, 6, 9, 9), (even_bounds(10, NUM), even_bounds(8, NUM))
    bn = nn.BatchNorm2d
    parts: dict[str, tuple[list[nn.Module], list[list[nn.Module]], tuple[Any, ...], list[int]]] = {
        "basic": (
            [nn.Conv2d(6, 10, 3, 2, 1, bias=False), nn.Conv2d(10, 7, 3, padding=1, bias=False)],
            [[bn(10), nn.ReLU(inplace=True)]], bounds[:1], [25, 25],
        ),
        "bottleneck": (
            [nn.Conv2d(6, 10, 1, bias=False), nn.Conv2d(10, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 7, 1)],
            [[bn(10), nn.ReLU()], [bn(8), nn.ReLU()]], bounds, [81, 25, 25],
        ),
        "inverted": (
            [nn.Conv2d(6, 10, 1, bias=False), Conv2dSame(10, 10, 3, 2, groups=10, bias=False), nn.Conv2d(10, 7, 1)],
            [[BatchNormAct2d(10)], [BatchNormAct2d(10, act_layer=nn.ReLU6)]], (bounds[0], bounds[0]), [81, 25, 25],
        ),
        "vgg": (
            [nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 7, 3, padding=1)],
            [[nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)], [bn(8), nn.ReLU(inplace=True)]], bounds, [81, 16, 16],
        ),
        "linear": ([nn.Linear(6, 10), nn.Linear(10, 7)], [[nn.GELU(), nn.Dropout(0.1)]], bounds[:1], [81, 81]),
    }  # fmt: skip
    like, between, inner, positions = parts[kind]
    layers = [
        CutLayer(m, inner[i - 1] if i else None, inner[i] if i < len(inner) else None) for i, m in enumerate(like)
    ]
    totals = [chain_macs(layers, positions, k) for k in range(NUM + 1)]
    made = ChannelChain(layers, [Between(b) for b in between], inner, gate(6, steps(totals)), ("a",))
    noisy(made)
    return made, x.permute(0, 2, 3, 1) if kind == "linear" else x, positions


KINDS = ("basic", "bottleneck", "inverted", "vgg", "linear")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slices_equal_masks(kind: str) -> None:
    made, x, _ = chain(kind)
    choice = torch.tensor([0, 1, 2, 3, 4, 1])[:, None]
    with choosing(made, lambda *_: choice):
        fast = made(x)
        with use_backend("masked"):
            masked = made(x)
    torch.testing.assert_close(fast, masked, rtol=1e-4, atol=1e-4)
    assert (masked - made.forward_reference(x, Decision(torch.full_like(choice, NUM)))).abs().max() > 1e-2
    for i in range(len(x)):  # a sample alone
        with choosing(made, lambda *_, i=i: choice[i : i + 1]):
            torch.testing.assert_close(made(x[i : i + 1]), fast[i : i + 1], rtol=1e-4, atol=1e-4)
    with choosing(made, lambda *_: choice[:0]):
        assert made(x[:0]).shape == (0, *fast.shape[1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_width_is_the_plain_chain(kind: str) -> None:
    made, x, _ = chain(kind)
    y = x
    for i, layer in enumerate(made.layers):
        cut: Any = layer
        bias = None if cut.bias is None else cut.bias + (0 if cut.learner_bias is None else cut.learner_bias.sum(0))
        y = cut._product(y, cut.weight, bias)
        y = made.between[i](y) if i < len(made.between) else y
    with choosing(made, lambda g, v: torch.full((len(v), 1), NUM)):
        torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_macs_are_those_counted(kind: str) -> None:
    made, x, _ = chain(kind)
    gate_macs = count_macs(made.gate, x.mean(made.positions))
    for k in range(NUM + 1):
        choice = torch.full((len(x), 1), k)
        with choosing(made, lambda *_, c=choice: c), record(made, len(x)) as seen:
            counted = count_macs(made, x)
        assert counted == seen.macs["a"][0].sum().item()  # `choose` takes the gate's place, so its work is not done
    assert gate_macs > 0


def test_a_gradient_reaches_keep_and_equals_what_a_learner_adds() -> None:
    """The output is linear in `keep` of the last inner activation of a two-layer chain."""
    made, x, _ = chain("basic")
    keep = hard_keep(torch.full((len(x), 1), NUM), NUM).float().requires_grad_()
    target = torch.randn_like(made.forward_reference(x, Decision(torch.full((len(x), 1), NUM))))
    (grad,) = torch.autograd.grad(
        (made.forward_reference(x, Decision(torch.full((len(x), 1), NUM), keep)) * target).sum(), keep
    )
    with torch.no_grad():
        each = [made.run(x, k).mul(target).sum((1, 2, 3)) for k in range(NUM + 1)]
        left_out = grad[:, 0].flip(-1).cumsum(-1).flip(-1)
        assert left_out.abs().min() > 1e-3
        for k in range(NUM):
            torch.testing.assert_close(left_out[:, k], each[NUM] - each[k], rtol=1e-3, atol=1e-3)


def test_training_differentiates_every_parameter() -> None:
    made, x, _ = chain("bottleneck")
    made.train()
    made.gate.price.fill_(1e-3)
    made(x).square().sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if name != "gate.level")


def test_samples_of_one_choice_run_together() -> None:
    called: list[tuple[int, int]] = []

    def run(x: torch.Tensor, choice: int) -> torch.Tensor:
        called.append((choice, len(x)))
        return x * choice

    x, choice = torch.randn(5, 3), torch.tensor([2, 0, 2, 1, 0])
    torch.testing.assert_close(in_groups((x,), grouped(choice), run), x * choice[:, None])
    assert called == [(0, 2), (1, 1), (2, 2)]


# --- branches -------------------------------------------------------------------------------------------------


def branches() -> tuple[PartialBranches, torch.Tensor]:
    made = PartialBranches((2, 4, 8), gate(16, (4 * 9 * 25, 12 * 9 * 25, 48 * 9 * 25), 1), ("a",))
    return made.eval(), torch.randn(5, 16, 5, 5)


@torch.no_grad()
def test_routed_branches_equal_the_reference() -> None:
    made, x = branches()
    choice = torch.tensor([1, 3, 2, 2, 1])[:, None]
    with choosing(made, lambda *_: choice), record(made, len(x)) as seen:
        routed = made(x)
        assert count_macs(made, x) == seen.macs["a"][0].sum().item()
    torch.testing.assert_close(routed, made.forward_reference(x, Decision(choice)), rtol=1e-4, atol=1e-5)
    each = made.all_branches(x)
    assert (each[0] - each[1]).abs().max() > 1e-2
    for i, k in enumerate(choice[:, 0]):
        torch.testing.assert_close(routed[i], each[k - 1][i], rtol=1e-4, atol=1e-5)
        with choosing(made, lambda *_, i=i: choice[i : i + 1]):
            torch.testing.assert_close(made(x[i : i + 1]), routed[i : i + 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(made(x[:0]), x[:0])


@torch.no_grad()
def test_soft_weights_mix_the_branches() -> None:
    made, x = branches()
    p = torch.rand(len(x), 3).softmax(-1)
    keep = p.flip(-1).cumsum(-1).flip(-1)[:, None]
    mixed = made.forward_reference(x, Decision(torch.full((len(x), 1), 3), keep))
    expected = sum(w[:, None, None, None] * y for w, y in zip(p.unbind(1), made.all_branches(x), strict=True))
    torch.testing.assert_close(mixed, expected)


def test_deep_copies_do_not_share() -> None:
    made, _ = branches()
    other = copy.deepcopy(made)
    assert other.convs[0].weight is not made.convs[0].weight
