"""LAG, latency-aware gating of CNN channels, per sample and with work that is really left out.

Published (public code only): every BatchNorm output times sigmoid(logit_c / T) with static logits, L1 on the gates,
T = max(0.5, 5 * 0.9^epoch) over 25 epochs. Nothing depends on the input and nothing is skipped. Here

    logits = W2 gelu(W1 GAP(x) + b1) + b2
    m_n    = min_{j <= n} (logits_j - log(price * cost of the learners from j on)),   learner n runs iff m_n > 0
    keep_n = 1[m_n + e > 0]  forward,  sigmoid((m_n + e) / T)  backward,   e logistic, one draw a sample

Deviations, and why
- Gates read the input of the chain, so that channels depend on the sample (the description promises it, the code does
  not do it). Inner channels of a residual block are gated, never the residual stream.
- Channels are ordered by the output variance they explain and owned by N learners; a sample runs a prefix. Samples of
  one width are then one dense product: gathers of single channels for each sample were slower than dense at batch 64.
- One logistic draw a sample for all learners samples k with P(k > n) = sigmoid(m_n); a draw for each would thin
  the widths out at the start.
- A logit is the log damage of leaving out the learners from n on, so that damages, which need no labels, can start the
  gates, and one price serves every budget. `gate="damage"` (the default) picks argmin damage + price * cost instead.
- The mean of what is left out is put back by one bias for each learner; at full width they cancel exactly.

Shapes: B samples, D input channels, U inner channels, O output channels, N learners.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize.channels import ChannelChain
from acmize.cut import Between, CutLayer, chain_macs, steps
from acmize.decision import Decision
from acmize.gates import DamageGate, Gate, GateSpec
from acmize.ops import even_bounds
from acmize.registry import Keep, Method, Refused, register


@dataclass(frozen=True, kw_only=True)
class LagConfig:
    """What a gated chain looks like.

    Attributes:
        num_learners: groups of channels, N >= 1.
        gate: "damage" (predicts log damage) or "logistic" (the published kind, on the same scale).
        gate_hidden: hidden width of a gate.
    """

    num_learners: int = 8
    gate: Literal["damage", "logistic"] = "damage"
    gate_hidden: int = 16

    def __post_init__(self) -> None:
        if self.gate not in ("damage", "logistic"):
            raise ValueError(f"gate: found {self.gate!r}, expected 'damage' or 'logistic'")
        for name in ("num_learners", "gate_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")


class LogisticGate(DamageGate):
    """The published kind of gate, made to depend on the input and put on the scale of damage; see the docstring above.

    Without damages to fit, the last layer starts at zero with a bias of 2: every sample alike, and all on at price 0.
    """

    pick = Gate.pick  # its energies are its own

    def __init__(self, spec: GateSpec) -> None:
        super().__init__(spec)
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, 2.0)

    def energies(self, x: Tensor) -> Tensor:
        """Minus the sum of the margins m_n of the learners that run; margins fall, so the least is where they end."""
        left_out = self.price * (self.cost[:, -1:] - self.cost[:, :-1])
        margins = (self.log_damage(x) - left_out.clamp_min(1e-20).log()).cummin(-1)[0]
        return F.pad(-margins.cumsum(-1), (1, 0))

    def _straight_through(self, energy: Tensor) -> Decision:
        noise = torch.rand_like(energy[..., :1]).logit(eps=1e-6)
        margins = -energy.diff(dim=-1) + noise
        keep = (margins > 0).to(energy.dtype)
        soft = (margins / temperature(self.progress)).sigmoid()
        keep = F.pad(keep + (soft - soft.detach()), (self.min_choice, 0), value=1.0)
        return Decision(keep.detach().sum(-1).round().long(), keep)


def temperature(progress: float) -> float:
    """The published schedule, max(0.5, 5 * 0.9^epoch) over 25 epochs, at a share of any training."""
    return max(0.5, 5 * 0.9 ** (25 * progress))


@register(LagConfig)
class Lag(Method):
    """Plans and builds gated chains."""

    name = "lag"
    kinds = ("channels",)
    gates: ClassVar = {"damage": ("damage",), "logistic": ("damage", "none")}
    defaults: ClassVar = {
        "merge": "none",
        "phases": ("gates", "finetune"),
        "train": {"gate_decay": 0.0},
        # Labels count in full, and the budget holds against what channels are worth before the rest has adapted.
        "losses": {"task": 1.0, "features": 0.0, "budget": 10.0, "entropy": 0.0, "diversity": 0.0},
    }

    def plan(
        self, site: Any, modules: dict[str, Any], config: LagConfig, keep: Keep, work: Any
    ) -> list[dict[str, Any]]:
        """One entry a chain; what it costs is taken from the shapes of one forward."""
        paths = list(site.roles.values())
        target, n = paths[0], config.num_learners
        if not keep(site.fqn, target):
            return []
        if any(len(work.inputs.get(p, ())) != 4 for p in paths):
            raise Refused("its layers do not see images, (B, C, H, W) or (B, H, W, C)")
        widths = [modules[p].weight.shape[0] for p in paths[:-1]]
        if n > min(widths):
            raise Refused(f"num_learners={n} is more than its {min(widths)} channels; use --num-learners {min(widths)}")
        bounds = [list(even_bounds(w, n)) for w in widths]
        with torch.device("meta"):
            layers = _layers([modules[p] for p in paths], bounds)
        sizes = [torch.Size(work.outputs[p][1:]).numel() // modules[p].weight.shape[0] for p in paths]
        macs = steps([chain_macs(layers, sizes, k) for k in range(n + 1)])
        dim = _in_channels(modules[target])
        gate_macs = dim * config.gate_hidden + config.gate_hidden * n
        if gate_macs > sum(macs) // 2:
            raise Refused(f"too small: its gate would cost {gate_macs} of {sum(macs)} MACs a sample")
        return [
            {
                "fqn": site.fqn, "target": target, "gate_at": target, "kind": "channels", "form": "channels",
                "bounds": tuple(bounds[0]), "heads": 1, "learner_macs": macs, "gate_macs": gate_macs,
                "min_choice": 0 if site.options["residual"] else 1, "tokens": 1,
                "macs": sum(work.macs[p] for p in paths), "roles": dict(site.roles),
                "options": {
                    **site.options, "bounds": bounds, "depthwise": [layer.depthwise for layer in layers],
                    "inputs": [list(work.inputs[p][1:]) for p in paths],
                },
            }
        ]  # fmt: skip

    def build(
        self, modules: dict[str, Any], entries: list[Any], config: LagConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        """The chain in the place of its first layer, identities in that of the rest."""
        (e,) = entries
        paths, between = list(e.roles.values()), e.options["between"]
        spec = GateSpec(
            dim=_in_channels(modules[paths[0]]), hidden=config.gate_hidden, learner_macs=(e.learner_macs,),
            gate_macs=(e.gate_macs,), macs_total=macs_total, min_choice=e.min_choice,
        )  # fmt: skip
        gate = DamageGate(spec) if config.gate == "damage" else LogisticGate(spec)
        bounds = e.options["bounds"]
        folded = bool(e.options.get("folded"))
        parts = [Between([copy.deepcopy(modules[p]) for p in group], folded) for group in between]
        layers = _layers([modules[p] for p in paths], bounds, folded)
        chain = ChannelChain(layers, parts, [tuple(b) for b in bounds], gate, (e.fqn,))
        rest = [*paths[1:], *(p for group in between for p in group)]
        return {e.target: chain, **{path: nn.Identity() for path in rest}}

    def moments(self, entry: Any) -> dict[str, tuple[str, int]]:
        """Of what every layer but the first reads, where it sums over channels."""
        reads = zip(entry.roles.values(), entry.options["depthwise"], strict=True)
        return {path: ("input", 1) for i, (path, depthwise) in enumerate(reads) if i and not depthwise}

    def fill(
        self, adaptive: dict[str, Any], dense: dict[str, Any], entries: list[Any], moments: dict[str, Tensor]
    ) -> None:
        """Weights in the order of importance, and biases that put the mean of what is left out back."""
        for e in entries:
            chain: ChannelChain = adaptive[e.target]
            paths = list(e.roles.values())
            stats = [moments[p][0] if p in moments else None for p in paths[1:]]
            chain.fill_([dense[p] for p in paths], stats, e.options["inputs"])

    def narrow(self, module: Any, entry: Any, choice: int) -> Any:
        """Slice the layers, fold their norms, forget what the gate said of the rest."""
        module.narrow_(choice)
        dim, hidden = module.gate.fc1.in_features, module.gate.fc1.out_features
        gate_macs = dim * hidden + hidden * choice
        module.gate.gate_macs = (gate_macs,)
        bounds = [list(b) for b in module.bounds]
        return replace(
            entry, bounds=tuple(bounds[0]), learner_macs=entry.learner_macs[:choice], gate_macs=gate_macs,
            options={**entry.options, "bounds": bounds, "folded": True},
        )  # fmt: skip


def _layers(like: list[Any], bounds: list[list[int]], folded: bool = False) -> list[CutLayer]:
    ends = [None, *(tuple(b) for b in bounds), None]
    return [CutLayer(m, a, b, bias=folded and b is not None) for m, a, b in zip(like, ends, ends[1:], strict=False)]


def _in_channels(layer: Any) -> int:
    return layer.weight.shape[1]
