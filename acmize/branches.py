"""A partial convolution with a choice of how many channels it mixes: the leaf that Ada-PConv is built of.

    y_b = [conv_b(x[:, :c_b]), x[:, c_b:]],   c_b = C / 8, C / 4, C / 2   for b = 1, 2, 3

A sample that runs k branches' worth of work takes y_k alone: nothing is summed. In training, and in the published
`soft` form, y = sum_b p_b y_b, where p_b = keep[b] - keep[b + 1] and keep[n] is the probability of a choice above n.

Shapes: B samples, C channels; tensors are BCHW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.decision import Decision
from acmize.gates import Gate
from acmize.recording import AdaptiveModule
from acmize.samples import grouped


class PartialBranches(AdaptiveModule):
    """The branches, and the gate that picks one for each sample. See the module's docstring.

    Args:
        widths: channels that each branch mixes, rising.
        gate: one group, at least one learner; reads the mean of the input over positions, (B, C).
        names: the plan entry's name.
    """

    per_sample = True

    def __init__(self, widths: Sequence[int], gate: Gate, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self.widths, self.gate = tuple(widths), gate
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=False) for c in widths)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, H, W) -> the same shape."""
        decision = self.decide(x.mean((2, 3)))
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.forward_reference(x, decision)
        return self._routed(x, decision.choice[:, 0])

    @ops.eager
    def _routed(self, x: Tensor, choice: Tensor) -> Tensor:
        """One convolution for each branch that some sample takes."""
        groups = grouped(choice)
        if len(groups) == 1:
            return self._branch(x, groups[0][0])
        y = x.clone()
        for k, index in groups:
            c = self.widths[k - 1]
            y[index, :c] = self.convs[k - 1](x[index, :c])
        return y

    def _branch(self, x: Tensor, choice: int) -> Tensor:
        if choice == 0:  # an empty batch
            return x
        c = self.widths[choice - 1]
        return torch.cat([self.convs[choice - 1](x[:, :c]), x[:, c:]], 1)

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All branches, then a weighted sum."""
        keep = decision.group(0).keep_or_hard(len(self.widths), x.dtype)
        weights = keep - F.pad(keep[:, 1:], (0, 1))
        return sum(w[:, None, None, None] * y for w, y in zip(weights.unbind(1), self.all_branches(x), strict=True))  # pyright: ignore

    def all_branches(self, x: Tensor) -> list[Tensor]:
        """The output of every branch."""
        return [self._branch(x, b + 1) for b in range(len(self.widths))]
