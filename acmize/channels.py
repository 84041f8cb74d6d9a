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

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, conv2d_same
from torch import Tensor, nn

from acmize import ops
from acmize.gates import AdaptiveModule, Decision, Gate
from acmize.importance import order_units

Bounds = tuple[int, ...]


@ops.eager
def by_choice(x: Tensor, choice: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Run samples of one choice together: x (B, ...), choice (B,) -> (B, ...) in the original order.

    Args:
        x: inputs.
        choice: of each sample; read back to the host once.
        run: (some of x, their choice) -> outputs of one shape a sample, whatever the choice.
    """
    groups = grouped(choice)
    if len(groups) == 1:
        return run(x, groups[0][0])
    out: Tensor | None = None
    for k, index in groups:
        y = run(x.index_select(0, index), k)
        if out is None:
            out = y.new_empty(len(x), *y.shape[1:])
        out.index_copy_(0, index, y)
    assert out is not None
    return out


def grouped(choice: Tensor) -> list[tuple[int, Tensor]]:
    """(B,) choices -> each choice that occurs, with the samples (M,) that made it; an empty batch has choice 0."""
    if len(choice) == 1:
        return [(int(choice), torch.zeros_like(choice))]
    counts = torch.bincount(choice, minlength=1).tolist()
    index = choice.argsort().split(counts)
    return [(k, i) for k, i in enumerate(index) if len(i)] or [(0, choice)]


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
        out = None if self.after is None else self.after[choice]
        weight, bias = self.weight[:out], self.table(choice)
        if self.before is not None and not self.depthwise:
            weight = weight[:, : self.before[choice]]
        return self._product(x, weight, None if bias is None else bias[:out])

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
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - scale * norm.running_mean
        bias = shift if self.bias is None else scale * self.bias + shift
        self.weight.mul_(scale.view(-1, *(1,) * (self.weight.dim() - 1)))
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
        self.parts = nn.ModuleList(_without_norm(part) if folded else part for part in parts)

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


def _without_norm(part: Any) -> nn.Module:
    """A BatchNorm -> the activation inside it, or nothing; other modules as they are."""
    return getattr(part, "act", nn.Identity()) if isinstance(part, nn.BatchNorm2d) else part


def _norm(norm: Any, x: Tensor, width: int) -> Tensor:
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    stats = (None if t is None else t[:width] for t in tensors)
    x = F.batch_norm(x, *stats, training=False, eps=norm.eps)
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x  # timm's BatchNormAct2d


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

    def forward(self, x: Tensor) -> Tensor:
        """X (B, D, H, W), or channels last -> the last layer's output."""
        decision = self.decide(x.mean(self.positions))
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.forward_reference(x, decision)
        return by_choice(x, decision.choice[:, 0], self.run)

    def run(self, x: Tensor, choice: int) -> Tensor:
        """Samples that all run `choice` learners."""
        if choice == 0:
            return self._constant(x)
        *first, last = self.layers
        for layer, between, bounds in zip(first, self.between, self.bounds, strict=True):
            x = between.cut(layer.cut(x, choice), bounds[choice])  # pyright: ignore[reportCallIssue]
        return last.cut(x, choice)  # pyright: ignore[reportCallIssue]

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The inner activations at full width."""
        keep, found = x.new_ones(len(x), self.gate.num_learners), []
        for layer, between in zip(self.layers, self.between, strict=False):
            x = between(layer(x, keep))
            found.append(x)
        return found

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
                    parts[j] = _without_norm(part)
        for layer in self.layers:
            layer.narrow_(choice)  # pyright: ignore[reportCallIssue]
        self.bounds = tuple(b[: choice + 1] for b in self.bounds)
        self.gate.narrow_(choice)

    def _constant(self, x: Tensor) -> Tensor:
        """What is left of the chain when no channel runs: the last layer's bias."""
        bias = self.layers[-1].table(0)  # pyright: ignore[reportCallIssue]
        if self.layers[0].linear:
            return bias.expand(*x.shape[:-1], len(bias))
        size: Sequence[int] = x.shape[2:]
        for i, layer in enumerate(self.layers):
            size = layer.out_size(size)  # pyright: ignore[reportCallIssue]
            if i < len(self.between):
                size = _pooled(self.between[i], size)
        return bias[:, None, None].expand(len(x), -1, *size)


def _pooled(between: Any, size: Sequence[int]) -> Sequence[int]:
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
