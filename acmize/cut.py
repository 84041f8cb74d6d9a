"""Layers that run on leading slices of their channels, and what stands between them: the leaves of `channels`.

A layer behind cut channels adds one bias for each learner that runs: y = W[:, :w] h[:w] + bias + sum_{n < k} beta_n.

Shapes: B samples, U channels of an inner activation, O output channels, N learners; tensors are BCHW, or channels last
where the layer is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, conv2d_same
from torch import Tensor, nn

from acmize.convs import ACTIVATIONS, FusedConv, Geometry, folded, scale_and_shift

Bounds = tuple[int, ...]


class CutLayer(nn.Module):
    """A convolution or linear layer that runs on leading slices of its channels.

    Args:
        like: `nn.Conv2d`, timm's `Conv2dSame` or `nn.Linear` whose geometry is taken over; its weights are not.
        before: cumulative widths of the input for each choice; None: the input is whole.
        after: of the output; None: the output is whole.
        bias: have a bias even where `like` has none, for a norm that was folded.
    """

    def __init__(self, like: Any, before: Bounds | None, after: Bounds | None, bias: bool = False) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.linear, self.same = isinstance(like, nn.Linear), isinstance(like, Conv2dSame)
        shape = list(like.weight.shape)
        self.depthwise = not self.linear and like.groups > 1
        self.geometry: Any = () if self.linear else (like.stride, like.padding, like.dilation)
        shape[0] = shape[0] if after is None else after[-1]
        if before is not None and not self.depthwise:
            shape[1] = before[-1]
        self.weight = nn.Parameter(torch.empty(shape))
        sums = before is not None and not self.depthwise
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias or sums or like.bias is not None else None
        self.learner_bias = nn.Parameter(torch.zeros(len(before) - 1, shape[0])) if sums else None  # pyright: ignore
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """All the work: x already masked, keep (B, N) -> the whole output."""
        y = self._product(x, self.weight, self.bias)
        return y if self.learner_bias is None else y + self._spread(keep @ self.learner_bias.to(keep.dtype))

    def cut(self, x: Tensor, choice: int) -> Tensor:
        """The leading slices of one choice, at least 1."""
        return self._product(x, *self.slices(choice))

    def slices(self, choice: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one choice, at least 1."""
        out = None if self.after is None else self.after[choice]
        weight, bias = self.weight[:out], self.table(choice)
        if self.before is not None and not self.depthwise:
            weight = weight[:, : self.before[choice]]
        return weight, None if bias is None else bias[:out]

    def moves(self, weight: Tensor) -> Geometry:
        """How a convolution with a slice of the weight moves over its input."""
        stride, padding, dilation = self.geometry
        return Geometry(stride, padding, dilation, len(weight) if self.depthwise else 1, self.same)

    def table(self, choice: int) -> Tensor | None:
        """(O,) what is added when `choice` learners run."""
        if self.learner_bias is None or self.bias is None:
            return self.bias
        return self.bias + self.learner_bias[:choice].sum(0)

    @torch.no_grad()
    def narrow_(self, choice: int) -> None:
        """Forget the channels beyond those of a choice."""
        if self.after is not None:
            self.after = self.after[: choice + 1]
            for name in ("weight", "bias", "learner_bias"):
                tensor = getattr(self, name)
                if tensor is not None:
                    cut = tensor[..., : self.after[-1]] if name == "learner_bias" else tensor[: self.after[-1]]
                    setattr(self, name, nn.Parameter(cut.clone()))
        if self.before is None:
            return
        self.before = self.before[: choice + 1]
        if self.learner_bias is not None:
            self.weight = nn.Parameter(self.weight[:, : self.before[-1]].clone())
            self.learner_bias = nn.Parameter(self.learner_bias[:choice].clone())

    @torch.no_grad()
    def fold_(self, norm: Any) -> None:
        """Take in the BatchNorm behind this layer: y -> scale * y + shift."""
        scale, shift = scale_and_shift(norm)
        weight, bias = folded(self.weight, self.bias, scale, shift)
        assert bias is not None, "a norm has a shift"
        self.weight.copy_(weight)
        self.bias = nn.Parameter(bias.clone())
        if self.learner_bias is not None:
            self.learner_bias.mul_(scale)

    def inside(self, size: Sequence[int]) -> Tensor:
        """(taps,) share of the output positions at which a tap of the kernel reads the input and not the padding."""
        if self.linear:
            return torch.ones(1)
        taps, kernel = self.weight[0, 0].numel(), self.weight.shape[2:]
        each = torch.eye(taps).view(taps, 1, *kernel)
        run: Any = conv2d_same if self.same else F.conv2d
        return run(torch.ones(1, 1, *size), each, None, *self.geometry, 1).mean((0, 2, 3))

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for that of the input."""
        if self.linear:
            return tuple(size)
        stride, padding, dilation = self.geometry
        if self.same:
            return tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
        kernel = self.weight.shape[2:]
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(size, stride, padding, dilation, kernel, strict=True)
        )

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.linear:
            return F.linear(x, weight, bias)
        run: Any = conv2d_same if self.same else F.conv2d
        return run(x, weight, bias, *self.geometry, len(weight) if self.depthwise else 1)

    def _spread(self, y: Tensor) -> Tensor:
        return y[:, None, None, :] if self.linear else y[:, :, None, None]


class Between(nn.Module):
    """What lies between two layers and acts on each channel by itself: norms, activations, pooling.

    Args:
        parts: in order.
        folded: leave out the BatchNorms, which the layer before has taken in.
    """

    def __init__(self, parts: Sequence[nn.Module], folded: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(without_norm(part) if folded else part for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """Every channel."""
        for part in self.parts:
            x = part(x)
        return x

    @torch.no_grad()
    def reorder_(self, order: Tensor) -> None:
        """Put the channels of every norm in this order."""
        for part in self.parts:
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                    if tensor is not None:
                        tensor.copy_(tensor[order])

    def cut(self, x: Tensor, width: int) -> Tensor:
        """X has the leading `width` channels only; eval mode."""
        for part in self.parts:
            if isinstance(part, nn.BatchNorm2d):
                x = _norm(part, x, width)
            else:
                x = part(x)
        return x


def without_norm(part: Any) -> nn.Module:
    """A BatchNorm -> the activation inside it, or nothing; other modules as they are."""
    return getattr(part, "act", nn.Identity()) if isinstance(part, nn.BatchNorm2d) else part


def _norm(norm: Any, x: Tensor, width: int) -> Tensor:
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    stats = (None if t is None else t[:width] for t in tensors)
    x = F.batch_norm(x, *stats, training=False, eps=norm.eps)
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x  # timm's BatchNormAct2d


def fused_steps(layer: Any, between: Any, choice: int, width: int) -> list[Callable[..., Tensor]]:
    """A layer cut to a choice and what lies behind it, in as few calls as it takes; see `convs`."""
    (weight, bias), parts, act = layer.slices(choice), [p for p in between.parts if type(p) is not nn.Identity], None
    if parts and isinstance(parts[0], nn.BatchNorm2d):
        norm: Any = parts.pop(0)
        weight, bias = folded(weight, bias, *(t[:width] for t in scale_and_shift(norm)))
        if hasattr(norm, "act"):
            parts.insert(0, norm.act)
    if parts and type(parts[0]) in ACTIVATIONS:
        act = parts.pop(0)
    later = [partial(_norm, part, width=width) if isinstance(part, nn.BatchNorm2d) else part for part in parts]
    return [FusedConv(weight, bias, layer.moves(weight), act), *later]


def pooled(between: Any, size: Sequence[int]) -> Sequence[int]:
    """Spatial size behind the pooling among some channel-wise parts."""
    for part in between.parts:
        if isinstance(part, nn.MaxPool2d | nn.AvgPool2d):
            size = part(torch.empty(1, 1, *size, device="meta")).shape[2:]
    return size


def chain_macs(layers: Sequence[CutLayer], sizes: Sequence[int], choice: int) -> int:
    """MACs a sample of a choice; `sizes[i]` output positions of layer i."""
    if choice == 0:
        return 0
    total = 0
    for layer, positions in zip(layers, sizes, strict=True):
        shape = list(layer.weight.shape)
        shape[0] = shape[0] if layer.after is None else layer.after[choice]
        if layer.before is not None and not layer.depthwise:
            shape[1] = layer.before[choice]
        total += positions * torch.Size(shape).numel()
    return total


def steps(totals: Sequence[int]) -> tuple[int, ...]:
    """Cumulative MACs of choices 0..N -> MACs of each learner."""
    return tuple(b - a for a, b in pairwise(totals))
