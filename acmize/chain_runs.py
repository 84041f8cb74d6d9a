"""How a chain of cut convolutions runs at inference on a CPU: slices kept for each choice, norms and sums taken in.

A batch whose samples choose differently runs in one of two ways, whichever costs less:

    apart       samples of one choice together, on leading slices: they are gathered and put back
    together    all at the widest choice; what a sample does not run is set to zero behind each layer, and its bias
                comes with the shortcut. A vector of the processor has 16 lanes: 4 channels take as long as 16.

Shapes: B samples, U channels of an inner activation, O output channels, N learners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acmize.convs import FusedConv, Tail, folded, scale_and_shift
from acmize.cut import fused_steps, pooled
from acmize.kept import Kept
from acmize.samples import grouped, in_groups

LANES = 16
GROUP_MACS = 2_500_000  # what a group costs beside its MACs: calls, slices
MOVE_MACS = 10  # what gathering a number or putting it back costs


class FusedRuns:
    """The fused ways to run a `ChannelChain` of convolutions; `tail` is what follows it, see `convs.Tail`."""

    def __init__(self, chain: Any) -> None:
        self.chain = chain
        self.kept: Kept[dict[Any, Any]] = Kept()

    def __call__(self, x: Tensor, residual: Tensor | None, choice: int, tail: Tail) -> Tensor:
        """X (B, D, H, W) of samples that all run `choice` learners -> (B, O, h, w)."""
        if choice == 0:
            if residual is None or residual.shape[2:] != self._get(x.shape[2:], lambda: self._sizes(x)[-1]):
                return tail.plain(self.chain.constant(x), residual)
            y = residual + self._get(("nothing", tail), lambda: self._biases(tail)[:1, :, None, None])
            return y if tail.act is None else tail.act(y)
        *first, last = self._get((choice, tail), lambda: self._steps(choice, tail))
        for step in first:
            x = step(x)
        return last(x, residual)

    def batch(self, x: Tensor, residual: Tensor | None, choice: Tensor, tail: Tail) -> Tensor:
        """Samples that choose for themselves, (B,)."""
        groups = grouped(choice)
        if len(groups) > 1 and self._together_pays(x, groups):
            return self.together(x, residual, choice, groups[-1][0], tail)
        xs = (x,) if residual is None else (x, residual.expand(len(x), *residual.shape[1:]))
        return in_groups(xs, groups, lambda x, r=None, *, choice: self(x, r, choice, tail))

    def together(self, x: Tensor, residual: Tensor | None, choice: Tensor, widest: int, tail: Tail) -> Tensor:
        """All samples at the widest choice, masked."""
        parts, last, biases = self._get((widest, tail, "together"), lambda: self._masked(widest, tail))
        for steps, mask in parts:
            for step in steps:
                x = step(x)
            if mask is not None:
                x *= mask.index_select(0, choice)
        mine = biases.index_select(0, choice)
        return last(x, mine if residual is None else residual + mine)

    def _together_pays(self, x: Tensor, groups: Sequence[tuple[int, Tensor]]) -> bool:
        *first, _ = self.chain.layers
        if any(layer.learner_bias is not None for layer in first):  # each sample has another one, in the middle
            return False
        macs, moved = self._get(x.shape[1:], lambda: self._costs(x))
        saved = sum((macs[groups[-1][0]] - macs[k]) * len(index) for k, index in groups)
        return saved < len(groups) * GROUP_MACS + len(x) * moved * MOVE_MACS

    # --- what is kept -----------------------------------------------------------------------------------------

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        kept = self.kept.get(lambda: [*self.chain.layers, *_inside(self.chain.between)], dict)
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def _steps(self, choice: int, tail: Tail) -> list[Callable[..., Tensor]]:
        chain = self.chain
        inner = zip(chain.layers, chain.between, chain.bounds, strict=False)
        steps = [step for layer, between, b in inner for step in fused_steps(layer, between, choice, b[choice])]
        last, (scale, shift) = chain.layers[-1], scale_and_shift(tail.norm)
        weight, bias = last.slices(choice)
        weight, bias = folded(weight, bias, scale, shift)
        return [*steps, FusedConv(weight, bias, last.moves(weight), tail.act)]

    def _masked(self, widest: int, tail: Tail) -> tuple[list[Any], FusedConv, Tensor]:
        """For each layer but the last its steps and masks (N + 1, U, 1, 1); the last; biases (N + 1, O, 1, 1)."""
        chain, parts = self.chain, []
        for layer, between, bounds, after in zip(
            chain.layers, chain.between, chain.bounds, chain.layers[1:], strict=False
        ):
            units, widths = torch.arange(bounds[widest]), torch.tensor(bounds[: widest + 1])
            mask = None if after.depthwise else (units < widths[:, None]).float()[:, :, None, None]
            parts.append((fused_steps(layer, between, widest, bounds[widest]), mask))
        last, (scale, shift) = chain.layers[-1], scale_and_shift(tail.norm)
        weight, _ = folded(last.slices(widest)[0], None, scale, shift)
        biases = self._biases(tail)[: widest + 1, :, None, None]
        return parts, FusedConv(weight, None, last.moves(weight), tail.act), biases

    def _biases(self, tail: Tail) -> Tensor:
        """(N + 1, O) what each choice adds, behind the norm of the tail."""
        last, (scale, shift) = self.chain.layers[-1], scale_and_shift(tail.norm)
        table = torch.stack([last.table(k) for k in range(self.chain.gate.num_learners + 1)]).detach()
        return table if scale is None else table * scale + shift

    def _costs(self, x: Tensor) -> tuple[list[int], int]:
        """MACs of a sample by choice, lanes that idle counted too; numbers moved for one that runs apart."""
        chain, macs = self.chain, [0]
        sizes = [math.prod(size) for size in self._sizes(x)]
        for k in range(1, chain.gate.num_learners + 1):
            shapes = [layer.slices(k)[0].shape for layer in chain.layers]
            work = [n * -(-s[0] // LANES) * LANES * s[1:].numel() for n, s in zip(sizes, shapes, strict=True)]
            macs.append(sum(work))
        return macs, 2 * (x.shape[1:].numel() + 2 * sizes[-1] * chain.layers[-1].weight.shape[0])

    def _sizes(self, x: Tensor) -> list[torch.Size]:
        """(h, w) of each layer's output."""
        size, sizes = x.shape[2:], []
        for i, layer in enumerate(self.chain.layers):
            sizes.append(torch.Size(layer.out_size(size)))
            size = pooled(self.chain.between[i], sizes[-1]) if i < len(self.chain.between) else sizes[-1]
        return sizes


def _inside(between: nn.Module) -> list[nn.Module]:
    return [m for m in between.modules() if isinstance(m, nn.BatchNorm2d)]
