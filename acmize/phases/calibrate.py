"""Any budget: find the position of the dial whose realised compute is the one asked for.

The gates change the inputs of later sites, so the compute is measured by running the gated model on calibration data,
never predicted from stored inputs. Budget = mean executed MACs of the whole converted model, gates included, divided by
the dense model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.cost import evaluating
from acmize.gates import set_dial
from acmize.hosts_speech import DECODER_INPUTS
from acmize.inputs import Batch, Inputs, forward
from acmize.methods.token_merging import schedule_of, set_schedule
from acmize.plan import Plan
from acmize.recording import record

TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A table from budgets to positions of the dial; `set_budget` interpolates in it.

    Attributes:
        budgets: share of the dense MACs, falling.
        dials: the position in [0, 1] that realises each.
    """

    budgets: tuple[float, ...]
    dials: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.dials) != len(self.budgets) or not self.dials:
            found = f"{len(self.dials)} dials and {len(self.budgets)} budgets"
            raise ValueError(f"calibration: found {found}, expected as many, and at least one")
        if list(self.budgets) != sorted(self.budgets, reverse=True) or not all(0 <= d <= 1 for d in self.dials):
            raise ValueError("calibration: budgets must fall and dials lie in [0, 1]")

    def dial(self, budget: float) -> float:
        """The dial for a budget, linear between the table's rows and clamped at its ends."""
        rows = list(zip(self.budgets, self.dials, strict=True))
        for (high, near), (low, far) in pairwise(rows):
            if low <= budget <= high:
                share = (high - budget) / (high - low) if high > low else 0.0
                return near + share * (far - near)
        return rows[0][1] if budget > rows[0][0] else rows[-1][1]

    def __add__(self, other: Calibration) -> Calibration:
        """The rows of both tables; where both have a row, this one's."""
        rows = dict(zip((*other.budgets, *self.budgets), (*other.dials, *self.dials), strict=True))
        budgets = tuple(sorted(rows, reverse=True))
        return Calibration(budgets=budgets, dials=tuple(rows[b] for b in budgets))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"budgets": list(self.budgets), "dials": list(self.dials)}


def realised(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> Tensor:
    """(samples,) MACs of the whole model as its gates choose, as a share of the dense model's mean, set as it is.

    They are the executed ones where every module skips what is not chosen.
    """
    schedule, device = schedule_of(model), next(model.parameters()).device
    counted = model.get_submodule(plan.scope)  # what lies behind it, such as a decoder, need not run
    none = torch.zeros(0, dtype=torch.double, device=device)  # where there are more processes than samples
    spent, dense = [none], [none]
    with evaluating(model):
        for batch in parallel.spread(batches):
            with record(model, len(batch)) as seen:
                forward(counted, batch.without(*DECODER_INPUTS) if plan.scope and isinstance(batch, Inputs) else batch)
            macs = plan.account(seen.chosen().double(), seen.tokens, schedule)
            spent.append(macs[0])
            dense.append(macs[1])
    return (parallel.gather(torch.cat(spent)) / parallel.gather(torch.cat(dense)).mean()).cpu()


def calibrate(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    budgets: Sequence[float] = (0.9, 0.75, 0.6, 0.5, 0.4),
    *,
    tolerance: float = TOLERANCE / 4,
    max_steps: int = 12,
) -> Calibration:
    """Find the dial for each asked budget by bracketing on realised compute.

    Args:
        model: converted, gates fitted.
        plan: its plan.
        batches: calibration inputs (held out from what the gates were fitted on).
        budgets: to be met; others are interpolated.
        tolerance: of the realised budget on these inputs.
        max_steps: forwards over the batches for each budget at most.

    Raises:
        AcmizeError: a budget below the plan's floor.
    """
    rows: list[tuple[float, float]] = []
    seen: dict[tuple[int, ...], dict[float, float]] = {}  # schedule -> dial -> budget
    dial = 0.5
    for budget in sorted(set(budgets), reverse=True):
        plan.check_budget(budget)
        schedule = plan.schedule(budget)
        set_schedule(model, schedule)
        table = seen.setdefault(schedule, {})
        for _ in range(max_steps):
            if dial not in table:
                set_dial(model, dial)
                table[dial] = realised(model, plan, batches).mean().item()
            if abs(table[dial] - budget) <= tolerance:
                break
            guess = _next(table, budget)
            if guess in table:
                dial = guess
                break
            dial = guess
        dial = min(table, key=lambda d: abs(table[d] - budget))
        rows.append((budget, dial))
    return Calibration(budgets=tuple(b for b, _ in rows), dials=tuple(d for _, d in rows))


def _next(table: dict[float, float], budget: float) -> float:
    """A dial to try: inside the bracket by interpolation, kept off its ends, or a growing step outwards."""
    near = max((d for d, b in table.items() if b >= budget), default=None)
    far = min((d for d, b in table.items() if b < budget and (near is None or d > near)), default=None)
    step = 0.04 * 2 ** (len(table) - 1)
    if near is None:
        return max(0.0, min(table) - step)
    if far is None:
        return min(1.0, near + step)
    share = (table[near] - budget) / (table[near] - table[far])
    return near + min(max(share, 0.1), 0.9) * (far - near)


def set_budget(model: nn.Module, plan: Plan, calibration: Calibration, budget: float) -> None:
    """Turn the one dial, and merge as many tokens as belong to it, so that the model spends `budget` of the dense MACs.

    Raises:
        AcmizeError: a budget the plan cannot reach.
    """
    plan.check_budget(budget)
    set_schedule(model, plan.schedule(budget))
    set_dial(model, calibration.dial(budget))


def missed(asked: float, found: float) -> str | None:
    """What to say when a realised budget is further than `TOLERANCE` from the asked one; None when it is met."""
    if abs(asked - found) <= TOLERANCE:
        return None
    return f"budget {asked}: realised {found:.3f}, more than {TOLERANCE} away; calibrate on more data like this"
