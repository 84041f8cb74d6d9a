"""A latency as a budget: the largest share of the dense MACs whose batches keep a number of milliseconds here.

The time of a budget is measured on this device and on real inputs, not predicted; the price stays that of MACs, so the
time only says how far to turn the one dial.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from acmize.bench import placed
from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.timing import WARMUP, Call, Setting, draws, interleaved, percentiles, threads

log = logging.getLogger("acmize")

CLOSE = 0.01  # share of the dense MACs at which the search ends


def parse_budget(text: str) -> tuple[float | None, float | None]:
    """A share of the MACs or a time: "0.5" -> (0.5, None), "20ms" -> (None, 20.0).

    Raises:
        AcmizeError: neither.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(ms)?\s*", text, flags=re.IGNORECASE)
    try:
        value = float(found[1]) if found else float("nan")
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise AcmizeError(f"budget: found {text!r}, expected a share such as 0.5 or a time such as 20ms")
    return (None, value) if found and found[2] else (value, None)


def budget_for(
    model: Any, images: Tensor, target_ms: float, *, batch_size: int = 1, setting: Setting
) -> dict[str, Any]:
    """Find the largest budget whose median time for a batch is at most `target_ms`; the model is left as it was.

    Args:
        model: adaptive, see `hub.Adaptive`.
        images: (N, C, H, W) real inputs.
        target_ms: milliseconds of a batch.
        batch_size: images in a batch.
        setting: device, dtype, threads, repeats, seed.

    Returns:
        target_ms, batch_size, device, threads, dtype; met; budget: the one found, or the lowest there is if even that
        takes longer; table: budget and latency_ms of all that were timed, falling.

    Raises:
        AcmizeError: more images in a batch than there are.
    """
    if not 1 <= batch_size <= len(images):
        raise AcmizeError(f"batch: found {batch_size}, expected 1 to {len(images)}, the images there are; change one")
    made, images = placed(model, setting), setting.place(images)
    low = max(min(made.calibration.budgets), made.plan.budget_range[0])
    with threads(setting.threads), evaluating(made), torch.inference_mode():
        timed = _timer(made, images, batch_size, setting)
        table = search(timed, target_ms, low, 1.0)
        told = setting.described()
    met = [budget for budget, spent in table.items() if spent["p50"] <= target_ms]
    rows = [{"budget": budget, "latency_ms": table[budget]} for budget in sorted(table, reverse=True)]
    best = max(met, default=min(table))
    return {"target_ms": target_ms, "batch_size": batch_size, **told, "met": bool(met), "budget": best, "table": rows}


def search(
    timed: Callable[[float], dict[str, float]], target_ms: float, low: float, high: float
) -> dict[float, dict[str, float]]:
    """Bisect between the ends on measured medians: budget -> milliseconds of all that were timed."""
    table = {high: timed(high)}
    if table[high]["p50"] <= target_ms:
        return table
    table[low] = timed(low)
    while table[low]["p50"] <= target_ms and high - low > CLOSE:
        middle = (low + high) / 2
        table[middle] = timed(middle)
        low, high = (middle, high) if table[middle]["p50"] <= target_ms else (low, middle)
    return table


def _timer(model: Any, images: Tensor, size: int, setting: Setting) -> Callable[[float], dict[str, float]]:
    """Budget -> percentiles of the milliseconds of batches drawn anew."""
    generator = setting.generator()

    def timed(budget: float) -> dict[str, float]:
        model.set_budget(budget)
        batches = (images[index] for index in draws(len(images), size, WARMUP + setting.repeats, generator))
        seconds = interleaved({"model": Call(model)}, batches, warmup=WARMUP, device=setting.device)["model"]
        found = percentiles(seconds)
        log.info("budget %.3f: %.2f ms a batch of %d", budget, found["p50"], size)
        return found

    return timed


__all__ = ["budget_for", "parse_budget", "search"]
