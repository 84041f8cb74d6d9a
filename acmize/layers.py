"""Layers cut to a width for each token; the leaves that methods are built of.

Shapes: M tokens, D input width, U units (of a head), H heads, O output width, N learners.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.decision import Decision
from acmize.products import gemm


class Dense(nn.Linear):
    """`nn.Linear` by the products of the adaptive layers (see `products.gemm`), for what stays dense."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """X (..., D) -> (..., O)."""
        plain = type(self.weight) is nn.Parameter  # not in fewer bits, as torchao makes it
        if torch.compiler.is_compiling() or not plain or ops.pick_backend(x) != "sorted":
            return super().forward(x)
        y = gemm(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def fast_products_(model: nn.Module) -> None:
    """Make every plain linear layer a `Dense` one, in place: same parameters, same paths, still an `nn.Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Dense


class Expand(nn.Linear):
    """A linear layer whose outputs are limited to each token's width.

    With `deferred`, a contraction behind an activation reads the outputs and applies `keep`: applying it here too would
    count its gradient twice. With `ordered`, unit u of head h is put at place `order[h, u]` of the head's output: what
    comes after reads places, such as rotary positions, and learners own units that matter alike.
    """

    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bounds: tuple[int, ...],
        heads: int = 1,
        ordered: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.bounds, self.heads = bounds, heads
        self.deferred = False
        self.register_buffer("order", torch.arange(bounds[-1]).repeat(heads, 1) if ordered else None)

    def _placed(self, h: Tensor) -> Tensor:
        """(..., H * U) units -> places."""
        if self.order is None:
            return h
        return (
            h.unflatten(-1, self.order.shape)
            .gather(-1, self.order.argsort(-1).expand(*h.shape[:-1], -1, -1))
            .flatten(-2)
        )

    def masked(self, x: Tensor, decision: Decision) -> Tensor:
        """The reference: all the work, then a mask. x (..., D) -> (..., H * U)."""
        h = F.linear(x, self.weight, self.bias)
        if self.deferred and decision.keep is not None:
            return h
        return self._placed(
            ops.mask_units(h, decision.keep_or_hard(len(self.bounds) - 1, x.dtype), self.bounds, self.heads)
        )

    def forward(self, x: Tensor, decision: Decision) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """X (..., D) -> (..., H * U), zero beyond each token's width."""
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.masked(x, decision)
        h = ops.expand(x, self.weight, self.bias, decision.choice, self.bounds, self.heads, decision.order)
        return self._placed(h)

    def write(self, x: Tensor, decision: Decision, out: Tensor) -> None:
        """`forward` by the sorted backend into `out` (..., H * U), a part of a fused output."""
        if self.order is not None:
            out.copy_(self(x, decision))
            return
        assert decision.order is not None, "only the decision of a group can be sorted"
        rows, into, order = x.flatten(0, -2), out.flatten(0, -2), decision.order(len(self.bounds) - 1)
        ops.expand_sorted(rows, self.weight, self.bias, order, self.bounds, self.heads, out=into)

    def all_choices(self, x: Tensor) -> Tensor:
        """X (M, D) -> (M, N + 1, H * U): the output of every choice."""
        h = F.linear(x, self.weight, self.bias).unflatten(-1, (self.heads, -1))
        kept = torch.arange(self.bounds[-1], device=x.device) < torch.tensor(self.bounds, device=x.device)[:, None]
        return self._placed((h[:, None] * kept[:, None]).flatten(-2))


class Contract(nn.Linear):
    """A linear layer that reads only each token's width, and adds one bias for each learner that ran.

    `learner_bias` (N, O) holds beta_n; `bias` (O,) is what is left at k = 0. The memory of `weight` (O, U) is that of
    (U, O): a learner's columns lie together, which is what a product with them needs to be fast.
    """

    def __init__(self, in_features: int, out_features: int, bounds: tuple[int, ...], heads: int = 1) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous().T)
        self.bounds, self.heads = bounds, heads
        self.learner_bias = nn.Parameter(torch.zeros(len(bounds) - 1, out_features))

    def table(self) -> Tensor:
        """(N + 1, O): the bias of every choice."""
        return self.bias + F.pad(self.learner_bias.cumsum(0), (0, 0, 1, 0))

    def masked(self, h: Tensor, decision: Decision) -> Tensor:
        """The reference. h (..., H * U), not yet masked -> (..., O)."""
        keep = decision.keep_or_hard(len(self.bounds) - 1, h.dtype)
        h = ops.mask_units(h, keep, self.bounds, self.heads)
        return F.linear(h, self.weight, self.bias) + keep @ self.learner_bias.to(h.dtype)

    def forward(self, h: Tensor, decision: Decision) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """H (..., H * U) -> (..., O)."""
        if decision.keep is not None or ops.pick_backend(h) == "masked":
            return self.masked(h, decision)
        return ops.contract(h, self.weight, self.table(), decision.choice, self.bounds, self.heads, decision.order)

    def all_choices(self, h: Tensor) -> Tensor:
        """H (M, H * U) -> (M, N + 1, O): the output of every choice at once, for distillation."""
        parts = h.unflatten(-1, (self.heads, -1))
        w = self.weight.unflatten(1, (self.heads, -1))
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        each = [F.linear(parts[:, :, a:b].flatten(1), w[:, :, a:b].flatten(1)) for a, b in pairs]
        return F.pad(torch.stack(each, 1).cumsum(1), (0, 0, 1, 0)) + self.table()


class GateLink:
    """Carries a decision from the module that made it to one that shares it (fc1 to fc2 of a split MLP)."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> GateLink:
        return memo.setdefault(id(self), GateLink())

    def publish(self, decision: Decision) -> None:
        """Remember a decision for this thread."""
        self._local.decision = decision

    def read(self) -> Decision:
        """The decision published last in this thread."""
        decision = getattr(self._local, "decision", None)
        if decision is None:
            raise RuntimeError("a contraction ran before its expansion: the two must be called in that order")
        return decision


class LowRank(nn.Module):
    """Linear(D, r) -> Linear(r, O), learners cut the rank; the published projection learner."""

    def __init__(self, dim: int, out: int, bounds: tuple[int, ...]) -> None:
        super().__init__()
        self.fc1, self.fc2 = Expand(dim, bounds[-1], True, bounds), Contract(bounds[-1], out, bounds)
        self.act, self.out_features = nn.Identity(), out

    def forward(self, x: Tensor, decision: Decision) -> Tensor:
        """X (..., D) -> (..., O)."""
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.masked(x, decision)
        ups, down, table = [(self.fc1.weight, self.fc1.bias)], self.fc2.weight, self.fc2.table()
        return ops.mlp(x, ups, self.act, down, table, decision.choice, self.fc1.bounds, decision.order)

    def masked(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then a mask."""
        return self.fc2.masked(F.linear(x, self.fc1.weight, self.fc1.bias), decision)

    def all_choices(self, x: Tensor) -> Tensor:
        """X (M, D) -> (M, N + 1, O)."""
        return self.fc2.all_choices(F.linear(x, self.fc1.weight, self.fc1.bias))
