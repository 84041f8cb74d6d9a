"""Removal of what almost never runs: fewer parameters, where gates only leave work out.

At the largest budget that will be asked for, learners that run for at most a small share of samples (or tokens) are cut
off for good, and the budgets are calibrated again. What they added on average stays in the biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from acmize.controls import histograms
from acmize.errors import AcmizeError
from acmize.plan import Plan
from acmize.registry import method_for


def remove_dead_(model: nn.Module, plan: Plan, batches: Sequence[Tensor], share: float = 0.01) -> Plan:
    """Remove learners in place and return the plan of what is left; calibrate again after it.

    Args:
        model: converted, its gates set to the largest budget that is to be kept.
        plan: its plan.
        batches: calibration inputs, without labels.
        share: of samples that may run a learner that is removed.

    Raises:
        AcmizeError: the plan's method removes nothing.
    """
    method = method_for(plan.config)
    counts, modules = histograms(model, batches), dict(model.named_modules())
    entries = []
    for entry in plan.entries:
        keep = _last_used(counts[entry.fqn], share, max(1, entry.min_choice))
        if keep < entry.num_learners:
            made: Any = method.narrow(modules[entry.target], entry, keep)
            if made is None:
                raise AcmizeError(
                    f"method {method.name}: learners cannot be removed; found no way to narrow its modules"
                )
            entry = made
        entries.append(entry)
    return replace(plan, entries=tuple(entries))


def _last_used(counts: Tensor, share: float, least: int) -> int:
    """The smallest number of learners, `least` or more, that at most a share of samples goes beyond."""
    beyond = 1 - counts.double().cumsum(0) / counts.sum()
    return max(least, int((beyond > share + 1e-12).sum()))
