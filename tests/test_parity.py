"""Every method on every host: exact when inserted, paths alike, samples alone, MACs as counted, saved bit by bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_cnn
import torch
from torch import Tensor, nn

from acmize import Plan, chain_runs, ops, samples
from acmize.cost import count_macs
from acmize.gates import Gate, choosing, full_width, gates_of, set_dial
from acmize.hosts import make_plan
from acmize.hub import from_pretrained, make_adaptive
from acmize.init import collect_moments, init_
from acmize.insert import convert_
from acmize.methods.ada_pconv import AdaPConvConfig
from acmize.methods.cosine_gate import CosineGateConfig
from acmize.methods.lag import LagConfig
from acmize.ops import use_backend
from acmize.phases.calibrate import Calibration, realised
from acmize.recording import record


@dataclass(frozen=True)
class Case:
    """A method's config, what builds the dense model, its inputs (model, count, seed), and sites of one's own."""

    config: Any
    build: Callable[[], Any]
    inputs: Callable[[Any, int, int], Tensor] = lambda _, count, seed: tiny_cnn.images(count, seed)
    sites: dict[str, Any] = field(default_factory=dict)


MINE = ["blocks.*.attn:attention(q, k, v, out, heads=2)", "blocks.*:mlp(fc1, fc2)"]
ACM = {**tiny.HOSTS, "own": lambda: tiny.Mine().eval()}
COSINE, LAG = CosineGateConfig(gate_hidden=4), LagConfig(num_learners=4, gate_hidden=2)
ONE = {  # other configs, on one host each
    "cosine-gate plain": Case(CosineGateConfig(gate="plain", gate_hidden=4), tiny_cnn.BLOCKS["resnet basic"]),
    "cosine-gate damage": Case(CosineGateConfig(gate="damage", gate_hidden=4), tiny_cnn.BLOCKS["resnet basic"]),
    "cosine-gate oracle": Case(CosineGateConfig(mode="oracle", gate_hidden=4), tiny_cnn.BLOCKS["resnet basic"]),
    "lag logistic": Case(LagConfig(num_learners=4, gate_hidden=2, gate="logistic"), tiny_cnn.CHAINS["resnet basic"]),
    "ada-pconv damage": Case(AdaPConvConfig(gate="damage", gate_hidden=4), tiny_cnn.fasternet),
    "ada-pconv soft": Case(AdaPConvConfig(mode="soft"), tiny_cnn.fasternet),
}
CASES = {
    **{f"acm: {n}": Case(tiny.CONFIG, b, tiny.inputs_for, {"target_modules": MINE} if n == "own" else {})
       for n, b in ACM.items()},
    **{f"cosine-gate: {n}": Case(COSINE, b) for n, b in tiny_cnn.BLOCKS.items()},
    **{f"lag: {n}": Case(LAG, b) for n, b in tiny_cnn.CHAINS.items()},
    **{f"ada-pconv: {n}": Case(AdaPConvConfig(), b) for n, b in tiny_cnn.PARTIAL.items()},
    **ONE,
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A dense model, its conversion with gates by which samples differ, and what fresh gates gave."""

    dense: nn.Module
    model: nn.Module
    plan: Plan
    calibration: Calibration
    x: Tensor
    inserted: Tensor


def free(model: nn.Module) -> bool:
    """Whether there is anything to choose: the published Ada-PConv runs everything."""
    return any(g.min_choice < g.num_learners for g in gates_of(model))


def shares(model: nn.Module, plan: Plan, x: Tensor, dial: float) -> tuple[float, float, float]:
    """How much samples differ in their MACs at a position of the dial; the dial; their mean."""
    set_dial(model, dial)
    found = realised(model, plan, [x])
    return found.std().item(), dial, found.mean().item()


@torch.no_grad()
def differ(gate: Gate, x_MD: Tensor) -> None:
    """Random weights on standardised inputs, so that samples decide differently."""
    first = next(m for m in gate.modules() if isinstance(m, nn.Linear))
    for p in gate.parameters():
        p.normal_()
    first.weight.div_(x_MD.std(0) + 1e-6)
    first.bias.sub_(first.weight @ x_MD.mean(0))


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any) -> Pair:
    case = CASES[request.param]
    torch.manual_seed(0)
    dense = case.build()
    x = case.inputs(dense, 6, 2)
    plan = make_plan(dense, case.config, example=(x[:1],), **case.sites)
    model = convert_(copy.deepcopy(dense), plan).eval()
    init_(model, dense, plan, collect_moments(dense, plan, [case.inputs(dense, 16, 1)]))
    with torch.no_grad(), record(model, len(x), keep_inputs=True) as seen:
        inserted = model(x)
    for module, gate_input, _ in seen.seen:
        differ(module.gate, gate_input.flatten(0, -2))  # pyright: ignore[reportArgumentType]
    spread, dial, budget = max((shares(model, plan, x, d / 10) for d in range(2, 10)), key=lambda found: found[0])
    assert spread > 0 or not free(model), "samples must differ in what they run"
    calibration = Calibration(budgets=(min(1.0, max(budget, plan.budget_range[0])),), dials=(dial,))
    set_dial(model, dial)
    return Pair(dense, model, plan, calibration, x, inserted)


def close(found: Tensor, expected: Tensor, within: float) -> None:
    scale = expected.std()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=within)


@torch.no_grad()
def test_inserted_it_is_the_dense_model(pair: Pair) -> None:
    logits = pair.dense(pair.x)
    if free(pair.model):
        with choosing(pair.model, tiny.Random(0)):
            assert (pair.model(pair.x) - logits).abs().max() > 1e-2 * logits.std(), "it cuts something"
    for backend in ("masked", "sorted"):
        with choosing(pair.model, full_width), use_backend(backend):
            close(pair.model(pair.x), logits, 1e-4)
    if free(pair.model):  # a soft router mixes three branches from the start
        close(pair.inserted, logits, 1e-4)


@torch.no_grad()
def test_paths_agree(pair: Pair) -> None:
    x = pair.x.clone()
    with choosing(pair.model, tiny.Random(0)), use_backend("masked"):
        masked = pair.model(x)
    with choosing(pair.model, tiny.Random(0)), use_backend("sorted"):
        close(pair.model(x), masked, 2e-5)
    with use_backend("masked"):
        masked = pair.model(x)
    close(pair.model(x), masked, 2e-5)
    assert torch.equal(x, pair.x), "activations in place must not reach the input"


@torch.no_grad()
def test_batch_mates_do_not_matter(pair: Pair) -> None:
    together = pair.model(pair.x)
    for i in range(len(pair.x)):
        close(pair.model(pair.x[i : i + 1]) / together.std(), together[i : i + 1] / together.std(), 2e-5)


@pytest.mark.parametrize("choices", ["random", "full", "own"])
@torch.no_grad()
def test_macs_are_those_of_the_work_done(pair: Pair, choices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OVERHEAD_MACS", "MOVE_MACS"):  # no token computed in vain, to save a product or a move
        monkeypatch.setattr(ops, name, 0)
    monkeypatch.setattr(samples, "ROWS", 1)  # nor a sample
    for name in ("GROUP_MACS", "MOVE_MACS"):  # nor a channel, to run a batch together
        monkeypatch.setattr(chain_runs, name, 0)
    model, plan, x = pair.model, pair.plan, pair.x
    assert plan.macs_dense == count_macs(pair.dense, x[:1])
    if choices != "own" and not free(pair.model):
        pytest.skip("it runs everything, whatever is asked for")
    how = {"random": tiny.Random(1), "full": full_width}.get(choices)

    def choose(gate: Gate, y: Tensor) -> Tensor:
        gate.energies(y)  # the gate's own work, which an overriding choice would spare
        assert how is not None
        return how(gate, y)

    with choosing(model, choose if how else None), use_backend("sorted"):
        with record(model, len(x)) as seen:
            counted = count_macs(model, x)
        if how is None:
            assert count_macs(model, x) == counted, "watched or not, the same work"
    analytic = len(x) * plan.macs_rest() + seen.executed().double().sum().item()
    # a gate of G groups rounds their shares of its first layer up: less than a MAC a token for each group but one
    slack = len(x) * sum(entries[0].tokens * (len(entries) - 1) for entries in plan.by_gate().values())
    assert counted <= analytic <= counted + slack


@torch.no_grad()
def test_saved_and_loaded_bit_by_bit(pair: Pair, tmp_path: Path) -> None:
    assert Plan.from_dict(json.loads(json.dumps(pair.plan.to_dict()))) == pair.plan
    base = {"library": "module", "architecture": type(pair.dense).__name__, "kwargs": {}, "pretrained_cfg": {}}
    made = make_adaptive(copy.deepcopy(pair.model), pair.plan, pair.calibration, base)
    if free(pair.model):
        made.set_budget(pair.calibration.budgets[0])
    made.save_pretrained(tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out", model=copy.deepcopy(pair.dense))
    expected = made(pair.x)
    assert (expected - pair.dense(pair.x)).abs().max() > 1e-3 * expected.std()
    assert torch.equal(loaded(pair.x), expected)
