"""Which tokens are merged into which, and their weighted means: the arithmetic of `token_merging`.

Shapes: B samples, T tokens, D width, P prefix tokens (never merged), R pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def merge(x_BTD: Tensor, sizes_BT: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: the r cheapest of the best pairs (even token, odd token) become their weighted mean.

    Args:
        x_BTD: tokens.
        sizes_BT: patches in each.
        r: pairs to merge; at most half of the tokens behind the prefix.
        prefix: tokens at the front that are left alone.

    Returns:
        (B, T - r, D) tokens and their (B, T - r) sizes: prefix, even tokens that were not merged, odd tokens.
    """
    gone, kept, into = _pairs(x_BTD, sizes_BT, r, prefix)
    if not gone.shape[1]:
        return x_BTD, sizes_BT
    front = kept.shape[1] - (x_BTD.shape[1] - prefix) // 2  # tokens before the odd ones
    merged, old_sizes = rows_of(x_BTD, kept), sizes_BT.gather(1, kept)
    size_gone = sizes_BT.gather(1, gone)
    moved = rows_of(x_BTD, gone) * size_gone[..., None]
    target = _flat(into, merged.shape[1])
    new_sizes = old_sizes.flatten().index_add(0, target, size_gone.flatten()).view_as(old_sizes)
    merged[:, front:] *= old_sizes[:, front:, None]
    merged.flatten(0, 1).index_add_(0, target, moved.flatten(0, 1))
    merged[:, front:] /= new_sizes[:, front:, None]
    return merged, new_sizes


def places(x_BTD: Tensor, sizes_BT: Tensor, r: int, prefix: int) -> Tensor:
    """(B, T) where `merge` with the same arguments puts each token: an index among the tokens that are left."""
    gone, kept, into = _pairs(x_BTD, sizes_BT, r, prefix)
    out = torch.empty(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
    out.scatter_(1, kept, torch.arange(kept.shape[1], device=x_BTD.device).expand_as(kept))
    return out.scatter_(1, gone, into)


@torch.no_grad()
def neighbours(x_BTD: Tensor, sizes_BT: Tensor, r_B: Tensor) -> Tensor:
    """The even frames of each recording that are cheapest to merge with one of the odd ones beside them.

    Args:
        x_BTD: frames.
        sizes_BT: frames merged in each; 0 where a frame is padding, behind the others.
        r_B: how many of them go, at most half of those that are real; (1,) where as many go of each.

    Returns:
        (B, T) where each frame goes: its place, in the order of time, among those that are left.
    """
    x, sizes = x_BTD.float(), sizes_BT.float()
    left, right = sizes[:, :-1], sizes[:, 1:]
    apart = (x[:, 1:] - x[:, :-1]).square().sum(-1) * left * right / (left + right).clamp_min(1.0)
    apart = apart.masked_fill((left == 0) | (right == 0), torch.inf)  # (B, T - 1): frames i and i + 1
    beside = nn.functional.pad(apart, (1, 1), value=torch.inf)
    before, behind = beside[:, :-1:2], beside[:, 1::2]
    cheap = torch.minimum(before, behind).argsort(-1).argsort(-1) < r_B[:, None]
    places = torch.arange(x.shape[1], device=x.device)
    to, stays = places.repeat(len(x), 1), sizes > 0
    to[:, ::2] += cheap * torch.where(before < behind, -1, 1)
    stays[:, ::2] &= ~cheap
    return (stays.cumsum(-1) - 1).gather(1, to)


def fold(x_BTD: Tensor, sizes_BT: Tensor, holder_BT: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Means (B, tokens, D) of the frames that go to each place, weighted by their sizes, and the new sizes.

    Sizes are of float32 at least, in which sums are formed. A place that only padding goes to is zero and has size 0.
    """
    target, shape = _flat(holder_BT, tokens), (len(x_BTD), tokens)
    sizes = sizes_BT.new_zeros(shape[0] * tokens).index_add(0, target, sizes_BT.flatten())
    total = sizes.new_zeros(len(sizes), x_BTD.shape[2])
    total = total.index_add(0, target, (x_BTD * sizes_BT[..., None]).flatten(0, 1))
    return (total / sizes.clamp_min(1.0)[:, None]).to(x_BTD.dtype).unflatten(0, shape), sizes.view(shape)


def held_together(holder: Tensor) -> Tensor:
    """(..., T) which token holds each first token -> how many first tokens that one holds, float32."""
    counts = torch.zeros(holder.shape, device=holder.device)
    counts.scatter_add_(-1, holder, torch.ones_like(counts))
    return counts.gather(-1, holder)


@torch.no_grad()
def _pairs(x_BTD: Tensor, sizes_BT: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that go (B, R), tokens that stay (B, T - R), and which of the latter takes in each of the former."""
    x, sizes = x_BTD[:, prefix:], sizes_BT[:, prefix:]
    a, b = x[:, ::2], x[:, 1::2]
    r = min(r, b.shape[1])
    places = torch.arange(x_BTD.shape[1], device=x.device).expand(len(x), -1)
    if r <= 0:
        return places[:, :0], places, places[:, :0]
    squares, inverse = x.square().sum(-1), sizes.reciprocal()
    distance = torch.baddbmm(squares[:, ::2, None] + squares[:, None, 1::2], a, b.mT, alpha=-2)
    cost, partner = (distance / (inverse[:, ::2, None] + inverse[:, None, 1::2])).min(-1)
    order = cost.argsort(-1)
    gone, stays = order[:, :r], order[:, r:].sort(-1).values
    into = prefix + stays.shape[1] + partner.gather(1, gone)  # the odd tokens come last
    kept = torch.cat([places[:, :prefix], prefix + 2 * stays, places[:, prefix + 1 :: 2]], 1)
    return prefix + 2 * gone, kept, into


@torch.library.custom_op("acmize::merge", mutates_args=())
def _merge_op(x: Tensor, sizes: Tensor, r: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """`merge` by a number that is known at run time alone; new tensors, as an operator's outputs have to be."""
    pairs = int(r)
    return merge(x, sizes, pairs, prefix) if pairs > 0 else (x.clone(), sizes.clone())


@torch.library.custom_op("acmize::merge_neighbours", mutates_args=())
def _merge_neighbours_op(x: Tensor, sizes: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """`fold` of `neighbours` by a number that is known at run time alone, the same for all recordings."""
    pairs = int(r)
    if pairs <= 0:
        return x.clone(), sizes.clone()
    return fold(x, sizes, neighbours(x, sizes, r[None]), x.shape[1] - pairs)


@torch.library.register_fake("acmize::merge")
@torch.library.register_fake("acmize::merge_neighbours")
def _(x: Tensor, sizes: Tensor, r: Tensor, prefix: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size(min=2)
    return x.new_empty(x.shape[0], tokens, x.shape[2]), sizes.new_empty(x.shape[0], tokens)


def rows_of(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens of each sample: (B, K, D). One selection of rows is several times faster than `gather` on the CPU."""
    return x_BTD.flatten(0, 1).index_select(0, _flat(index_BK, x_BTD.shape[1])).unflatten(0, index_BK.shape)


def _flat(index_BK: Tensor, tokens: int) -> Tensor:
    """Places in a sample -> (B * K,) places in the batch."""
    return (index_BK + tokens * torch.arange(index_BK.shape[0], device=index_BK.device)[:, None]).flatten()
