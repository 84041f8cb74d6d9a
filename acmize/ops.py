"""The two primitives under every Adaptive Computation Module, and their dispatch.

A token i is given `choice[i]` learners, that is the leading `bounds[choice[i]]` units of a hidden activation.

    expand    h[i, :w_i] = x[i] @ W[:w_i].T + b[:w_i],  zero beyond      (output limited)
    contract  y[i]       = h[i, :w_i] @ W[:, :w_i].T + table[choice[i]]  (input limited)

With heads > 1 the units of every head are cut alike: W is seen as (heads, units, ...) and bounds count units of a head.

Backends
    masked   all the work, then a mask: differentiable, and the plain reference of every other backend.
    sorted   tokens sorted by choice once; learner n is then a dense GEMM on the first count[n] tokens.

Shapes: M tokens, D input width, H heads, U units of a head, O output width, N learners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("masked", "sorted")
_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the context, for tests and comparisons.

    Raises:
        ValueError: the name is not one of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: found {name!r}, expected one of {BACKENDS}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def pick_backend(x: Tensor) -> str:
    """The backend for input x: masked where gradients flow or autocast is on, else what is fastest on its device."""
    if _forced:
        return _forced[-1]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return "masked"
    if torch.is_autocast_enabled("cpu"):  # which does not reach the in-place products of `sorted`
        return "masked"
    return "sorted"


def even_bounds(units: int, num_learners: int) -> tuple[int, ...]:
    """Cumulative widths (0, ..., units) of `num_learners` learners as equal as whole units allow."""
    return tuple(round(units * n / num_learners) for n in range(num_learners + 1))


# --- masked: the reference ------------------------------------------------------------------------------------


def unit_mask(keep_MN: Tensor, bounds: Sequence[int]) -> Tensor:
    """(..., N) learners kept -> (..., U) units kept."""
    widths = [b - a for a, b in pairwise(bounds)]
    if len(set(widths)) == 1:
        return keep_MN.repeat_interleave(widths[0], dim=-1)
    return keep_MN.repeat_interleave(torch.tensor(widths, device=keep_MN.device), dim=-1, output_size=bounds[-1])


def mask_units(h: Tensor, keep_MN: Tensor, bounds: Sequence[int], heads: int) -> Tensor:
    """H (..., H * U) with every unit of a learner that does not run set to zero (times its soft weight)."""
    mask = unit_mask(keep_MN.to(h.dtype), bounds).unsqueeze(-2)
    return (h.unflatten(-1, (heads, -1)) * mask).flatten(-2)


# --- sorted: CPU inference ------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Tokens by falling choice: `index` (M,) into the tokens, `counts[n]` tokens that run learner n."""

    index: Tensor
    counts: list[int]


def sort_tokens(choice_M: Tensor, num_learners: int) -> Order:
    """Sort once; the counts are the only thing read back to the host."""
    index = choice_M.argsort(descending=True)
    runs = torch.bincount(choice_M, minlength=num_learners + 1)
    counts = runs.flip(0).cumsum(0).flip(0)[1:]
    return Order(index, counts.tolist())


def expand_sorted(
    x_MD: Tensor, weight: Tensor, bias: Tensor | None, order: Order, bounds: Sequence[int], heads: int
) -> Tensor:
    """Expand in sorted order: x of sorted tokens -> (M, H * U) in the original order, zero beyond each width."""
    x = x_MD.index_select(0, order.index)
    out = x.new_zeros(len(x), weight.shape[0])
    h = x.new_zeros(len(x), heads, weight.shape[0] // heads)
    w = weight.unflatten(0, (heads, -1))
    b = None if bias is None else bias.unflatten(0, (heads, -1))
    for count, lo, hi in _runs(order, bounds):
        part = F.linear(x[:count], w[:, lo:hi].flatten(0, 1), None if b is None else b[:, lo:hi].flatten())
        h[:count, :, lo:hi] = part.unflatten(-1, (heads, -1))
    return out.index_copy_(0, order.index, h.flatten(1))


def contract_sorted(
    h_MU: Tensor, weight: Tensor, table: Tensor, choice_M: Tensor, order: Order, bounds: Sequence[int], heads: int
) -> Tensor:
    """Contract in sorted order: h (M, H * U) -> (M, O) in the original order."""
    index = order.index
    y = table.index_select(0, choice_M.index_select(0, index))
    w = weight.unflatten(1, (heads, -1))
    h = h_MU.index_select(0, index).unflatten(-1, (heads, -1))
    for count, lo, hi in _runs(order, bounds):
        part = h[:count, :, lo:hi].flatten(1)
        y[:count].addmm_(part, w[:, :, lo:hi].flatten(1).T)
    return torch.empty_like(y).index_copy_(0, index, y)


def mlp_sorted(
    x_MD: Tensor,
    ups: Sequence[tuple[Tensor, Tensor | None]],
    act: Callable[..., Tensor],
    down: Tensor,
    table: Tensor,
    choice_M: Tensor,
    order: Order,
    bounds: Sequence[int],
) -> Tensor:
    """Expand, activation and contract without leaving the sorted order: (M, D) -> (M, O).

    Args:
        x_MD: tokens.
        ups: (weight, bias) of each expansion: one for a plain MLP, two (gate, value) for a gated one.
        act: takes one expanded slice per expansion and returns the hidden slice.
        down: weight (O, U) of the contraction.
        table: (N + 1, O) what is added for each choice.
        choice_M: learners each token runs.
        order: from `sort_tokens`.
        bounds: cumulative widths.
    """
    x = x_MD.index_select(0, order.index)
    y = table.index_select(0, choice_M.index_select(0, order.index))
    for count, lo, hi in _runs(order, bounds):
        hidden = act(*(F.linear(x[:count], w[lo:hi], None if b is None else b[lo:hi]) for w, b in ups))
        y[:count].addmm_(hidden, down[:, lo:hi].T)
    return torch.empty_like(y).index_copy_(0, order.index, y)


def _runs(order: Order, bounds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(tokens, first unit, last unit) of each GEMM; learners that the same tokens run are joined into one."""
    n, last = 0, len(order.counts)
    while n < last and order.counts[n] > 0:
        m = n
        while m + 1 < last and order.counts[m + 1] == order.counts[n]:
            m += 1
        yield order.counts[n], bounds[n], bounds[m + 1]
        n = m + 1
