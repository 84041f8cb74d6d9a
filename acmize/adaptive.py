"""The adaptive modules of ACM: what stands in the place of an MLP, a projection, an output projection.

Shapes: M tokens, D input width, U units (of a head), H heads, O output width, N learners, G groups of one gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.decision import Decision
from acmize.gates import Gate
from acmize.layers import Contract, Expand, GateLink, LowRank
from acmize.products import act_name
from acmize.recording import AdaptiveModule


class AcmMlp(AdaptiveModule):
    """An MLP (plain or gated) as an ACM: expand, activation, contract.

    Args:
        fc1: expansion (the value branch of a gated MLP).
        fc2: contraction.
        act: activation, applied to `fc1`, or to `fc1_gate` where there is one.
        gate: one group.
        names: the plan entry's name.
        fc1_gate: gate branch of a gated MLP (GLU, SwiGLU).
        channels_first: the input is (B, C, H, W) and tokens are pixels.
        drop: dropout after the hidden activation and after the output.
    """

    def __init__(
        self,
        fc1: Expand,
        fc2: Contract,
        act: Callable[[Tensor], Tensor],
        gate: Gate,
        names: tuple[str, ...],
        fc1_gate: Expand | None = None,
        channels_first: bool = False,
        drop: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__(names)
        self.fc1, self.fc1_gate, self.fc2, self.act, self.gate = fc1, fc1_gate, fc2, act, gate
        self.channels_first = channels_first
        self.drop1, self.drop2 = map(nn.Dropout, drop)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., D), or (B, D, H, W) when channels come first -> the same with O in D's place."""
        y = self._tokens_last(self.tokens(x))
        return y.permute(0, 3, 1, 2) if self.channels_first else y

    def tokens(self, x: Tensor) -> Tensor:
        """X as `forward` takes it -> (..., D)."""
        return x.permute(0, 2, 3, 1) if self.channels_first else x

    def output_tokens(self, y: Tensor) -> Tensor:
        """Y as `forward` gives it -> (..., O)."""
        return self.tokens(y)

    def few(self, x: Tensor, count: int) -> Tensor:
        """The first tokens of x as `forward` takes it."""
        few = self.tokens(x).flatten(0, -2)[:count]
        return few[..., None, None] if self.channels_first else few

    def _tokens_last(self, x: Tensor) -> Tensor:
        decision = self.decide(x)
        opaque = torch.compiler.is_compiling() and act_name(self.act) is None
        if opaque or decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.forward_reference(x, decision)
        ups = [(u.weight, u.bias) for u in (self.fc1_gate, self.fc1) if u is not None]
        own, down, table = decision.group(0), self.fc2.weight, self.fc2.table()
        return ops.mlp(x, ups, self.act, down, table, own.choice, self.fc2.bounds, own.order)

    def _join(self, first: Tensor, value: Tensor | None = None) -> Tensor:
        return self.act(first) if value is None else self.act(first) * value

    def hidden(self, x: Tensor) -> Tensor:
        """X (..., D) -> every hidden unit (..., U)."""
        ups = [F.linear(x, u.weight, u.bias) for u in (self.fc1_gate, self.fc1) if u is not None]
        return self._join(*ups)

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks: x (..., D), tokens on the leading axes -> (..., O)."""
        h = self.drop1(self.hidden(x))
        return self.drop2(self.fc2.masked(h, decision.group(0)))

    def all_choices(self, x: Tensor) -> list[Tensor]:
        """X (M, D) -> one (M, N + 1, O): the output of every choice."""
        return [self.fc2.all_choices(self.hidden(x))]


class AcmProjections(AdaptiveModule):
    """One projection, or several fused into one output, each cut to its own width for each token.

    Args:
        parts: in the order of the fused output: `Expand` (rotated heads) and `LowRank` are adaptive, `nn.Linear` stays
            dense.
        gate: one group for each adaptive part.
        names: plan entries, one a group.
        link: where given, the decision is published for another module.
    """

    def __init__(
        self, parts: dict[str, nn.Module], gate: Gate, names: tuple[str, ...], link: GateLink | None = None
    ) -> None:
        super().__init__(names)
        for key, part in parts.items():
            self.add_module(key, part)
        self.parts = tuple(parts)
        self.gate, self.link = gate, link

    def forward(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., sum of the parts' outputs)."""
        decision = self.decide(x)
        if self.link is not None:
            self.link.publish(decision)
        plain = decision.keep is None and len(self.parts) > 1 and not torch.compiler.is_compiling()
        if plain and ops.pick_backend(x) == "sorted":
            return self._written(x, decision)
        return self._join([p(x) if d is None else p(x, d) for p, d in self._pairs(decision)])

    def _written(self, x: Tensor, decision: Decision) -> Tensor:
        """`forward` by the sorted backend, each part straight into its share of the fused output."""
        widths = [getattr(self, key).out_features for key in self.parts]
        y = x.new_empty(*x.shape[:-1], sum(widths))
        for (part, own), share in zip(self._pairs(decision), y.split(widths, -1), strict=True):
            if own is not None and type(part) is Expand:
                part.write(x, own, share)
            else:
                share.copy_(part(x) if own is None else part(x, own))
        return y

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        return self._join([p(x) if d is None else p.masked(x, d) for p, d in self._pairs(decision)])

    def all_choices(self, x: Tensor) -> list[Tensor]:
        """X (M, D) -> (M, N + 1, O) of each adaptive part."""
        return [p.all_choices(x) for p, d in self._pairs(Decision(x.new_zeros(1, self.gate.groups))) if d is not None]

    def split_output(self, y: Tensor) -> list[Tensor]:
        """Output (M, sum of O) -> (M, O) of each adaptive part."""
        flags = [isinstance(getattr(self, key), Expand | LowRank) for key in self.parts]
        return [part for part, adaptive in zip(y.chunk(len(flags), -1), flags, strict=True) if adaptive]

    def _pairs(self, decision: Decision) -> Iterator[tuple[Any, Decision | None]]:
        g = 0
        for part in (getattr(self, key) for key in self.parts):
            adaptive = isinstance(part, Expand | LowRank)
            yield part, decision.group(g) if adaptive else None
            g += adaptive

    @staticmethod
    def _join(outs: list[Tensor]) -> Tensor:
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


class AcmOut(AdaptiveModule):
    """An output projection that reads only the leading dimensions of each head (or of hidden units, when linked).

    Args:
        fc: the contraction.
        gate: one group; None when the decision comes through `link`.
        names: plan entry; empty when linked (the work is counted where the decision was made).
        link: where the decision is read from.
        group: its group in the decision that is read.
    """

    def __init__(
        self, fc: Contract, gate: Gate | None, names: tuple[str, ...], link: GateLink | None = None, group: int = 0
    ) -> None:
        super().__init__(names)
        self.fc, self.link, self.group = fc, link, group
        if gate is not None:
            self.gate = gate

    def forward(self, h: Tensor) -> Tensor:
        """H (..., H * U) -> (..., O)."""
        decision = self.decide(h) if self.link is None else self.link.read()
        return self.fc(h, decision.group(self.group))

    def forward_reference(self, h: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        return self.fc.masked(h, decision.group(self.group))

    def all_choices(self, h: Tensor) -> list[Tensor]:
        """H (M, H * U) -> one (M, N + 1, O)."""
        return [self.fc.all_choices(h)]
