"""Token merging: r pairs of similar tokens become one before each block.

    images    ToMe (Bolya et al., arXiv 2210.09461): any two patches, by bipartite matching
    speech    A-ToMe (Li et al., arXiv 2306.16009): neighbours in time alone; every frame has its token's output again
              behind the last block, so that what reads the encoder finds as many as before

Merged tokens shrink everything after them, the attention products included, and compose with widths: the gates then
decide for merged tokens. A merge happens at a block's input, through a pre-forward hook, never inside a host's forward;
the sizes of merged tokens reach the block's attention as the additive mask log(size) (eq. 1 of ToMe).

Deviations from the papers, and why
- Pairs are merged between blocks, not between attention and MLP: no forward is copied.
- Pairs are scored by Ward's criterion on the residual stream, s_a s_b / (s_a + s_b) ||x_a - x_b||^2, not by the cosine
  of keys: it weighs what a merge changes, needs nothing from inside a block, and was better here (docs/log.md).
- A frame is merged with the neighbour it suits better, by a number of pairs, not with its successor by a threshold:
  the work of a recording is known beforehand.

Shapes: B samples, T tokens, D width, P prefix tokens (class, registers; never merged), R pairs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmize.merge_pairs import fold, merge, neighbours, places, rows_of
from acmize.padding import Padding, class_path

# --- hooks ----------------------------------------------------------------------------------------------------


class MergeState:
    """The merged tokens on their way through one forward, for each thread."""

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
        self._local.sizes, self._local.mask = sizes, None

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, T) log(size), made once after each merge; -inf where a token is padding, of size 0."""
        if self._local.mask is None:
            self._local.mask = self._local.sizes.log()[:, None, None, :].to(dtype)
        return self._local.mask

    def holder(self, frames: int) -> Tensor:
        """(B, frames) the token that holds each frame of the first block: what a token holds follows one on another."""
        sizes = self._local.sizes.long()
        marks = sizes.new_zeros(sizes.shape[0], frames + 1)
        return marks.scatter(1, sizes.cumsum(1) - sizes, 1).cumsum(1)[:, :frames] - 1

    @property
    def frames(self) -> Frames | None:
        """The frames of a recording since the first block; None for images."""
        return getattr(self._local, "frames", None)

    @frames.setter
    def frames(self, frames: Frames | None) -> None:
        self._local.frames = frames

    @property
    def trace(self) -> list[Tensor] | None:
        """Block -> (B, T) token that holds each token of the first block now; None unless `tracing`."""
        return getattr(self._local, "trace", None)

    @trace.setter
    def trace(self, trace: list[Tensor] | None) -> None:
        self._local.trace = trace


@dataclass(frozen=True)
class Frames:
    """The frames of recordings at the first block.

    Attributes:
        counts: real ones of each recording; a single number where all have as many.
        pairs: likewise, how many are merged before each block; tensors () where a program is exported that computes
            them.
        padded: frames of the batch, padding included.
    """

    counts: list[int]
    pairs: list[Sequence[int | Tensor]]
    padded: int

    def left(self, block: int) -> list[int]:
        """Tokens in this block, likewise."""
        return [count - sum(map(int, pairs[: block + 1])) for count, pairs in zip(self.counts, self.pairs, strict=True)]


class MergeHook:
    """Pre-forward hook of a block of an image model: merges r pairs and hands log(size) to its attention.

    Args:
        state: shared by the hooks of a model.
        r: pairs merged before this block; a tensor () where a program is exported that computes it (`export`).
        prefix: tokens at the front that are never merged.
        first: this is the first block, where every size is one again.
    """

    def __init__(self, state: MergeState, r: int | Tensor, prefix: int, first: bool) -> None:
        self.state, self.r, self.prefix, self.first = state, r, prefix, first
        self.merging: Any = None  # of the plan, where frames are merged
        self._entered: tuple[Tensor | None, Frames | None] = (None, None)  # before this block in the last forward

    def __call__(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(x, ...)` -> the same with x merged and `attn_mask` set."""
        x = args[0]
        if self.first:
            self.state.sizes = None
        self._enter()
        known, trace = not isinstance(self.r, Tensor), self.state.trace
        if not known or self.r or trace is not None:
            sizes = self.state.sizes
            if sizes is None:
                sizes = x.new_ones(x.shape[:2])
            if trace is not None:
                moved = places(x, sizes, int(self.r), self.prefix)
                trace.append(moved if self.first else moved.gather(1, trace[-1]))
            if not known:
                x, self.state.sizes = torch.ops.acmize.merge(x, sizes, self.r, self.prefix)
            elif self.r:
                x, self.state.sizes = merge(x, sizes, int(self.r), self.prefix)
        if self.state.sizes is not None:
            kwargs = {**kwargs, "attn_mask": self.state.mask(x.dtype)}
        return (x, *args[1:]), kwargs

    def _enter(self) -> None:
        """Remember what reaches this block, or bring it back.

        Gradient checkpointing computes blocks again while a backward runs, the last one first.
        """
        if torch.compiler.is_compiling():  # what is traced is no tensor to be kept
            return
        if torch._C._current_graph_task_id() == -1:
            self._entered = self.state.sizes, self.state.frames
        else:
            self.state.sizes, self.state.frames = self._entered


class FrameMergeHook(MergeHook):
    """Pre-forward hook of a block of a speech encoder: merges neighbours; a token turns as the mean of its positions.

    `r` is for a recording of the plan's length; of another one as much is merged as saves the same share. Padding has
    size 0: it is merged with nothing, and log(0) hides it from the attention.

    Args:
        state: shared by the hooks of a model.
        hooks: of the model so far; this one is added. The `recorder` of the first block is told how many frames there
            are.
        merging: of the plan (`Merging`), which stretches a schedule to the length of a recording.
        encoder: whose `padding` tells its modules which tokens are real, and whose `rotary_emb` turns them, if it has
            them.
    """

    def __init__(self, state: MergeState, hooks: list[FrameMergeHook], merging: Any, encoder: Any) -> None:
        super().__init__(state, 0, 0, first=not hooks)
        self.index, self.hooks, self.merging = len(hooks), hooks, merging
        hooks.append(self)
        self.padding: Padding | None = getattr(encoder, "padding", None)
        self.rotary = getattr(encoder, "rotary_emb", None)

    def __call__(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(x, ...)` -> the same with x merged, and mask and positions of what is left."""
        state, x = self.state, args[0]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if torch.compiler.is_exporting():  # a program takes recordings of one length; what is traced has a mask for all
            mask = None
        if self.first:
            self._begin(x, mask)
            if block.recorder is not None:
                block.recorder.tokens[""] = torch.tensor(self._frames.counts, device=x.device)
        self._enter()
        r = [pairs[self.index] for pairs in self._frames.pairs]
        if any(isinstance(pairs, Tensor) or pairs for pairs in r):
            sizes = state.sizes
            if sizes is None:
                sizes = _real(x, mask).to(torch.promote_types(x.dtype, torch.float32))  # they have to stay whole
            x = self._merged(x, sizes, r)
        sizes = state.sizes
        if state.trace is not None:
            frames = max(self._frames.counts)
            every = torch.arange(frames, device=x.device).expand(len(x), -1)
            state.trace.append(every if sizes is None else state.holder(frames))
        if sizes is None:
            return args, kwargs
        if self.rotary is not None:
            at = sizes.cumsum(1) - (sizes + 1) / 2  # the mean of the frames that a token holds
            kwargs = {**kwargs, "position_embeddings": self.rotary(x, position_ids=at)}
        if len(args) > 1:
            return (x, state.mask(x.dtype), *args[2:]), kwargs
        return (x,), {**kwargs, "attention_mask": state.mask(x.dtype)}

    @property
    def _frames(self) -> Frames:
        frames = self.state.frames
        assert frames is not None, "the first block runs first"
        return frames

    def _begin(self, x: Tensor, mask: Tensor | None) -> None:
        counts = [x.shape[1]] if mask is None else _real(x, mask).sum(1).tolist()
        schedule = tuple(hook.r for hook in self.hooks)
        self.state.sizes = None
        self.state.frames = Frames(counts, [self.merging.at(count, schedule)[1] for count in counts], x.shape[1])

    def _merged(self, x: Tensor, sizes: Tensor, r: Sequence[int | Tensor]) -> Tensor:
        if isinstance(r[0], Tensor):
            x, self.state.sizes = torch.ops.acmize.merge_neighbours(x, sizes, r[0])
            return x
        left = self._frames.left(self.index)
        holder = neighbours(x, sizes, torch.tensor(r, device=x.device))
        x, self.state.sizes = fold(x, sizes, holder, max(left))
        if self.padding is not None and min(left) < max(left):
            self.padding.publish(self.state.sizes > 0)
        return x

    def restore(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook of the last block: its output (B, T', D), alone or first of a tuple, for every frame again."""
        frames, self.state.frames = self.state.frames, None
        if frames is None or self.state.sizes is None:
            return output
        x = rows_of(output if isinstance(output, Tensor) else output[0], self.state.holder(frames.padded))
        return x if isinstance(output, Tensor) else (x, *output[1:])


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) which frames the attention sees, by its mask (B, 1, 1 or T, T) or (B, T): True, or 0, where it does."""
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mask.dim() == 2:  # as flash attention has it
        return mask.bool()
    seen = mask[:, 0, 0]
    return seen if seen.dtype == torch.bool else seen == 0


# --- models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a model whose tokens can be merged.

    Attributes:
        path: of what holds them.
        prefix: tokens at the front that are never merged.
        neighbours: tokens are frames: merged with neighbours alone, and given back behind the last block.
    """

    path: str
    prefix: int = 0
    neighbours: bool = False


_LIBRARY = "transformers.models"
_ENCODERS = {  # their blocks lie in `layers`, and take attention_mask
    f"{_LIBRARY}.{path}"
    for path in (
        "moonshine.modeling_moonshine.MoonshineEncoder",
        "whisper.modeling_whisper.WhisperEncoder",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2Encoder",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderStableLayerNorm",
        "hubert.modeling_hubert.HubertEncoder",
        "hubert.modeling_hubert.HubertEncoderStableLayerNorm",
        "data2vec.modeling_data2vec_audio.Data2VecAudioEncoder",
    )
}


def mergeable(model: Any) -> Blocks | str:
    """Where tokens can be merged in this model, or why they cannot."""
    found = [path for path, module in model.named_modules() if class_path(module) in _ENCODERS]
    if found:
        return Blocks(path=".".join(filter(None, (found[0], "layers"))), neighbours=True)
    reason = _unfit_images(model)
    return Blocks(path="blocks", prefix=int(getattr(model, "num_prefix_tokens", 1))) if reason is None else reason


def _unfit_images(model: Any) -> str | None:
    if not hasattr(model, "blocks"):
        return f"token merging: {type(model).__name__} has no sequence of blocks whose tokens may be merged"
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


def labels_frames(model: Any) -> bool:
    """Whether every frame has a label of its own, which merging with its neighbours would drown: CTC and its like."""
    return type(model).__name__.endswith(("ForCTC", "ForAudioFrameClassification"))


def why_not(model: Any) -> str | None:
    """Why this model's tokens cannot be merged, or None."""
    found = mergeable(model)
    return found if isinstance(found, str) else None


def install_merging(model: Any, merging: Any = None) -> None:
    """Register the hooks on a model's blocks, merging nothing until `set_schedule`.

    Args:
        model: one for which `why_not` finds nothing.
        merging: of its plan (`Merging`); needed for frames, whose number differs from sample to sample.
    """
    found = mergeable(model)
    assert isinstance(found, Blocks), found
    state = MergeState()
    blocks: list[Any] = list(model.get_submodule(found.path).children())
    encoder = model.get_submodule(found.path.rpartition(".")[0])
    frame_hooks: list[FrameMergeHook] = []
    for i, block in enumerate(blocks):
        if not found.neighbours:
            block.register_forward_pre_hook(MergeHook(state, 0, found.prefix, i == 0), with_kwargs=True)
            continue
        hook = FrameMergeHook(state, frame_hooks, merging, encoder)
        block.register_forward_pre_hook(hook, with_kwargs=True)
        if block is blocks[0]:
            block.recorder = None
        if block is blocks[-1]:
            block.register_forward_hook(hook.restore)


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
    return [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, MergeHook)]


@contextmanager
def tracing(model: Any) -> Iterator[list[Tensor]]:
    """Follows the tokens of one forward inside the context: block -> (B, T), the token there of each first token.

    The list stays empty for a model without hooks, whose tokens stay what they are.
    """
    states = {id(hook.state): hook.state for hook in hooks_of(model)}.values()
    trace: list[Tensor] = []
    for state in states:
        state.trace = trace
    try:
        yield trace
    finally:
        for state in states:
            state.trace = None
