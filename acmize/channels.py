"""A chain of convolutions whose inner channels are cut to a prefix for each sample: the leaf that LAG is built of.

    x -> layer 0 -> norm, act -> layer 1 -> norm, act -> ... -> last layer -> y

The channels between two layers are ordered by importance and owned by N learners: a sample that runs k of them keeps
the leading `bounds[i][k]` channels of the i-th inner activation. Its input and output are whole, so that the residual
stream never is gated. A layer behind cut channels adds one bias for each learner that runs, which lets the mean of what
is left out be put back:

    y = W[:, :w] h[:w] + bias + sum_{n < k} learner_bias[n]

The reference does all the work and masks. The fast path groups the samples of a batch by k and runs one dense product
of leading slices for each group, so a batch of one is sliced without any sorting.

Shapes: B samples, U channels of an inner activation, O output channels, D input channels, N learners; tensors are
BCHW, or channels last where the layers are linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from acmize import ops
from acmize.chain_runs import FusedRuns
from acmize.convs import NO_TAIL, Tail, usable
from acmize.cut import Between, Bounds, CutLayer, pooled, without_norm
from acmize.decision import Decision
from acmize.gates import Gate
from acmize.importance import order_units
from acmize.recording import AdaptiveModule
from acmize.samples import grouped, in_groups


class ChannelChain(AdaptiveModule):
    """The chain, with the gate that decides how many learners a sample runs. See the module's docstring.

    Args:
        layers: two or more.
        between: what lies behind each layer but the last.
        bounds: cumulative widths of each inner activation.
        gate: one group; reads the mean of the input over positions, (B, D).
        names: the plan entry's name.
    """

    per_sample = True
    takes_tail = True

    def __init__(
        self,
        layers: Sequence[CutLayer],
        between: Sequence[Between],
        bounds: Sequence[Bounds],
        gate: Gate,
        names: tuple[str, ...],
    ) -> None:
        super().__init__(names)
        self.layers, self.between, self.bounds = nn.ModuleList(layers), nn.ModuleList(between), tuple(bounds)
        self.gate = gate
        self.positions = (1, 2) if layers[0].linear else (2, 3)
        fusable = not any(layer.linear or isinstance(layer.geometry[1], str) for layer in layers)
        self.runs: FusedRuns | None = FusedRuns(self) if fusable else None

    def forward(self, x: Tensor, residual: Tensor | None = None, tail: Tail = NO_TAIL) -> Tensor:
        """X (B, D, H, W), or channels last -> the last layer's output, and what follows it; see `convs.Tail`."""
        mean, gate, runs = x.mean(self.positions), self.gate, self.runs if usable(x) else None
        watched = self.recorder is not None or gate.choose is not None or gate.probe or gate.training
        if runs is not None and x.size(0) == 1 and not watched:
            return runs(x, residual, gate.pick(mean), tail)
        decision = self.decide(mean)
        if runs is not None and decision.keep is None:
            return runs.batch(x, residual, decision.choice[:, 0], tail)
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return tail.plain(self.forward_reference(x, decision), residual)
        return tail.plain(self._routed(x, decision.choice[:, 0]), residual)

    @ops.eager
    def _routed(self, x: Tensor, choice: Tensor) -> Tensor:
        """Samples of one choice together; choice (B,) is read back to the host once."""
        return in_groups((x,), grouped(choice), self.run)

    def run(self, x: Tensor, choice: int) -> Tensor:
        """Samples that all run `choice` learners."""
        if choice == 0:
            return self.constant(x)
        *first, last = self.layers
        for layer, between, bounds in zip(first, self.between, self.bounds, strict=True):
            x = between.cut(layer.cut(x, choice), bounds[choice])  # pyright: ignore[reportCallIssue]
        return last.cut(x, choice)  # pyright: ignore[reportCallIssue]

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        keep = decision.group(0).keep_or_hard(self.gate.num_learners, x.dtype)
        for i, between in enumerate(self.between):
            x = between(self.layers[i](x, keep))
            after: Any = self.layers[i + 1]
            if not after.depthwise:  # one of a channel's two masks would count its gradient twice
                mask = ops.unit_mask(keep, self.bounds[i])
                x = x * (mask[:, None, None, :] if after.linear else mask[:, :, None, None])
        return self.layers[-1](x, keep)

    @torch.no_grad()
    def fill_(self, dense: Sequence[Any], moments: Sequence[Tensor | None], inputs: Sequence[Sequence[int]]) -> None:
        """Weights of dense layers, channels in the order of importance; equal to them at full width.

        The mean of what a choice leaves out is put back by the biases; near the border, where taps read the padding, in
        the proportion of the positions that are not.

        Args:
            dense: the layers this chain was built like; norms have been carried along and are put in order here.
            moments: of what each layer but the first reads: (U + 1, U + 1), augmented; None for a depthwise one.
            inputs: shape of one sample's input of each layer.
        """
        weights = [layer.weight.detach().flatten(2).double() if layer.weight.dim() > 2 else
                   layer.weight.detach()[:, :, None].double() for layer in dense]  # fmt: skip
        orders = self._orders(weights, moments)
        for i, (layer, like) in enumerate(zip(self.layers, dense, strict=True)):
            cut: Any = layer
            weight, bias = weights[i], torch.zeros(len(weights[i]), dtype=torch.double, device=weights[i].device)
            bias = bias if like.bias is None else like.bias.detach().double()
            if i < len(orders):
                weight, bias = weight[orders[i]], bias[orders[i]]
                self.between[i].reorder_(orders[i])  # pyright: ignore[reportCallIssue]
            if cut.learner_bias is not None:
                order, table = orders[i - 1], moments[i - 1]
                assert table is not None
                weight, mean = weight[:, order], (table[-1, :-1] / table[-1, -1])[order]
                share = cut.inside(inputs[i][1:]).to(weight)
                put_back = (weight @ share * mean).T  # (U, O)
                put_back = torch.stack([put_back[a:b].sum(0) for a, b in pairwise(cut.before)])
                cut.learner_bias.copy_(-put_back)
                bias = bias + put_back.sum(0)
            cut.weight.copy_(weight.view_as(cut.weight))
            if cut.bias is not None:
                cut.bias.copy_(bias)

    def _orders(self, weights: Sequence[Tensor], moments: Sequence[Tensor | None]) -> list[Tensor]:
        """Of each inner activation; those around a depthwise layer have one order, of what is read behind it."""
        orders: list[Tensor] = []
        for weight, table in reversed(list(zip(weights[1:], moments, strict=True))):
            orders.append(orders[-1] if table is None else order_units(table, weight.transpose(1, 2).flatten(0, 1)))
        return orders[::-1]

    @torch.no_grad()
    def narrow_(self, choice: int) -> None:
        """Remove the channels of all learners beyond `choice` for good, and fold the norms; see `Between`."""
        for layer, between in zip(self.layers, self.between, strict=False):
            parts: Any = between.parts
            for j, part in enumerate(parts):
                if isinstance(part, nn.BatchNorm2d):
                    layer.fold_(part)  # pyright: ignore[reportCallIssue]
                    parts[j] = without_norm(part)
        for layer in self.layers:
            layer.narrow_(choice)  # pyright: ignore[reportCallIssue]
        self.bounds = tuple(b[: choice + 1] for b in self.bounds)
        self.gate.narrow_(choice)

    def constant(self, x: Tensor) -> Tensor:
        """What is left of the chain when no channel runs: the last layer's bias."""
        bias = self.layers[-1].table(0)  # pyright: ignore[reportCallIssue]
        if self.layers[0].linear:
            return bias.expand(*x.shape[:-1], len(bias))
        size: Sequence[int] = x.shape[2:]
        for i, layer in enumerate(self.layers):
            size = layer.out_size(size)  # pyright: ignore[reportCallIssue]
            if i < len(self.between):
                size = pooled(self.between[i], size)
        return bias[:, None, None].expand(len(x), -1, *size)
