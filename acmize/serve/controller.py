"""Which budget the next batch gets, from how long requests wait. Pure: neither clock nor thread nor model.

Multiplicative decrease, additive increase, as in congestion control: a queue must shrink at once, quality may come back
slowly. Between two bounds of the pressure nothing happens, so that noise moves nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from acmize.errors import AcmizeError

WINDOW = 64  # latest requests whose p95 counts


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """How a `BudgetController` reacts. Its pressure is max(age of the oldest request, recent p95) / target.

    Attributes:
        target: seconds from arrival to answer that 95 % of the requests shall keep.
        low: smallest budget, a share of the dense MACs.
        high: largest budget, from which it starts.
        lower_at: pressure from which on the budget falls.
        raise_at: pressure up to which it may rise; between the two it stays, or falls if the queue grows.
        decrease: what a fall multiplies it by, once a batch.
        increase: what a rise adds, once a batch.
    """

    target: float
    low: float
    high: float
    lower_at: float = 0.6
    raise_at: float = 0.3
    decrease: float = 0.85
    increase: float = 0.01

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("target", 0 < self.target < math.inf, "seconds above 0"),
            ("low", 0 < self.low <= self.high <= 1, f"0 < low <= high <= 1, high being {self.high}"),
            ("raise_at", 0 < self.raise_at < self.lower_at <= 1, f"0 < raise_at < lower_at <= 1 ({self.lower_at})"),
            ("decrease", 0 < self.decrease < 1, "a factor between 0 and 1"),
            ("increase", 0 < self.increase < 1, "a share between 0 and 1"),
        ):
            if not good:
                raise AcmizeError(f"{name}: found {getattr(self, name)}, expected {expected}; choose another one")


class BudgetController:
    """Multiplicative decrease under pressure, additive increase in calm; `budget` is the latest decision."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config, self.budget = config, config.high
        self._recent, self._waited = deque[float](maxlen=WINDOW), 0

    @classmethod
    def of(cls, model: Any, target: float, **options: Any) -> BudgetController:
        """For an adaptive model: within the budgets it was evaluated at, else all that it is calibrated for.

        Args:
            model: see `hub.Adaptive`.
            target: p95 latency in seconds.
            options: further fields of `ControllerConfig`; `low` and `high` override the model's.

        Raises:
            AcmizeError: the model is dense, or an option is out of range.
        """
        if not hasattr(model, "calibration"):
            raise AcmizeError(f"model: found {type(model).__name__}, expected an adaptive one; see acmize.convert")
        # Calibration also has rows at the ends of what the plan can reach, where nobody has looked at the accuracy.
        budgets = [row["budget"] for row in model.results.get("results", [])] or model.calibration.budgets
        return cls(ControllerConfig(**{"target": target, "low": min(budgets), "high": max(budgets), **options}))

    def decide(self, *, waiting: int, oldest: float, finished: Sequence[float] = ()) -> float:
        """The budget of the next batch.

        Args:
            waiting: requests the next batch has no room for.
            oldest: seconds since the oldest unanswered request arrived.
            finished: seconds taken by each request answered since the last decision.
        """
        config, recent, grows = self.config, self._recent, waiting > self._waited
        self._waited = waiting
        recent.extend(finished)
        p95 = sorted(recent)[math.ceil(0.95 * len(recent)) - 1] if recent else 0.0
        pressure = max(oldest, p95) / config.target
        if pressure >= config.lower_at or (pressure > config.raise_at and grows):
            self.budget = max(config.low, self.budget * config.decrease)
            recent.clear()  # measured at another budget
        elif pressure <= config.raise_at and not waiting:
            self.budget = min(config.high, self.budget + config.increase)
        return self.budget
