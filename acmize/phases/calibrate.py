"""Any budget: find the position of the dial whose realised compute is the one asked for.

The gates change the inputs of later sites, so the compute is measured by running the gated model on calibration data,
never predicted from stored inputs. Budget = mean executed MACs of the whole converted model, gates included, divided by
the dense model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.gates import record, set_dial
from acmize.plan import Plan

TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A table from dial positions to realised budgets, falling; `set_budget` interpolates in it.

    Attributes:
        dials: rising positions in [0, 1].
        budgets: realised share of the dense MACs at each, falling.
    """

    dials: tuple[float, ...]
    budgets: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.dials) != len(self.budgets) or not self.dials:
            raise ValueError(
                f"calibration: found {len(self.dials)} dials and {len(self.budgets)} budgets, expected as many"
            )
        if list(self.dials) != sorted(self.dials) or list(self.budgets) != sorted(self.budgets, reverse=True):
            raise ValueError("calibration: dials must rise and budgets fall")

    def dial(self, budget: float) -> float:
        """The dial for a budget, linear between the table's rows and clamped at its ends."""
        rows = list(zip(self.budgets, self.dials, strict=True))
        for (high, near), (low, far) in zip(rows, rows[1:], strict=False):
            if low <= budget <= high:
                share = (high - budget) / (high - low) if high > low else 0.0
                return near + share * (far - near)
        return rows[0][1] if budget > rows[0][0] else rows[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"dials": list(self.dials), "budgets": list(self.budgets)}


def realised(model: nn.Module, plan: Plan, batches: Sequence[Tensor]) -> Tensor:
    """(samples,) executed MACs of the whole model, as a share of the dense model's, with the gates as they are."""
    shares = []
    with evaluating(model):
        for batch in batches:
            with record(model, len(batch)) as seen:
                model(batch)
            shares.append((plan.macs_fixed + seen.executed().double()) / plan.macs_dense)
    return torch.cat(shares).cpu()


def calibrate(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Tensor],
    budgets: Sequence[float] = (0.9, 0.75, 0.6, 0.5, 0.4),
    *,
    tolerance: float = TOLERANCE / 4,
    max_steps: int = 14,
) -> Calibration:
    """Measure the dial for each asked budget by bracketing on realised compute.

    Args:
        model: converted, gates fitted.
        plan: its plan.
        batches: calibration inputs (held out from what the gates were fitted on).
        budgets: to be met closely; others are interpolated.
        tolerance: of the realised budget on these inputs.
        max_steps: forwards over the batches for each budget at most.

    Raises:
        AcmizeError: a budget below the plan's floor.
    """
    table: dict[float, float] = {}

    def measure(dial: float) -> float:
        if dial not in table:
            set_dial(model, dial)
            table[dial] = realised(model, plan, batches).mean().item()
        return table[dial]

    highest, lowest = measure(0.0), measure(1.0)
    for budget in sorted(budgets, reverse=True):
        plan.check_budget(budget)
        if budget >= highest or budget <= lowest:
            continue
        for _ in range(max_steps):
            near = max((d for d, b in table.items() if b >= budget), default=0.0)
            far = min((d for d, b in table.items() if b < budget and d > near), default=1.0)
            if min(abs(table[near] - budget), abs(table[far] - budget)) < tolerance:
                break
            measure(_between(near, far, table[near], table[far], budget))
    return monotone(table)


def _between(near: float, far: float, high: float, low: float, budget: float) -> float:
    """A guess inside the bracket: linear interpolation, kept away from the ends so that the bracket always shrinks."""
    share = (high - budget) / (high - low)
    return near + min(max(share, 0.15), 0.85) * (far - near)


def monotone(table: dict[float, float]) -> Calibration:
    """Sort by dial and drop rows where the budget rises by noise."""
    dials, budgets = [], []
    for dial in sorted(table):
        if not budgets or table[dial] <= budgets[-1]:
            dials.append(dial)
            budgets.append(table[dial])
    return Calibration(dials=tuple(dials), budgets=tuple(budgets))


def set_budget(model: nn.Module, plan: Plan, calibration: Calibration, budget: float) -> None:
    """Turn the one dial so that the model spends `budget` of the dense MACs on data like the calibration data.

    Raises:
        AcmizeError: a budget the plan cannot reach.
    """
    plan.check_budget(budget)
    set_dial(model, calibration.dial(budget))


def missed(asked: float, found: float) -> str | None:
    """What to say when a realised budget is further than `TOLERANCE` from the asked one; None when it is met."""
    if abs(asked - found) <= TOLERANCE:
        return None
    return f"budget {asked}: realised {found:.3f}, more than {TOLERANCE} away; calibrate on more data like the evaluation's"


__all__ = ["AcmizeError", "Calibration", "calibrate", "missed", "monotone", "realised", "set_budget"]
