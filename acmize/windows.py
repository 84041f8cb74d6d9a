"""A strided convolution over time as an ACM: a token is an output frame, what it reads is its window of the input.

    y_t = W x_t = U S V^T C^-1/2 x_t,   x_t (K * C) the window of frame t,   learners cut the rank      (see `init`)

What a front end makes of speech has far fewer dimensions than its layers have channels.

Shapes: B samples, C channels, L input frames, K taps, T output frames, O output channels, N learners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize.decision import Decision
from acmize.gates import Gate
from acmize.layers import LowRank
from acmize.recording import AdaptiveModule


class Geometry(NamedTuple):
    """Taps, stride and padding of a convolution over time."""

    kernel: int
    stride: int
    pad: int

    @classmethod
    def of(cls, conv: Any) -> Geometry:
        """That of a convolution in which `unfit` finds nothing.

        Raises:
            RuntimeError: it is none.
        """
        reason = unfit(conv) if type(conv) is nn.Conv1d else f"a {type(conv).__name__}, expected nn.Conv1d"
        if reason is not None:
            raise RuntimeError(reason)
        return cls(conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))

    def windows(self, x: Tensor) -> Tensor:
        """X (B, C, L) -> (B, T, K, C): what each output frame reads, a view of one copy of x."""
        if self.pad:
            x = F.pad(x, (self.pad, self.pad))
        return x.mT.contiguous().unfold(1, self.kernel, self.stride).mT


def unfit(conv: nn.Conv1d) -> str | None:
    """Why a convolution cannot run window by window, or None."""
    if conv.groups != 1 or conv.dilation != (1,):
        return f"a convolution of {conv.groups} groups and dilation {conv.dilation[0]}, expected 1 and 1"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"padding {conv.padding!r}, {conv.padding_mode}"
    return None


class AcmConv(AdaptiveModule):
    """A convolution in the low-rank form, cut to a rank for each output frame; the gate reads the mean of its window.

    Args:
        like: the convolution.
        bounds: cumulative ranks.
        gate: one group, of C inputs.
        names: the plan entry's name.
        read_by: geometry of the convolution that reads the output, where the blocks' frames are those of that one.
    """

    def __init__(
        self,
        like: nn.Conv1d,
        bounds: tuple[int, ...],
        gate: Gate,
        names: tuple[str, ...],
        read_by: Geometry | None = None,
    ) -> None:
        super().__init__(names)
        self.geometry, self.read_by = Geometry.of(like), read_by
        self.conv, self.gate = LowRank(like.weight[0].numel(), like.out_channels, bounds), gate

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, L) -> (B, O, T)."""
        read = self.tokens(x)
        return self.conv(read, self.decide(self.gate_input(read)).group(0)).mT

    def tokens(self, x: Tensor) -> Tensor:
        """X (B, C, L) -> (B, T, K * C): what the learners read."""
        seen = self.geometry.windows(x)
        if torch.compiler.is_compiling():  # a program for any length may not ask how a view lies in memory
            seen = seen.contiguous()
        return seen.flatten(-2)

    def output_tokens(self, y: Tensor) -> Tensor:
        """Y (B, O, T) -> (B, T, O)."""
        return y.mT

    def few(self, x: Tensor, count: int) -> Tensor:
        """X (B, C, L) -> (count, C, K): its first windows, each an input of one output frame."""
        return self.geometry.windows(x).flatten(0, 1)[:count].mT

    def gate_input(self, x: Tensor) -> Tensor:
        """X (..., K * C) windows -> (..., C): what the gate reads of them."""
        return x.unflatten(-1, (self.geometry.kernel, -1)).mean(-2)

    def valid(self, x: Tensor) -> Tensor | None:
        """X (B, T, C) -> (B, T): the frames that a real frame of the blocks depends on."""
        if self.padding is None or self.read_by is None:
            return super().valid(x)
        found = self.padding.read_any()
        if found is None:
            return None
        kernel, stride, pad = self.read_by
        first = (torch.arange(x.shape[1], device=x.device) + pad - kernel + stride).div(stride, rounding_mode="floor")
        return found[:, first.clamp(0, found.shape[1] - 1)]  # real if the first frame that reads it is

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        return self.conv.masked(self.tokens(x), decision.group(0)).mT

    def all_choices(self, x: Tensor) -> list[Tensor]:
        """X (M, K * C) windows -> one (M, N + 1, O): the output of every choice."""
        return [self.conv.all_choices(x)]
