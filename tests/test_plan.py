"""The plan: pure, JSON, honest about MACs, refusals and what it can reach."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from tiny import CONFIG, Mine, Random, adapted, half_width, images, plan_of, vit
from torch import nn

from acmize import AcmConfig, AcmizeError, Plan, ops, products
from acmize.cost import count_macs
from acmize.gates import choosing, gates_of
from acmize.hosts import make_plan
from acmize.insert import convert_
from acmize.ops import use_backend


def test_planning_changes_nothing() -> None:
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    shape = [(name, type(m), m.training) for name, m in model.named_modules()]
    needs = [p.requires_grad for p in model.parameters()]
    plan_of(model)
    assert [(name, type(m), m.training) for name, m in model.named_modules()] == shape
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_frozen_plan() -> None:
    plan = plan_of(vit())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.macs_dense = 1  # pyright: ignore[reportAttributeAccessIssue]


def tampered() -> dict[str, Any]:
    def entry(**changes: Any) -> Any:
        return lambda d: d["entries"][0].update(changes)

    return {
        "schema": lambda d: d.update(schema=99),
        "no entries": lambda d: d.pop("entries"),
        "entries of another type": lambda d: d.update(entries=3),
        "unknown field": entry(evil=1),
        "missing field": lambda d: d["entries"][0].pop("fqn"),
        "bounds fall": entry(bounds=[0, 64, 32, 96, 128]),
        "bounds too few": entry(bounds=[0, 128]),
        "bounds not from 0": entry(bounds=[1, 32, 64, 96, 128]),
        "bounds huge": entry(bounds=[0, 1, 2, 3, 10**9]),
        "bounds of text": entry(bounds="abcde"),
        "min_choice": entry(min_choice=9),
        "method": lambda d: d.update(method="os.system"),
        "config": lambda d: d["config"].update(num_learners=-1),
        "unknown option": lambda d: d["config"].update(evil=1),
        "macs": lambda d: d.update(macs_dense="many"),
        "refused": lambda d: d.update(refused=[{"fqn": "a"}]),
    }


@pytest.mark.parametrize("how", tampered())
def test_a_tampered_plan_is_one_clear_error(how: str) -> None:
    d = json.loads(json.dumps(plan_of(vit()).to_dict()))
    tampered()[how](d)
    with pytest.raises(AcmizeError, match="plan: "):
        Plan.from_dict(d)


@pytest.mark.parametrize("d", [None, [], "plan", {}])
def test_something_else_is_no_plan(d: Any) -> None:
    with pytest.raises(AcmizeError, match="found schema"):
        Plan.from_dict(d)


def test_a_plan_that_does_not_fit_leaves_the_model_alone() -> None:
    plan = plan_of(vit(depth=3))
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AcmizeError, match=r"blocks\.2.*in the plan but not in this VisionTransformer"):
        convert_(model, plan)
    assert list(model.state_dict()) == list(before)


# --- sizes ----------------------------------------------------------------------------------------------------


def test_num_learners_and_learner_dim() -> None:
    plan = plan_of(vit(), AcmConfig(num_learners=3, gate_hidden=2))
    assert {e.num_learners for e in plan.entries} == {3}
    assert next(e for e in plan.entries if e.kind == "q").bounds == (0, 5, 11, 16)
    plan = plan_of(vit(), AcmConfig(num_learners=4, learner_dim=16, gate_hidden=2))
    assert {(e.kind == "mlp", e.num_learners) for e in plan.entries} == {(True, 8), (False, 4)}
    plan = plan_of(vit(), AcmConfig(num_learners=4, learner_dim=10**6, gate_hidden=2))
    assert not [e for e in plan.entries if e.kind == "mlp"]
    assert any("use --learner-dim" in r.reason for r in plan.refused)


def test_too_many_learners() -> None:
    plan = plan_of(vit(), AcmConfig(num_learners=32, gate_hidden=1))
    assert {e.kind for e in plan.entries} == {"mlp"}
    assert "use --num-learners 16 or less" in plan.refused[0].reason
    with pytest.raises(AcmizeError, match="use --num-learners 16 or less"):
        plan_of(vit(), AcmConfig(num_learners=1000))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_learners": 0}, "num_learners: found 0"),
        ({"learner_dim": 0}, "learner_dim: found 0"),
        ({"gate_hidden": 0}, "gate_hidden: found 0"),
        ({"gate": "guess"}, "gate: found 'guess', expected one of"),
        ({"projections": "all"}, "projections: found 'all'"),
    ],
)
def test_impossible_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcmConfig(**option)


def test_a_site_too_small_for_its_gate_is_refused() -> None:
    with pytest.raises(AcmizeError, match="too small: its gate would cost"):
        plan_of(vit(), AcmConfig(num_learners=4, gate_hidden=1000))
    plan = plan_of(vit(), AcmConfig(num_learners=4, gate_hidden=50))  # pays for the MLP, not for the projections
    assert {e.kind for e in plan.entries} == {"mlp"}
    assert sum("too small" in r.reason for r in plan.refused) == 2


def test_patterns() -> None:
    plan = plan_of(vit(), target_modules=["*.mlp"], exclude=["blocks.1.*"])
    assert [e.fqn for e in plan.entries] == ["blocks.0.mlp"]
    why = {r.fqn: r.reason for r in plan.refused}
    assert why["blocks.1.mlp"] == "excluded by --exclude blocks.1.*"
    assert why["blocks.0.attn.qkv.q"] == "not among --target-modules"
    for option in ({"exclude": ["*.nothing"]}, {"target_modules": ["*.mlp", "*.nothing"]}):
        with pytest.raises(AcmizeError, match=r"pattern '\*\.nothing' matches no site"):
            plan_of(vit(), **option)
    with pytest.raises(AcmizeError, match="nothing to convert"):
        plan_of(vit(), exclude=["blocks.*"])


def test_no_input_size() -> None:
    with pytest.raises(AcmizeError, match="pass example"):
        make_plan(Mine(), CONFIG, target_modules=["blocks.*:mlp(fc1,fc2)"])


# --- budgets --------------------------------------------------------------------------------------------------


def test_budget_range() -> None:
    plan = plan_of(vit())
    low, high = plan.budget_range
    sites = sum(e.macs for e in plan.entries)
    gates = sum(e.tokens * e.gate_macs for e in plan.entries)
    assert low == pytest.approx((plan.macs_dense - sites + gates) / plan.macs_dense)
    assert high == pytest.approx((plan.macs_dense + gates) / plan.macs_dense)
    plan.check_budget(low + 1e-6)
    plan.check_budget(1.0)
    with pytest.raises(AcmizeError, match=rf"cannot go below {low:.3f}; ask for"):
        plan.check_budget(low - 0.01)
    for budget in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(AcmizeError, match="above 0 and at most 1"):
            plan.check_budget(budget)


def test_the_floor_counts_the_least_learners() -> None:
    rank = AcmConfig(num_learners=4, gate_hidden=2, projections="lowrank")
    plan = plan_of(vit(), rank)
    assert {(e.kind == "mlp", e.min_choice) for e in plan.entries} == {(True, 0), (False, 1)}
    least = sum(e.tokens * (sum(e.learner_macs[: e.min_choice]) + e.gate_macs) for e in plan.entries)
    rest = plan.macs_dense - sum(e.macs for e in plan.entries)
    assert plan.budget_range[0] == pytest.approx((rest + least) / plan.macs_dense)


# --- MACs -----------------------------------------------------------------------------------------------------


def test_dense_macs_by_hand() -> None:
    tokens, d = 17, 32
    block = tokens * (4 * d * d + 2 * d * 4 * d) + 2 * tokens * tokens * d  # the attention product in full
    assert plan_of(vit()).macs_dense == 16 * 3 * 16 * d + 2 * block + d * 5


@torch.no_grad()
def test_what_is_computed_in_vain_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MOVE_MACS", 0)
    model, plan = adapted(vit())
    x, spent = images(3), {}
    for overhead in (0, 2000, 10**9):
        monkeypatch.setattr(ops, "OVERHEAD_MACS", overhead)
        with choosing(model, Random(1)):
            spent[overhead] = count_macs(model, x)
    runs = sum(e.num_learners for e in plan.entries)
    assert 0 < spent[2000] - spent[0] <= 2000 * ops.HEADS_OVERHEAD * runs
    assert spent[10**9] > spent[2000]


@torch.no_grad()
def test_products_by_onednn_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not products.onednn_for(torch.zeros(1)):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(ops, "OVERHEAD_MACS", 0)
    model, _ = adapted(vit())
    counted = {}
    for least in (1 << 60, 0):  # all by the default library, all by oneDNN
        monkeypatch.setattr(products, "ONEDNN_MACS", least)
        monkeypatch.setattr(ops, "rows_for", lambda count, *_: count)
        with choosing(model, Random(1)):
            counted[least] = count_macs(model, images(3))
    assert counted[0] == counted[1 << 60] > 0


@torch.no_grad()
def test_the_masked_backend_does_all_the_work() -> None:
    model, plan = adapted(vit())
    with choosing(model, half_width), use_backend("masked"):
        masked = count_macs(model, images(1))
    assert plan.macs_dense < masked < 1.2 * plan.macs_dense  # biases a choice are a small product each


def test_count_macs_leaves_the_model_alone_and_sees_fused_attention() -> None:
    model = vit().train()
    model.blocks[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    needs = [p.requires_grad for p in model.parameters()]
    counted = count_macs(model, images(1))
    assert [p.requires_grad for p in model.parameters()] == needs
    assert model.training
    linear = sum(m.weight.numel() * 17 for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n)
    assert counted - linear > 2 * 2 * 17 * 17 * 32  # the attention products are in it


def test_the_gates_own_cost() -> None:
    dense = vit()
    plan = plan_of(dense)
    model = convert_(copy.deepcopy(dense), plan)
    planned = sum(e.gate_macs for e in plan.entries)
    built = sum(m.weight.numel() for g in gates_of(model) for m in g.modules() if isinstance(m, nn.Linear))
    assert built <= planned <= built + len(plan.entries)
