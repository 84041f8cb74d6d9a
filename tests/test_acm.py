"""Adaptive modules against their slow references, and what the method plans and builds."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import HOSTS, Mine, adapted, half_width, images, inputs_for, plan_of, vit
from torch import Tensor, nn

from acmize import AcmConfig, Site
from acmize.adaptive import AcmMlp, AcmOut, AcmProjections
from acmize.decision import Decision, hard_keep
from acmize.gates import choosing, full_width, gates_of
from acmize.hosts import make_plan
from acmize.insert import convert_
from acmize.layers import Contract, Expand, LowRank
from acmize.ops import use_backend

BOUNDS = (0, 3, 7, 12)


class FixedGate(nn.Module):
    """Gives the choices it was told."""

    def __init__(self, choice: Tensor, keep: bool = False) -> None:
        super().__init__()
        self.num_learners, self.groups, self.min_choice = 3, choice.shape[-1], 0
        self.decision = Decision(choice, hard_keep(choice, 3).float().requires_grad_() if keep else None)

    def forward(self, _x: Tensor) -> Decision:
        return self.decision


def randomised(module: Any) -> Any:
    for p in module.parameters():
        nn.init.normal_(p)
    return module.eval()


def build(kind: str, gate: Any) -> tuple[Any, int]:
    """The module and its input width."""
    if kind in ("mlp", "gated mlp", "channels first"):
        second = Expand(6, 12, True, BOUNDS) if kind == "gated mlp" else None
        first = kind == "channels first"
        return AcmMlp(Expand(6, 12, True, BOUNDS), Contract(12, 5, BOUNDS), nn.SiLU(), gate, ("mlp",), second, first), 6
    if kind == "out":
        return AcmOut(Contract(24, 5, BOUNDS, heads=2), gate, ("out",)), 24
    parts: dict[str, nn.Module] = {"q": Expand(6, 24, True, BOUNDS, heads=2), "k": nn.Linear(6, 24)}
    parts["v"] = Expand(6, 24, True, BOUNDS, heads=2) if kind == "projections" else LowRank(6, 24, BOUNDS)
    return AcmProjections(parts, gate, ("q", "v")), 6


KINDS = {"mlp": 1, "gated mlp": 1, "channels first": 1, "out": 1, "projections": 2, "low rank": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 2)])
@torch.no_grad()
def test_every_backend_equals_the_reference(kind: str, shape: tuple[int, int]) -> None:
    tokens = (*shape, 4) if kind == "channels first" else shape
    gate = FixedGate(torch.randint(0, 4, (*tokens, KINDS[kind])))
    module, dim = build(kind, gate)
    randomised(module)
    x = torch.randn(*tokens, dim)
    reference = module.forward_reference(x, gate.decision)
    for backend in ("masked", "sorted"):
        with use_backend(backend):
            if kind == "channels first":
                y = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                y = module(x)
            torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_choices_are_the_references(kind: str) -> None:
    gate = FixedGate(torch.zeros(7, KINDS[kind], dtype=torch.long))
    module, dim = build(kind, gate)
    randomised(module)
    x = torch.randn(7, dim)
    every = module.all_choices(x)
    assert len(every) == KINDS[kind]
    for k in range(4):
        y = module.forward_reference(x, Decision(torch.full((7, KINDS[kind]), k)))
        for outputs, part in zip(every, module.split_output(y), strict=True):
            torch.testing.assert_close(outputs[:, k], part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_multiplies_each_learner_once(kind: str) -> None:
    """d y / d keep[n] is the learner's own output, whether it runs or not."""
    gate = FixedGate(torch.randint(0, 4, (7, KINDS[kind])), keep=True)
    module, dim = build(kind, gate)
    randomised(module)
    module.channels_first = False
    x = torch.randn(7, dim)
    outputs, y = module.all_choices(x), module(x)
    for g, (every, part) in enumerate(zip(outputs, module.split_output(y), strict=True)):
        direction = torch.randn_like(part)
        grad = torch.autograd.grad((part * direction).sum(), gate.decision.keep, retain_graph=True)[0][:, g]  # pyright: ignore
        learners = every.diff(dim=1)
        torch.testing.assert_close(grad, (learners * direction[:, None]).sum(-1), rtol=1e-3, atol=1e-3)


def test_a_split_mlp_keeps_each_learner_once_too() -> None:
    """The two halves share one decision; its gradient must not be counted in both."""
    x = torch.randn(20, 16)
    whole = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()
    plan = make_plan(whole, AcmConfig(num_learners=4, gate_hidden=1), example=(x[:1],), sites=[Site.mlp("0", "2")])
    model: Any = convert_(copy.deepcopy(whole), plan)
    randomised(model)
    keep = torch.ones(20, 1, 4, requires_grad=True)
    model[0].gate.forward = lambda _x: Decision(torch.full((20, 1), 4), keep)
    direction = torch.randn(20, 16)
    grad = torch.autograd.grad((model(x) * direction).sum(), keep)[0][:, 0]
    hidden = nn.functional.gelu(nn.functional.linear(x, model[0].fc1.weight, model[0].fc1.bias))
    learners = model[2].fc.all_choices(hidden).diff(dim=1)
    torch.testing.assert_close(grad, (learners * direction[:, None]).sum(-1), rtol=1e-3, atol=1e-3)


# --- the method -----------------------------------------------------------------------------------------------


def test_forms() -> None:
    rotated = plan_of(vit())
    assert {(e.kind, e.form, e.heads) for e in rotated.entries} == {
        ("mlp", "prefix", 1), ("q", "rotated", 2), ("k", "rotated", 2), ("v", "rotated", 2), ("out", "rotated", 2),
    }  # fmt: skip
    lowrank = plan_of(vit(), AcmConfig(num_learners=4, gate_hidden=2, projections="lowrank"))
    assert {e.form for e in lowrank.entries if e.kind != "mlp"} == {"lowrank"}
    mlps = plan_of(vit(), AcmConfig(num_learners=4, gate_hidden=2, projections="none"))
    assert {e.kind for e in mlps.entries} == {"mlp"}
    assert {r.reason for r in mlps.refused if "attn" in r.fqn} == {"projections are left dense (projections='none')"}


def test_the_published_rank_costs_what_the_dense_layer_cost() -> None:
    config = AcmConfig(num_learners=4, gate_hidden=2, projections="lowrank", init="random")
    plan = plan_of(vit(), config)
    d = 32
    for e in plan.entries:
        if e.form == "lowrank":
            assert e.bounds[-1] == (round((d * d + d) / (2 * d + 1)) // 4) * 4
            assert e.max_macs - e.tokens * e.gate_macs <= e.macs
            assert e.min_choice == 1


def test_one_gate_for_the_projections_of_a_fused_layer() -> None:
    plan = plan_of(vit())
    assert [len(v) for v in plan.by_gate().values()] == [4, 1, 4, 1]
    model, _ = adapted(vit())
    assert [g.groups for g in gates_of(model)] == [4, 1, 4, 1]


@torch.no_grad()
def test_every_learner_matters() -> None:
    dense = vit()
    model, plan = adapted(dense)
    outputs = []
    for k in range(5):
        with choosing(model, lambda gate, x, k=k: torch.full((*x.shape[:-1], gate.groups), k)):
            outputs.append(model(images()))
    gaps = [(a - b).abs().max().item() for a, b in pairwise(outputs)]
    assert min(gaps) > 1e-3
    torch.testing.assert_close(outputs[-1], dense(images()), rtol=0, atol=1e-4)
    assert plan.config.num_learners == 4


@pytest.mark.parametrize("name", ["vit", "convnext conv_mlp", "swin", "swiglu"])
def test_training_and_deepcopy(name: str) -> None:
    """A converted model trains (gradients for every parameter) and its copy decides for itself."""
    model, _ = adapted(HOSTS[name]())
    x = inputs_for(HOSTS[name](), 4)
    for g in gates_of(model):
        g.price.fill_(1 / float(g.cost.max()))
    model.train()
    model(x).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "level" not in n]
    assert missing == []
    model.eval()
    twin = copy.deepcopy(model)
    with torch.no_grad(), choosing(twin, half_width):
        cut = twin(x)
        with choosing(model, full_width):
            full = model(x)
        torch.testing.assert_close(twin(x), cut)
    assert (cut - full).abs().max() > 1e-3


@torch.no_grad()
def test_dtype_and_state_dict() -> None:
    dense = Mine().eval()
    targets = ["blocks.*.attn:attention(q,k,v,out,heads=2)", "blocks.*:mlp(fc1,fc2)"]
    model, plan = adapted(dense, target_modules=targets)
    again = convert_(Mine().eval(), plan)
    again.load_state_dict(model.state_dict())
    x = inputs_for(dense)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
