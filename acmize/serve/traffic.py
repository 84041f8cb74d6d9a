"""A load to try a server with: requests at random times, which do not wait for each other as a loop of calls would."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from acmize.errors import AcmizeError
from acmize.serve.server import Answer, Server
from acmize.timing import percentiles


def arrivals(rates: Sequence[tuple[float, float]], seed: int = 0) -> list[list[float]]:
    """Seconds from the start at which requests arrive, for each phase of (requests a second, seconds): Poisson."""
    for rate, seconds in rates:
        if not (rate > 0 and seconds > 0):
            raise AcmizeError(f"rates: found {(rate, seconds)}, expected (requests a second, seconds), both above 0")
    draw, found = random.Random(seed), []
    for (rate, seconds), end in zip(rates, accumulate(seconds for _, seconds in rates), strict=True):
        phase, at = [], end - seconds
        while (at := at + draw.expovariate(rate)) < end:
            phase.append(at)
        found.append(phase)
    return found


def load(
    server: Server,
    inputs: Sequence[Tensor] | Tensor,
    rates: Sequence[tuple[float, float]],
    seed: int = 0,
    *,
    target: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Send requests at random times, whether or not the server keeps up, and tell how long they took.

    A request that was sent late, since this process was busy, still counts from when it should have been.

    Args:
        server: open, with nothing waiting.
        inputs: samples, sent in turn.
        rates: phases (requests a second, seconds).
        seed: of the arrivals.
        target: seconds; by default the controller's.
        sleep: seconds on the server's clock.

    Returns:
        {"target", "phases", "all"}. A phase, and all together, has requests, failed, latency_ms (p50, p95, p99, from
        arrival), throughput (answers a second until the last answer), budget (mean; None for a dense model) and
        over_target (share of the answers; None without a target).
    """
    if target is None and server.controller is not None:
        target = server.controller.config.target
    start, sent = server.clock(), []
    for times in arrivals(rates, seed):
        sent.append([])
        for at in times:
            if (left := start + at - server.clock()) > 0:
                sleep(left)
            sent[-1].append(server.submit(inputs[sum(map(len, sent)) % len(inputs)], arrived=start + at))
    server.flush()
    lengths = [seconds for _, seconds in rates]
    starts = [start + end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    rows = [_row(*phase, target) for phase in zip(sent, starts, lengths, strict=True)]
    return {
        "target": target,
        "phases": rows,
        "all": _row([a for row in sent for a in row], start, sum(lengths), target),
    }


def _row(answers: list[Answer], start: float, seconds: float, target: float | None) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.cancelled() and answer.exception() is None]
    took = [answer.latency for answer in good if answer.latency is not None]
    spent = max([seconds, *(answer.arrived + (answer.latency or 0.0) - start for answer in good)])
    budgets = [answer.budget for answer in good if answer.budget is not None]
    latency = {k: v for k, v in percentiles(took).items() if k != "p5"} if took else None
    over = None if target is None or not took else sum(t > target for t in took) / len(took)
    return {
        "requests": len(answers), "failed": len(answers) - len(good), "latency_ms": latency,
        "throughput": len(good) / spent, "budget": statistics.fmean(budgets) if budgets else None, "over_target": over,
    }  # fmt: skip
