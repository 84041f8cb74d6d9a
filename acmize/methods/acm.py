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
- q, k and v that come from one fused linear, and the out projection behind them, share one gate that reads the input
  of the attention: the gates cost half as much (docs/log.md).
- Under rotary positions q and k cannot be rotated; the pairs of dimensions that turn together are ordered by energy
  (`paired`), which is exact at k = N too.
- Every learner adds a bias of its own, s_n(x) = W2_n act(W1_n x) + beta_n, which lets the mean of what is left out be
  put back in closed form.

Shapes: M tokens, D input width, U units (of a head), H heads, O output width, N learners, G groups of one gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from torch import nn

from acmize import ops
from acmize.adaptive import AcmMlp, AcmOut, AcmProjections
from acmize.gates import ClassificationGate, DamageGate, Gate, GateSpec
from acmize.layers import Contract, Expand, GateLink, LowRank
from acmize.registry import Keep, Method, Refused, register
from acmize.windows import AcmConv, Geometry


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


# --- plan and build -------------------------------------------------------------------------------------------


@register(AcmConfig)
class Acm(Method):
    """Plans and builds ACMs for MLPs, attention projections and single linear layers."""

    name = "acm"
    kinds = ("mlp", "attention", "linear")
    gates: ClassVar = {"damage": ("damage",), "classification": ("threshold",)}
    defaults: ClassVar = {  # learners and gates that already say most: small steps, towards the dense model alone
        "train": {"lr": 3e-5},
        "losses": {"task": 0.0, "entropy": 0.0, "diversity": 0.0},
    }

    def plan(
        self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep, work: Any
    ) -> list[dict[str, Any]]:
        """Entries for one site; see `PlanEntry`. `keep(fqn, target)` says whether an entry is wanted."""
        if site.kind == "mlp":
            return [self._plan_mlp(site, modules, config)] if keep(site.fqn, site.fqn) else []
        if config.projections == "none":
            raise Refused("projections are left dense (projections='none')")
        if site.kind == "linear":
            module = modules[site.fqn]
            if isinstance(module, nn.Conv1d):
                return [self._plan_windows(site, module, config)] if keep(site.fqn, site.fqn) else []
            entry = self._plan_lowrank(site.fqn, site.fqn, "linear", module, config, site)
            return [entry] if keep(site.fqn, site.fqn) else []
        if config.projections == "lowrank":
            return self._plan_lowrank_attention(site, modules, config, keep)
        return self._plan_rotated(site, modules, config, keep)

    def _plan_mlp(self, site: Any, modules: dict[str, nn.Module], config: AcmConfig) -> dict[str, Any]:
        dim = _width(modules[site.roles["fc1"]])[1]
        out, units = _width(modules[site.roles["fc2"]])
        if config.learner_dim is not None and config.learner_dim > units:
            raise Refused(
                f"learner_dim={config.learner_dim} is more than its {units} units; use --learner-dim {units} or less"
            )
        num = config.num_learners if config.learner_dim is None else round(units / config.learner_dim)
        bounds = _bounds(units, num, "MLP hidden units")
        ups = 2 if site.options.get("gated") else 1
        macs = tuple((ups * dim + out) * (b - a) for a, b in pairwise(bounds))
        return self._entry(site.fqn, site.fqn, "mlp", "prefix", bounds, 1, macs, dim, 1, config, site)

    def _plan_rotated(
        self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep
    ) -> list[dict[str, Any]]:
        heads, out, fused = site.options["heads"], site.roles["out"], site.roles.get("qkv")
        bounds = _bounds(_width(modules[out])[1] // heads, config.num_learners, "dimensions of a head")
        rotated = {"q": "rotate_qk", "k": "rotate_qk", "v": "rotate_vo"}
        paired = bool(site.options.get("paired_qk"))
        cut = [k for k, flag in rotated.items() if site.options.get(flag, True) or (paired and flag == "rotate_qk")]
        parts = _wanted_parts(site, cut, keep)
        if site.options.get("rotate_vo", True) and keep(out, out):
            parts.append(("out", out, out))
        shared = fused is not None and parts and parts[0][0] != "out"  # one gate for q, k, v and out
        entries = []
        for kind, fqn, target in parts:
            outputs, inputs = _width(modules[target])
            per_unit = outputs if kind == "out" else inputs
            form, widths = "rotated", bounds
            if paired and kind in ("q", "k"):
                pairs = _bounds(bounds[-1] // 2, config.num_learners, "pairs of rotary dimensions of a head")
                form, widths = "paired", tuple(2 * b for b in pairs)
            macs = tuple(per_unit * heads * (b - a) for a, b in pairwise(widths))
            dim = _width(modules[fused])[1] if shared and fused else inputs
            # Nothing left of an attention is worse than the first-order damage of its output says (docs/log.md).
            least = int(kind == "out" and not shared)
            entry = self._entry(
                fqn, target, kind, form, widths, heads, macs, dim, len(parts) if shared else 1, config, site, least
            )
            entries.append({**entry, "gate_at": fused if shared else target})
        return entries

    def _plan_lowrank_attention(
        self, site: Any, modules: dict[str, nn.Module], config: AcmConfig, keep: Keep
    ) -> list[dict[str, Any]]:
        entries = []
        parts = _wanted_parts(site, ["q", "k", "v"], keep)
        for kind, fqn, target in parts:
            groups = len(parts) if "qkv" in site.roles else 1
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

    def _plan_windows(self, site: Any, module: nn.Conv1d, config: AcmConfig) -> dict[str, Any]:
        """A convolution over time; all learners but the last, which makes it exact, cost what the dense layer costs."""
        if config.init == "random":
            raise Refused("a convolution: its learners come from its weights (init='random' has none)")
        out, channels, dim = module.out_channels, module.in_channels, module.weight[0].numel()
        rank, even = min(dim, out), dim * out // (dim + out)
        bounds = _bounds(rank, config.num_learners, "ranks")
        if config.num_learners > 1 and config.num_learners - 1 <= even < rank:
            bounds = (*ops.even_bounds(even, config.num_learners - 1), rank)
        macs = tuple((dim + out) * (b - a) for a, b in pairwise(bounds))
        return self._entry(
            site.fqn, site.fqn, "conv", "windows", bounds, 1, macs, channels, 1, config, site, min_choice=1
        )

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
            "gate_at": target,
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
        """Adaptive modules for the entries that share a gate, by the paths they take."""
        first = entries[0]
        if first.kind == "mlp":
            return self._build_mlp(modules, first, config, macs_total)
        if first.form == "windows":
            return {first.target: self._windows(modules, first, config, macs_total)}
        if first.form == "lowrank" and first.fqn == first.target:
            return {first.target: self._lowrank(modules[first.target], first, config, macs_total)}
        gate = _gate(config, _width(modules[first.gate_at])[1], entries, macs_total)
        out = next((e for e in entries if e.kind == "out"), None)
        parts = [e for e in entries if e.kind != "out"]
        link = GateLink() if out is not None and parts else None
        made: dict[str, nn.Module] = {}
        if parts:
            names = tuple(e.fqn for e in entries)
            made[parts[0].target] = AcmProjections(self._parts(modules, parts), gate, names, link)
        if out is not None:
            width, dim = _width(modules[out.target])
            fc = Contract(dim, width, out.bounds, out.heads)
            made[out.target] = (
                AcmOut(fc, gate, (out.fqn,)) if link is None else AcmOut(fc, None, (), link, entries.index(out))
            )
        return made

    def _parts(self, modules: dict[str, nn.Module], entries: list[Any]) -> dict[str, nn.Module]:
        """What a projection is made of: one part, or the three of a fused layer of which some may stay dense."""
        first = entries[0]
        width, dim = _width(modules[first.target])
        if first.fqn == first.target:
            return {first.kind: Expand(dim, width, True, first.bounds, first.heads, first.form == "paired")}
        adaptive, width = {e.kind: e for e in entries}, width // 3
        parts: dict[str, nn.Module] = {}
        for kind in ("q", "k", "v"):
            e = adaptive.get(kind)
            if e is None:
                parts[kind] = nn.Linear(dim, width)
            elif e.form == "lowrank":
                parts[kind] = LowRank(dim, width, e.bounds)
            else:
                parts[kind] = Expand(dim, width, True, e.bounds, e.heads)
        return parts

    def _lowrank(self, module: Any, entry: Any, config: AcmConfig, macs_total: int) -> nn.Module:
        out, dim = module.weight.shape
        gate = _gate(config, dim, [entry], macs_total)
        return AcmProjections({entry.kind: LowRank(dim, out, entry.bounds)}, gate, (entry.fqn,))

    def _windows(self, modules: dict[str, Any], entry: Any, config: AcmConfig, macs_total: int) -> nn.Module:
        conv, reader = modules[entry.target], entry.options.get("reader")
        gate = _gate(config, conv.in_channels, [entry], macs_total)
        read_by = None if reader is None else Geometry.of(modules[str(reader)])
        return AcmConv(conv, entry.bounds, gate, (entry.fqn,), read_by)

    def _build_mlp(
        self, modules: dict[str, nn.Module], entry: Any, config: AcmConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        roles, options = entry.roles, entry.options
        dim, out, units = _width(modules[roles["fc1"]])[1], _width(modules[roles["fc2"]])[0], entry.bounds[-1]
        gate = _gate(config, dim, [entry], macs_total)
        fc1, fc2 = Expand(dim, units, True, entry.bounds), Contract(units, out, entry.bounds)
        if "module" not in roles:
            link, fc1.deferred = GateLink(), True
            return {
                roles["fc1"]: AcmProjections({"fc1": fc1}, gate, (entry.fqn,), link),
                roles["fc2"]: AcmOut(fc2, None, (), link),
            }
        fc1_gate = Expand(dim, units, True, entry.bounds) if options.get("gated") else None
        act: Any = modules[roles["act"]]
        drop = (float(options.get("drop1", 0.0)), float(options.get("drop2", 0.0)))
        first = bool(options.get("channels_first"))
        return {entry.target: AcmMlp(fc1, fc2, act, gate, (entry.fqn,), fc1_gate, first, drop)}


def _wanted_parts(site: Any, kinds: list[str], keep: Keep) -> list[tuple[str, str, str]]:
    """(kind, entry, module replaced) for the projections that are wanted."""
    fused = site.roles.get("qkv")
    named = {k: (f"{fused}.{k}", fused) if fused else (site.roles[k], site.roles[k]) for k in kinds}
    return [(k, fqn, target) for k, (fqn, target) in named.items() if keep(fqn, target)]


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
    spec = GateSpec(
        dim=dim,
        hidden=config.gate_hidden,
        learner_macs=tuple(e.learner_macs for e in entries),
        gate_macs=tuple(e.gate_macs for e in entries),
        macs_total=macs_total,
        min_choice=entries[0].min_choice,
    )
    return kind(spec)
