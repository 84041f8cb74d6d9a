"""ACM, Adaptive Computation Module (arXiv 2312.10193, AAAI 2025): a token runs the first k of N ordered learners.

    h(x, k) = table(0) + sum_{n < k} s_n(x)                                              (eq. 1 of the paper)

Learner n owns the units [bounds[n], bounds[n + 1]) of a hidden activation: MLP units, the leading dimensions of every
rotated attention head, or the rank of a low-rank projection. Weights stay `nn.Linear` shaped, so quantisation,
optimisers and checkpoints see nothing strange.

Deviations from the paper, and why
- Learners are slices of the pretrained weights, not random ones (`init="random"` keeps the published start): the
  converted model equals the dense one at k = N.
- Projections keep their full rank and cut rotated heads (`projections="rotated"`); the published low-rank form
  (`"lowrank"`, N r = D O / (D + O)) costs as much as the dense layer and is not exact at k = N.
- q, k and v that come from one fused linear share the first layer of their gate.
- Every learner adds a bias of its own, s_n(x) = W2_n act(W1_n x) + beta_n, which lets the mean of what is left out be
  put back in closed form.

Shapes: M tokens, D input width, U units (of a head), H heads, O output width, N learners, G groups of one gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.gates import AdaptiveModule, ClassificationGate, DamageGate, Decision, Gate
from acmize.layers import Contract, Expand, GateLink, LowRank
from acmize.registry import Refused, register


@dataclass(frozen=True, kw_only=True)
class AcmConfig:
    """What an ACM looks like.

    Attributes:
        num_learners: learners a site, N >= 1.
        learner_dim: units of an MLP's learner; where given, an MLP has as many learners as fit (projections keep
            `num_learners`).
        gate: "damage" (predicts log damage) or "classification" (published).
        gate_hidden: hidden width of a gate.
        projections: "rotated" heads, published "lowrank", or "none" (MLPs only).
        init: learners from the "pretrained" weights, or "random" as published.
    """

    num_learners: int = 8
    learner_dim: int | None = None
    gate: Literal["damage", "classification"] = "damage"
    gate_hidden: int = 16
    projections: Literal["rotated", "lowrank", "none"] = "rotated"
    init: Literal["pretrained", "random"] = "pretrained"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        for name in ("num_learners", "gate_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.learner_dim is not None and self.learner_dim < 1:
            raise ValueError(f"learner_dim: found {self.learner_dim}, expected at least 1")


_CHOICES = {
    "gate": ("damage", "classification"),
    "projections": ("rotated", "lowrank", "none"),
    "init": ("pretrained", "random"),
}


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
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """X (..., D), or (B, D, H, W) when channels come first -> the same with O in D's place."""
        if self.channels_first:
            return self._tokens_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._tokens_last(x)

    def _tokens_last(self, x: Tensor) -> Tensor:
        decision = self.decide(x)
        if decision.keep is not None or ops.pick_backend(x) == "masked":
            return self.forward_reference(x, decision)
        choice = decision.choice.reshape(-1)
        order = ops.sort_tokens(choice, self.gate.num_learners)
        ups = [(u.weight, u.bias) for u in (self.fc1_gate, self.fc1) if u is not None]
        y = ops.mlp_sorted(
            x.flatten(0, -2), ups, self._join, self.fc2.weight, self.fc2.table(), choice, order, self.fc2.bounds
        )
        return y.unflatten(0, x.shape[:-1])

    def _join(self, first: Tensor, value: Tensor | None = None) -> Tensor:
        return self.act(first) if value is None else self.act(first) * value

    def hidden(self, x: Tensor) -> Tensor:
        """X (..., D) -> every hidden unit (..., U)."""
        ups = [F.linear(x, u.weight, u.bias) for u in (self.fc1_gate, self.fc1) if u is not None]
        return self._join(*ups)

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks: x (..., D), tokens on the leading axes -> (..., O)."""
        h = F.dropout(self.hidden(x), self.drop[0], self.training)
        return F.dropout(self.fc2.masked(h, decision.group(0)), self.drop[1], self.training)

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
        return self._join([p(x) if d is None else p(x, d) for p, d in self._pairs(decision)])

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        return self._join([p(x) if d is None else p.masked(x, d) for p, d in self._pairs(decision)])

    def all_choices(self, x: Tensor) -> list[Tensor]:
        """X (M, D) -> (M, N + 1, O) of each adaptive part."""
        return [p.all_choices(x) for p, d in self._pairs(Decision(x.new_zeros(1, self.gate.groups))) if d is not None]

    def split_output(self, y: Tensor) -> list[Tensor]:
        """Output (M, sum of O) -> (M, O) of each adaptive part."""
        flags = [type(getattr(self, key)) is not nn.Linear for key in self.parts]
        return [part for part, adaptive in zip(y.chunk(len(flags), -1), flags, strict=True) if adaptive]

    def _pairs(self, decision: Decision) -> Iterator[tuple[Any, Decision | None]]:
        g = 0
        for part in (getattr(self, key) for key in self.parts):
            adaptive = type(part) is not nn.Linear
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
    """

    def __init__(self, fc: Contract, gate: Gate | None, names: tuple[str, ...], link: GateLink | None = None) -> None:
        super().__init__(names)
        self.fc, self.link = fc, link
        if gate is not None:
            self.gate = gate

    def forward(self, h: Tensor) -> Tensor:
        """H (..., H * U) -> (..., O)."""
        decision = self.decide(h) if self.link is None else self.link.read()
        return self.fc(h, decision.group(0))

    def forward_reference(self, h: Tensor, decision: Decision) -> Tensor:
        """All the work, then masks."""
        return self.fc.masked(h, decision.group(0))

    def all_choices(self, h: Tensor) -> list[Tensor]:
        """H (M, H * U) -> one (M, N + 1, O)."""
        return [self.fc.all_choices(h)]


Keep = Callable[[str, str], bool]


# --- plan and build -------------------------------------------------------------------------------------------


@register(AcmConfig)
class Acm:
    """Plans and builds ACMs for MLPs, attention projections and single linear layers."""

    name = "acm"

    def plan(self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep) -> list[dict[str, Any]]:
        """Entries for one site; see `PlanEntry`. `keep(fqn, target)` says whether an entry is wanted."""
        if site.kind == "mlp":
            return [self._plan_mlp(site, modules, config)] if keep(site.fqn, site.fqn) else []
        if config.projections == "none":
            raise Refused("projections are left dense (projections='none')")
        if site.kind == "linear":
            entry = self._plan_lowrank(site.fqn, site.fqn, "linear", modules[site.fqn], config, site)
            return [entry] if keep(site.fqn, site.fqn) else []
        if config.projections == "lowrank":
            return self._plan_lowrank_attention(site, modules, config, keep)
        return self._plan_rotated(site, modules, config, keep)

    def _plan_mlp(self, site: Any, modules: dict[str, nn.Module], config: AcmConfig) -> dict[str, Any]:
        fc1, fc2 = modules[site.roles["fc1"]], modules[site.roles["fc2"]]
        dim, units, out = fc1.weight.shape[1], fc2.weight.shape[1], fc2.weight.shape[0]
        num = config.num_learners if config.learner_dim is None else max(1, round(units / config.learner_dim))
        bounds = _bounds(units, num, "MLP hidden units")
        ups = 2 if site.options.get("gated") else 1
        macs = tuple((ups * dim + out) * (b - a) for a, b in pairwise(bounds))
        return self._entry(site.fqn, site.fqn, "mlp", "prefix", bounds, 1, macs, dim, 1, config, site)

    def _plan_rotated(
        self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep
    ) -> list[dict[str, Any]]:
        heads, out = site.options["heads"], modules[site.roles["out"]]
        bounds = _bounds(_width(out)[1] // heads, config.num_learners, "dimensions of a head")
        rotated = {"q": "rotate_qk", "k": "rotate_qk", "v": "rotate_vo"}
        kinds = [k for k, flag in rotated.items() if site.options.get(flag, True)]
        entries = []
        for kind, fqn, target, groups in _wanted_parts(site, kinds, keep):
            dim = _width(modules[target])[1]
            macs = tuple(dim * heads * (b - a) for a, b in pairwise(bounds))
            entries.append(self._entry(fqn, target, kind, "rotated", bounds, heads, macs, dim, groups, config, site))
        fqn = site.roles["out"]
        if site.options.get("rotate_vo", True) and keep(fqn, fqn):
            width, dim = _width(out)
            macs = tuple(width * heads * (b - a) for a, b in pairwise(bounds))
            entries.append(self._entry(fqn, fqn, "out", "rotated", bounds, heads, macs, dim, 1, config, site))
        return entries

    def _plan_lowrank_attention(
        self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep
    ) -> list[dict[str, Any]]:
        entries = []
        for kind, fqn, target, groups in _wanted_parts(site, ["q", "k", "v"], keep):
            part = modules[target]
            if "qkv" in site.roles:
                part = nn.Linear(_width(part)[1], _width(part)[0] // 3, device="meta")
            entries.append(self._plan_lowrank(fqn, target, kind, part, config, site, groups))
        fqn = site.roles["out"]
        if keep(fqn, fqn):
            entries.append(self._plan_lowrank(fqn, fqn, "out", modules[fqn], config, site))
        return entries

    def _plan_lowrank(
        self, fqn: str, target: str, kind: str, module: Any, config: AcmConfig, site: Any, groups: int = 1
    ) -> dict[str, Any]:
        out, dim = module.weight.shape
        if config.init == "random":  # as published: all learners together cost what the dense layer cost
            rank = round((dim * out + out) / (dim + out + 1))
            rank = max(config.num_learners, rank - rank % config.num_learners)
        else:
            rank = min(dim, out)  # exact at k = N
        bounds = _bounds(rank, config.num_learners, "ranks")
        macs = tuple((dim + out) * (b - a) for a, b in pairwise(bounds))
        return self._entry(fqn, target, kind, "lowrank", bounds, 1, macs, dim, groups, config, site, min_choice=1)

    def _entry(
        self,
        fqn: str,
        target: str,
        kind: str,
        form: str,
        bounds: tuple[int, ...],
        heads: int,
        macs: tuple[int, ...],
        dim: int,
        groups: int,
        config: AcmConfig,
        site: Any,
        min_choice: int = 0,
    ) -> dict[str, Any]:
        hidden, choices = config.gate_hidden, len(macs)
        if config.gate == "damage":
            gate_macs = -(-dim * hidden // groups) + hidden * choices
        else:
            gate_macs = -(-(dim * hidden + hidden * hidden) // groups) + hidden * (choices + 1)
        if gate_macs > sum(macs) // 2:
            raise Refused(f"too small: its gate would cost {gate_macs} of {sum(macs)} MACs a token")
        return {
            "fqn": fqn,
            "target": target,
            "kind": kind,
            "form": form,
            "bounds": bounds,
            "heads": heads,
            "learner_macs": macs,
            "gate_macs": gate_macs,
            "min_choice": min_choice,
            "roles": dict(site.roles),
            "options": dict(site.options),
        }

    def build(
        self, modules: dict[str, nn.Module], entries: list[Any], config: AcmConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        """Adaptive modules for the entries of one target, by the path they take."""
        first = entries[0]
        if first.kind == "mlp":
            return self._build_mlp(modules, first, config, macs_total)
        if first.form == "lowrank" and first.fqn == first.target:
            return {first.target: self._lowrank(modules[first.target], first, config, macs_total)}
        module = modules[first.target]
        if first.kind == "out":
            fc = Contract(module.weight.shape[1], module.weight.shape[0], first.bounds, first.heads)  # pyright: ignore
            gate = _gate(config, module.weight.shape[1], [first], macs_total)
            return {first.target: AcmOut(fc, gate, (first.fqn,))}
        return {first.target: self._projections(module, entries, config, macs_total)}

    def _projections(self, module: Any, entries: list[Any], config: AcmConfig, macs_total: int) -> nn.Module:
        dim, names = module.weight.shape[1], tuple(e.fqn for e in entries)
        gate = _gate(config, dim, entries, macs_total)
        if entries[0].fqn == entries[0].target:  # a projection of its own
            e = entries[0]
            part = Expand(dim, module.weight.shape[0], True, e.bounds, e.heads)
            return AcmProjections({e.kind: part}, gate, names)
        width, adaptive = module.weight.shape[0] // 3, {e.kind: e for e in entries}
        if entries[0].form == "lowrank":
            lowrank: dict[str, nn.Module] = {
                k: LowRank(dim, width, adaptive[k].bounds) if k in adaptive else nn.Linear(dim, width) for k in "qkv"
            }
            return AcmProjections(lowrank, gate, names)
        parts = {
            k: Expand(dim, width, True, adaptive[k].bounds, adaptive[k].heads)
            if k in adaptive
            else nn.Linear(dim, width)
            for k in ("q", "k", "v")
        }
        return AcmProjections(parts, gate, names)

    def _lowrank(self, module: Any, entry: Any, config: AcmConfig, macs_total: int) -> nn.Module:
        out, dim = module.weight.shape
        gate = _gate(config, dim, [entry], macs_total)
        return AcmProjections({entry.kind: LowRank(dim, out, entry.bounds)}, gate, (entry.fqn,))

    def _build_mlp(
        self, modules: dict[str, nn.Module], entry: Any, config: AcmConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        roles, options = entry.roles, entry.options
        w1, w2 = modules[roles["fc1"]].weight, modules[roles["fc2"]].weight
        dim, out, units = w1.shape[1], w2.shape[0], entry.bounds[-1]
        gate = _gate(config, dim, [entry], macs_total)
        fc1, fc2 = Expand(dim, units, True, entry.bounds), Contract(units, out, entry.bounds)
        if "module" not in roles:
            link = GateLink()
            return {
                roles["fc1"]: AcmProjections({"fc1": fc1}, gate, (entry.fqn,), link),
                roles["fc2"]: AcmOut(fc2, None, (), link),
            }
        fc1_gate = Expand(dim, units, True, entry.bounds) if options.get("gated") else None
        act: Any = modules[roles["act"]]
        drop = (float(options.get("drop1", 0.0)), float(options.get("drop2", 0.0)))
        first = bool(options.get("channels_first"))
        return {entry.target: AcmMlp(fc1, fc2, act, gate, (entry.fqn,), fc1_gate, first, drop)}


def _wanted_parts(site: Any, kinds: list[str], keep: Keep) -> list[tuple[str, str, str, int]]:
    """(kind, entry, module replaced, groups of its gate) for the projections that are wanted."""
    fused = site.roles.get("qkv")
    if fused is None:
        return [(k, site.roles[k], site.roles[k], 1) for k in kinds if keep(site.roles[k], site.roles[k])]
    kept = [k for k in kinds if keep(f"{fused}.{k}", fused)]
    return [(k, f"{fused}.{k}", fused, len(kept)) for k in kept]


def _width(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer or 1x1 convolution."""
    return module.weight.shape[0], module.weight.shape[1]


def _bounds(units: int, num_learners: int, what: str) -> tuple[int, ...]:
    if num_learners > units:
        raise Refused(
            f"num_learners={num_learners} is more than its {units} {what}; use --num-learners {units} or less"
        )
    return ops.even_bounds(units, num_learners)


def _gate(config: AcmConfig, dim: int, entries: list[Any], macs_total: int) -> Gate:
    kind = DamageGate if config.gate == "damage" else ClassificationGate
    macs = [e.learner_macs for e in entries]
    return kind(dim, config.gate_hidden, macs, macs_total, entries[0].min_choice)
