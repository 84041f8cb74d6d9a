"""`acmize bench --ops`: the primitives of `ops` alone, beside PyTorch's linear layers of the same sizes.

Shapes: M tokens.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.timing import WARMUP, Call, Setting, interleaved, percentiles, threads

log = logging.getLogger("acmize")


@dataclass(frozen=True, kw_only=True)
class OpShape:
    """Sizes of the primitives; by default those of ViT-B.

    Attributes:
        dim: width of a token.
        hidden: units of the MLP.
        heads: of the attention.
    """

    dim: int = 768
    hidden: int = 3072
    heads: int = 12


@dataclass(frozen=True)
class _Op:
    """A primitive: dense and sparse call of an item (x, choices (groups, M)), and the bounds of its learners."""

    dense: Callable[[Any], object]
    sparse: Callable[[Any], object]
    bounds: tuple[int, ...]
    groups: int


def bench_ops(
    setting: Setting | None = None,
    *,
    shape: OpShape | None = None,
    tokens: Sequence[int] = (197, 1576),
    learners: Sequence[int] = (4, 8, 16),
) -> dict[str, Any]:
    """Time the primitives of `ops` alone: random widths, one half on average, new ones each call.

    The MLP (`ops.mlp`) is set beside fc1, GELU and fc2; the projections (`ops.expand` for q, k and v, each with a width
    of its own, and `ops.contract`) beside a fused qkv and an output projection; on the backend that is the default
    there, and with what it takes to sort.

    Returns:
        {"device", "threads", "dtype", "ops"}. An op has op, tokens, learners, macs_ratio, latency_ms, dense_latency_ms
        (with "form": "linear" layers, or the primitive at "full" width where that is faster), efficiency: dense
        median * macs_ratio / sparse median, 1 where every MAC left out is time saved, and efficiency_linear: the same
        with the median of PyTorch's linear layers.
    """
    setting, shape = setting or Setting(), shape or OpShape()
    generator, rows = setting.generator(), []
    with threads(setting.threads), torch.inference_mode():
        for count in tokens:
            for number in learners:
                for name, make in (("mlp", _mlp_op), ("projections", _projections_op)):
                    log.info("%s: %d tokens, %d learners", name, count, number)
                    op = make(shape, number, setting, generator)
                    row = {"op": name, "tokens": count, "learners": number}
                    rows.append({**row, **_bench_op(op, count, shape.dim, setting, generator)})
        told = setting.described()
    return {**told, "ops": rows}


def _bench_op(op: _Op, tokens: int, dim: int, setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    bounds, shares = torch.tensor(op.bounds, dtype=torch.float64), []

    def item() -> tuple[Tensor, Tensor]:
        choice = torch.randint(0, len(op.bounds), (op.groups, tokens), generator=generator)
        shares.append((bounds[choice] / bounds[-1]).mean().item())
        return setting.place(torch.randn(tokens, dim, generator=generator)), setting.place(choice)

    rounds = (item() for _ in range(WARMUP + setting.repeats))
    everything = setting.place(torch.full((op.groups, tokens), len(op.bounds) - 1))
    full = Call(lambda item: op.sparse((item[0], everything)))  # its products may be faster than those of `F.linear`
    calls = {"linear": Call(op.dense), "full": full, "sparse": Call(op.sparse)}
    seconds = interleaved(calls, rounds, device=setting.device)
    times = {name: percentiles(spent) for name, spent in seconds.items()}
    form = min(("linear", "full"), key=lambda name: times[name]["p50"])
    ratio, dense, sparse = statistics.fmean(shares[WARMUP:]), times[form], times["sparse"]
    over = {name: times[name]["p50"] * ratio / sparse["p50"] for name in (form, "linear")}
    told = {"macs_ratio": ratio, "latency_ms": sparse, "dense_latency_ms": {**dense, "form": form}}
    return {**told, "efficiency": over[form], "efficiency_linear": over["linear"]}


def _mlp_op(shape: OpShape, learners: int, setting: Setting, generator: torch.Generator) -> _Op:
    draw, act = _drawing(setting, generator), nn.GELU()
    up, bias = draw(shape.hidden, shape.dim), draw(shape.hidden)
    down, table = draw(shape.dim, shape.hidden), draw(learners + 1, shape.dim)
    columns = down.T.contiguous().T  # as `layers.Contract` keeps it
    bounds = ops.even_bounds(shape.hidden, learners)

    def dense(item: tuple[Tensor, Tensor]) -> Tensor:
        return F.linear(act(F.linear(item[0], up, bias)), down, table[-1])

    def sparse(item: tuple[Tensor, Tensor]) -> Tensor:
        x, (choice,) = item
        return ops.mlp(x, [(up, bias)], act, columns, table, choice, bounds)

    return _Op(dense, sparse, bounds, 1)


def _projections_op(shape: OpShape, learners: int, setting: Setting, generator: torch.Generator) -> _Op:
    draw, heads = _drawing(setting, generator), shape.heads
    qkv, bias, out = draw(3 * shape.dim, shape.dim), draw(3 * shape.dim), draw(shape.dim, shape.dim)
    table, columns = draw(learners + 1, shape.dim), out.T.contiguous().T
    parts = list(zip(qkv.chunk(3), bias.chunk(3), strict=True))
    bounds = ops.even_bounds(shape.dim // heads, learners)

    def dense(item: tuple[Tensor, Tensor]) -> Tensor:
        v = F.linear(item[0], qkv, bias)[:, -shape.dim :]
        return F.linear(v, out, table[-1])

    def sparse(item: tuple[Tensor, Tensor]) -> Tensor:
        x, choices = item
        _, _, v = (ops.expand(x, w, b, c, bounds, heads) for c, (w, b) in zip(choices[:3], parts, strict=True))
        return ops.contract(v, columns, table, choices[3], bounds, heads)

    return _Op(dense, sparse, bounds, 4)


def _drawing(setting: Setting, generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *size: setting.place(0.02 * torch.randn(*size, generator=generator))


__all__ = ["OpShape", "bench_ops"]
