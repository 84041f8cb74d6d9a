"""ToMe, token merging (Bolya et al., arXiv 2210.09461): r pairs of similar tokens become one before each block.

Merged tokens shrink everything after them, the attention products included, and compose with widths: the gates then
decide for merged tokens. A merge happens at a block's input, through a pre-forward hook, never inside a host's forward;
the sizes of merged tokens reach the block's attention as the additive mask log(size) (eq. 1 of the paper).

Deviations from the paper, and why
- Pairs are merged between blocks, not between attention and MLP: no forward is copied.
- Pairs are scored by Ward's criterion on the residual stream, s_a s_b / (s_a + s_b) ||x_a - x_b||^2, not by the cosine
  of keys: it weighs what a merge changes, needs nothing from inside a block, and was better here (docs/log.md).

Shapes: B samples, T tokens, D width, P prefix tokens (class, registers; never merged).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MergeState:
    """Sizes of the merged tokens on their way through one forward; one for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> MergeState:
        return memo.setdefault(id(self), MergeState())

    @property
    def sizes(self) -> Tensor | None:
        """(B, T) patches in each token, or None before the first merge."""
        return getattr(self._local, "sizes", None)

    @sizes.setter
    def sizes(self, sizes: Tensor | None) -> None:
        self._local.sizes = sizes


class MergeHook:
    """Pre-forward hook of a block: merges r pairs of its input and hands log(size) to its attention.

    Args:
        state: shared by the hooks of a model.
        r: pairs merged before this block; a tensor () where a program is exported that computes it (`export`).
        prefix: tokens at the front that are never merged.
        first: this is the first block, where every size is one again.
    """

    def __init__(self, state: MergeState, r: int | Tensor, prefix: int, first: bool) -> None:
        self.state, self.r, self.prefix, self.first = state, r, prefix, first

    def __call__(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(x, ...)` -> the same with x merged and `attn_mask` set."""
        x = args[0]
        if self.first:
            self.state.sizes = None
        if isinstance(self.r, Tensor) or self.r:
            sizes = self.state.sizes
            if sizes is None:
                sizes = x.new_ones(x.shape[:2])
            run: Any = torch.ops.acmize.merge if isinstance(self.r, Tensor) else merge
            x, self.state.sizes = run(x, sizes, self.r, self.prefix)
        if self.state.sizes is not None:
            kwargs = {**kwargs, "attn_mask": self.state.sizes.log()[:, None, None, :].to(x.dtype)}
        return (x, *args[1:]), kwargs


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
    x, sizes = x_BTD[:, prefix:], sizes_BT[:, prefix:]
    a, b, size_a, size_b = x[:, ::2], x[:, 1::2], sizes[:, ::2], sizes[:, 1::2]
    r = min(r, b.shape[1])
    if r <= 0:
        return x_BTD, sizes_BT
    with torch.no_grad():
        distance = a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * a @ b.mT
        weight = size_a[..., None] * size_b[:, None] / (size_a[..., None] + size_b[:, None])
        cost, partner = (weight * distance).min(-1)
        order = cost.argsort(-1)
        gone, stays = order[:, :r], order[:, r:].sort(-1).values
        front = prefix + stays.shape[1]  # tokens before the odd ones
        into = front + partner.gather(1, gone)
        places = torch.arange(x_BTD.shape[1], device=x.device).expand(len(x), -1)
        kept = torch.cat([places[:, :prefix], prefix + 2 * stays, places[:, prefix + 1 :: 2]], 1)
    merged, old_sizes = _rows(x_BTD, kept), sizes_BT.gather(1, kept)
    size_gone = size_a.gather(1, gone)
    moved = _rows(x_BTD, prefix + 2 * gone) * size_gone[..., None]
    target = _flat(into, merged.shape[1])
    new_sizes = old_sizes.flatten().index_add(0, target, size_gone.flatten()).view_as(old_sizes)
    merged[:, front:] *= old_sizes[:, front:, None]
    merged.flatten(0, 1).index_add_(0, target, moved.flatten(0, 1))
    merged[:, front:] /= new_sizes[:, front:, None]
    return merged, new_sizes


@torch.library.custom_op("acmize::merge", mutates_args=())
def _merge_op(x: Tensor, sizes: Tensor, r: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """`merge` by a number that is known at run time alone; new tensors, as an operator's outputs have to be."""
    pairs = int(r)
    return merge(x, sizes, pairs, prefix) if pairs > 0 else (x.clone(), sizes.clone())


@torch.library.register_fake("acmize::merge")
def _(x: Tensor, sizes: Tensor, r: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size(min=2)
    return x.new_empty(x.shape[0], tokens, x.shape[2]), sizes.new_empty(x.shape[0], tokens)


def _rows(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens of each sample: (B, K, D). One selection of rows is several times faster than `gather` on the CPU."""
    return x_BTD.flatten(0, 1).index_select(0, _flat(index_BK, x_BTD.shape[1])).unflatten(0, index_BK.shape)


def _flat(index_BK: Tensor, tokens: int) -> Tensor:
    """Places in a sample -> (B * K,) places in the batch."""
    return (index_BK + tokens * torch.arange(len(index_BK), device=index_BK.device)[:, None]).flatten()


def install_merging(model: Any) -> None:
    """Register the hooks on a model's blocks, merging nothing until `set_schedule`.

    Args:
        model: timm model for which `why_not` finds nothing.
    """
    state, prefix = MergeState(), int(getattr(model, "num_prefix_tokens", 1))
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(MergeHook(state, 0, prefix, i == 0), with_kwargs=True)


def set_schedule(model: Any, schedule: Sequence[int]) -> None:
    """Merge this many pairs before each block from now on; an empty schedule merges nothing.

    Args:
        model: any model; one without hooks takes an empty schedule only.
        schedule: one number a block, or none.
    """
    hooks = hooks_of(model)
    assert not schedule or len(schedule) == len(hooks), f"{len(schedule)} numbers for {len(hooks)} blocks"
    for i, hook in enumerate(hooks):
        hook.r = schedule[i] if schedule else 0


def schedule_of(model: Any) -> tuple[int, ...]:
    """The schedule in force; empty where nothing is merged."""
    schedule = tuple(int(hook.r) for hook in hooks_of(model))
    return schedule if any(schedule) else ()


def hooks_of(model: Any) -> list[MergeHook]:
    """The merging hooks of a model, in the order of its blocks."""
    blocks = getattr(model, "blocks", ())
    return [h for b in blocks for h in b._forward_pre_hooks.values() if isinstance(h, MergeHook)]


def why_not(model: Any) -> str | None:
    """Why this model's tokens cannot be merged, or None."""
    if not hasattr(model, "blocks"):
        return f"token merging: {type(model).__name__} has no sequence of blocks"
    import inspect

    if any("attn_mask" not in inspect.signature(b.forward).parameters for b in model.blocks):
        return "token merging: the blocks take no attn_mask, so merged sizes cannot reach the attention"
    if any(getattr(getattr(b, "attn", None), "num_heads", None) is None for b in model.blocks):
        return "token merging: blocks without an attn of a known kind"
    if getattr(model, "rope", None) is not None:
        return "token merging: rotary positions belong to the grid of tokens"
    if getattr(model, "global_pool", "token") != "token":
        return f"token merging: pooling {model.global_pool!r} does not know the sizes of merged tokens"
    return None
