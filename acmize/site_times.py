"""Which sites pay on this device: the time of each one's place in the model, dense and with learners.

MACs are not time. A gate, a sort and small products can cost more than the learners that are left out; where they do
depends on the device, the width and the batch. Both models run in turns on the same inputs; each token's choices are
drawn evenly, so half of the learners run in the mean. Merging is left out: it shortens both alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from acmize.cost import evaluating
from acmize.environment import keep_memory
from acmize.fusion import fuse_
from acmize.gates import Choose, Gate, choosing
from acmize.inputs import Batch, forward
from acmize.insert import convert_
from acmize.layers import fast_products_
from acmize.plan import Plan, PlanEntry

WARMUP, ROUNDS = 3, 9


@dataclass(frozen=True)
class SiteTime:
    """Milliseconds of a batch in one place, mean over the places of equal shape; `names` are the plan's entries."""

    names: tuple[str, ...]
    dense_ms: float
    adaptive_ms: float

    @property
    def pays(self) -> bool:
        """Whether half of the learners take less time than the dense layers."""
        return self.adaptive_ms < self.dense_ms


def site_times(dense: nn.Module, plan: Plan, inputs: Batch, seed: int = 0) -> list[SiteTime]:
    """Time the places of a plan's sites; those that share a gate are one place (an attention with its projections).

    Args:
        dense: the model before conversion; left as it is.
        plan: what would be converted.
        inputs: a batch, on the device and of the size that matters.
        seed: of the random choices.
    """
    keep_memory()  # or the dense layers, whose results are the larger ones, pay for new pages at every call
    places = {gate_at: (_place(entries), entries) for gate_at, entries in plan.by_gate().items()}
    adaptive = convert_(copy.deepcopy(dense), replace(plan, merging=None))
    plain = copy.deepcopy(dense)
    fast_products_(plain)
    choose = _even(torch.Generator().manual_seed(seed))
    spent: dict[str, tuple[list[float], list[float]]] = {place: ([], []) for place, _ in places.values()}
    for place in spent:
        fuse_(plain.get_submodule(place))  # by itself, as what stands in its place: hooks would undo a larger one
    with evaluating(plain, adaptive), torch.inference_mode(), choosing(adaptive, choose):
        for number in range(WARMUP + ROUNDS):
            for side, model in enumerate((plain, adaptive)):
                with timed(model, list(spent)) as seconds:
                    forward(model, inputs)
                if number >= WARMUP:
                    for place, found in seconds.items():
                        spent[place][side].append(found)
    alike: dict[Any, list[tuple[str, list[PlanEntry]]]] = {}
    for place, entries in places.values():
        alike.setdefault(tuple(_shape(e) for e in entries), []).append((place, entries))
    out = []
    for group in alike.values():
        dense_ms, adaptive_ms = (1e3 * fmean(median(spent[place][side]) for place, _ in group) for side in (0, 1))
        out.append(SiteTime(tuple(e.fqn for _, entries in group for e in entries), dense_ms, adaptive_ms))
    return out


def _even(generator: torch.Generator) -> Choose:
    """Choices drawn evenly, once for each gate, at the price of the gate's own work."""
    drawn: dict[Gate, Tensor] = {}

    def choose(gate: Gate, x: Tensor) -> Tensor:
        gate.energies(x)
        if gate not in drawn:
            size = (*x.shape[:-1], gate.groups)
            drawn[gate] = torch.randint(gate.min_choice, gate.num_learners + 1, size, generator=generator).to(x.device)
        return drawn[gate]

    return choose


def _place(entries: list[PlanEntry]) -> str:
    """The innermost module that holds all layers of entries that share a gate."""
    paths = [path.split(".") for e in entries for path in (e.target, *e.roles.values())]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _shape(e: PlanEntry) -> tuple[Any, ...]:
    return e.kind, e.form, e.bounds, e.heads, e.learner_macs, e.tokens


@contextmanager
def timed(model: nn.Module, places: list[str]) -> Iterator[dict[str, float]]:
    """Seconds spent in each place, a module named by its path, while the context is open."""
    seconds: dict[str, float] = dict.fromkeys(places, 0.0)
    handles = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for place in places:
        module = model.get_submodule(place)
        began: list[float] = []
        before = lambda *_, began=began: began.append(now())  # noqa: E731
        after = lambda *_, began=began, place=place: seconds.update({place: seconds[place] + now() - began.pop()})  # noqa: E731
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["SiteTime", "site_times", "timed"]
