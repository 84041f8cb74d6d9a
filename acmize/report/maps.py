"""Where in an image the compute goes: executed MACs of the adaptive sites over a grid of patches.

A token's MACs belong to the patches it stands for: those of a merged token are shared out evenly among the patches in
it, those of a prefix token (class, registers) and of a decision for the whole image are left out of the map or spread
over all of it.

Shapes: B samples, T tokens of a site, T0 tokens of the first block, P prefix tokens, (H, W) the grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acmize.merge_pairs import held_together
from acmize.methods.token_merging import tracing
from acmize.plan import PlanEntry
from acmize.recording import Recorder, record

LARGEST = 28  # rows or columns of the grid: finer ones cannot be seen
Maps = tuple[Tensor, Tensor | None]


def grid_of(tokens: int, prefix: int, size: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a site's tokens on an image of `size` (..., H, W), with or without prefix; None: no grid."""
    aspect = size[-2] / size[-1]
    for count in (tokens - prefix, tokens):
        rows = round(math.sqrt(max(count, 1) * aspect))
        if count > 1 and rows and count % rows == 0 and abs(rows / (count // rows) - aspect) < 0.01 * aspect:
            return rows, count // rows
    return None


def map_grid(model: Any) -> tuple[int, int] | None:
    """The finest grid among the sites of an adaptive model, no larger than `LARGEST`; None where none has a grid."""
    prefix, size = int(getattr(model, "num_prefix_tokens", 0)), model.plan.input_size
    found = [grid for e in model.plan.entries if (grid := grid_of(e.tokens, prefix, size)) is not None]
    if not found:
        return None
    rows, columns = max(found, key=math.prod)
    shrink = max(1, math.ceil(max(rows, columns) / LARGEST))
    return math.ceil(rows / shrink), math.ceil(columns / shrink)


@torch.no_grad()
def compute_maps(model: Any, x: Tensor, grid: tuple[int, int]) -> Maps:
    """Run images as the model is set, and say where its sites spent their MACs.

    Args:
        model: adaptive, in eval mode.
        x: (B, C, H, W) images.
        grid: from `map_grid`.

    Returns:
        (B, H, W) executed MACs of each place over the dense sites' MACs there, the gates left out, and (B, H, W)
        patches in the token that holds each patch behind the last block, None where nothing can be merged.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    with record(model, len(x)) as seen, tracing(model) as trace:
        model(x)
    total, dense = torch.zeros(len(x), *grid), 0.0
    for entry in model.plan.entries:
        spent = _spread(entry, seen, trace, prefix, model.plan.input_size)
        if spent is None:
            continue
        fine = F.interpolate(spent[:, None], _multiple(spent.shape[1:], grid), mode="nearest")
        total += F.adaptive_avg_pool2d(fine, grid)[:, 0]  # densities: a mean, whatever the two grids
        dense += entry.macs
    return total / max(dense, 1.0), _token_sizes(trace, prefix, model.plan.input_size, grid)


def _spread(entry: PlanEntry, seen: Recorder, trace: list[Tensor], prefix: int, size: tuple[int, ...]) -> Tensor | None:
    """(B, rows, columns) MACs of a site, as if each place were the whole image; None where tokens have no place."""
    choice = seen.per_token[entry.fqn].cpu()
    table = F.pad(torch.tensor(entry.learner_macs, dtype=torch.float32).cumsum(0), (1, 0))
    macs = table[choice]
    if choice.shape[1] == 1:
        return macs[..., None]
    if trace and entry.fqn.startswith("blocks."):
        holder = trace[int(entry.fqn.split(".")[1])].cpu()
        macs = macs.gather(1, holder) / held_together(holder)
    grid = grid_of(macs.shape[1], prefix, size)
    if grid is None:
        return None
    return macs[:, -math.prod(grid) :].unflatten(1, grid) * entry.tokens


def _token_sizes(trace: list[Tensor], prefix: int, size: tuple[int, ...], grid: tuple[int, int]) -> Tensor | None:
    """(B, H, W) patches in the token that holds each patch behind the last block."""
    if not trace or (first := grid_of(trace[-1].shape[1], prefix, size)) is None:
        return None
    sizes = held_together(trace[-1].cpu())[:, -math.prod(first) :].unflatten(1, first)
    return F.adaptive_max_pool2d(sizes[:, None], grid)[:, 0]


def _multiple(have: torch.Size, grid: tuple[int, int]) -> tuple[int, int]:
    """A size that both grids divide, so that repeating and averaging are exact."""
    rows, columns = (math.lcm(a, b) for a, b in zip(have, grid, strict=True))
    return rows, columns


__all__ = ["compute_maps", "grid_of", "map_grid"]
