"""Ada-PConv: how many channels a partial convolution of FasterNet mixes, decided for each sample.

A partial convolution (arXiv 2303.03667) is a 3x3 convolution on the leading r C channels and the identity on the rest.
Ada-PConv has three, r = 1/8, 1/4, 1/2, and a router p = softmax(W GAP(x) + b).

    soft (as published)   y = sum_b p_b y_b, in training and inference: all three run, 39 % more MACs than r = 1/4 alone
    hard (default)        y = y_b, b = argmax(log p_b - price * cost_b / cost_3); Gumbel straight-through in training;
                          the samples of a batch are grouped by branch, one convolution each

Deviations, and why
- `hard` saves work, `soft` cannot. MACs of the branches relative to r = 1/4: 0.25, 1, 4.
- Inserted into a pretrained model nothing changes at first: the 1/4 branch has the pretrained kernel, 1/8 its leading
  block, 1/2 the kernel beside an identity (a centre tap of one), which mixes nothing; the router starts at 1/4.
- Two terms are added to the loss in training, weighted by the config: a hinge on the cost above that of r = 1/4, and
  the squared distance of each batch's mean p from even use, against collapse.
- `gate="damage"` predicts what a branch costs the output in place of the router (`hard` alone); before training it has
  only 1/8 and 1/4 to choose from, since 1/2 computes what 1/4 does.

Shapes: B samples, C channels, N = 3 branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.branches import PartialBranches
from acmize.decision import Decision
from acmize.gates import DamageGate, Gate, GateSpec
from acmize.registry import Keep, Method, Refused, register

DIVISORS = (8, 4, 2)
STATIC = 1  # the branch that is the pretrained one


@dataclass(frozen=True, kw_only=True)
class AdaPConvConfig:
    """What an Ada-PConv looks like.

    Attributes:
        mode: "hard" runs one branch a sample, "soft" all three, as published.
        gate: "router" (published) or "damage" (predicts log damage; `hard` alone).
        gate_hidden: hidden width of a damage gate.
        hinge: weight of the branches' mean cost above that of r = 1/4.
        balance: weight of the distance from even use of the branches.
    """

    mode: Literal["hard", "soft"] = "hard"
    gate: Literal["router", "damage"] = "router"
    gate_hidden: int = 16
    hinge: float = 0.1
    balance: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("hard", "soft")), ("gate", ("router", "damage"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        if self.mode == "soft" and self.gate == "damage":
            raise ValueError("gate: found 'damage', expected 'router': soft mode runs every branch")
        if self.gate_hidden < 1 or self.hinge < 0 or self.balance < 0:
            raise ValueError("gate_hidden, hinge, balance: expected at least 1, 0 and 0")


class Router(Gate):
    """GAP -> Linear -> softmax, biased to the static branch at first."""

    dial_range = (-30.0, 30.0)

    def __init__(self, spec: GateSpec, soft: bool) -> None:
        super().__init__(spec)
        self.fc = nn.Linear(spec.dim, self.num_learners)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        nn.init.constant_(self.fc.bias[STATIC : STATIC + 1], 2.0)
        self.soft = soft
        self.temperature = 1.0

    def energies(self, x: Tensor) -> Tensor:
        """Negative log probability of each branch plus the price of its share of the largest one's work."""
        energy = -self.fc(x).float().log_softmax(-1).unsqueeze(-2)
        return F.pad(energy, (1, 0)) + self.price * self.cost / self.cost[:, -1:]

    def price_at(self, dial: float) -> float:
        """Linear and signed: 0.5 is the router as trained."""
        low, high = self.dial_range
        return low + dial * (high - low)

    def forward(self, x: Tensor) -> Decision:
        """X (B, C) -> which branch; in soft mode all of them, `keep` their weights."""
        if not self.soft or self.choose is not None:
            return super().forward(x)
        p = self.fc(x).float().softmax(-1)
        keep = p.flip(-1).cumsum(-1).flip(-1).unsqueeze(-2)
        return Decision(torch.full((*x.shape[:-1], 1), self.num_learners, device=x.device), keep)

    def _straight_through(self, energy: Tensor) -> Decision:
        return super()._straight_through(energy + torch.empty_like(energy).exponential_().log())


class AdaPConv(PartialBranches):
    """Branches that add the terms of the config to the loss while they are trained."""

    def __init__(
        self, widths: tuple[int, ...], gate: Gate, names: tuple[str, ...], hinge: float, balance: float
    ) -> None:
        super().__init__(widths, gate, names)
        self.hinge, self.balance = hinge, balance
        self.skips = not getattr(gate, "soft", False)

    def decide(self, x: Tensor) -> Decision:
        """As of every adaptive module, with the terms of the loss."""
        decision = super().decide(x)
        if self.recorder is not None and self.training and decision.keep is not None:
            keep = decision.keep[:, 0].float()
            p = parallel.mean(keep - F.pad(keep[:, 1:], (0, 1)), (0,))
            costs = self.gate.cost[0, 1:] / self.gate.cost[0, STATIC + 1]
            self.recorder.add_loss("hinge", self.hinge * F.relu((p * costs).sum() - 1))
            self.recorder.add_loss("balance", self.balance * (p - 1 / len(p)).square().sum())
        return decision


@register(AdaPConvConfig)
class AdaPConvMethod(Method):
    """Plans and builds Ada-PConvs."""

    name = "ada-pconv"
    kinds = ("partial",)
    gates: ClassVar = {"router": ("none",), "damage": ("damage",)}
    defaults: ClassVar = {"merge": "none", "phases": ("gates", "finetune"), "train": {"gate_decay": 0.0}}

    def plan(
        self, site: Any, modules: dict[str, Any], config: AdaPConvConfig, keep: Keep, work: Any
    ) -> list[dict[str, Any]]:
        """One entry a partial convolution; the dense site is the branch of r = 1/4."""
        if not keep(site.fqn, site.fqn):
            return []
        channels, conv = site.options["channels"], modules[site.roles["conv"]]
        if channels % max(DIVISORS) or conv.weight.shape != (channels // 4, channels // 4, 3, 3):
            raise Refused(f"expected a 3x3 convolution of a quarter of {channels} channels, a multiple of 8")
        widths = [channels // d for d in DIVISORS]
        positions = torch.Size(work.outputs[site.fqn][2:]).numel()
        costs = [9 * c * c * positions for c in widths]
        soft = config.mode == "soft"
        macs = tuple(costs) if soft else (costs[0], costs[1] - costs[0], costs[2] - costs[1])
        n = len(DIVISORS)
        gate_macs = channels * n if config.gate == "router" else (channels + n) * config.gate_hidden
        return [
            {
                "fqn": site.fqn, "target": site.fqn, "gate_at": site.fqn, "kind": "partial", "form": "branches",
                "bounds": (0, *widths), "heads": 1, "learner_macs": macs, "gate_macs": gate_macs,
                "min_choice": n if soft else 1, "tokens": 1, "macs": work.macs[site.fqn], "roles": dict(site.roles),
                "options": dict(site.options),
            }
        ]  # fmt: skip

    def build(
        self, modules: dict[str, Any], entries: list[Any], config: AdaPConvConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        """The three branches in the place of the partial convolution."""
        (e,) = entries
        spec = GateSpec(
            dim=e.options["channels"], hidden=config.gate_hidden, learner_macs=(e.learner_macs,),
            gate_macs=(e.gate_macs,), macs_total=macs_total, min_choice=e.min_choice,
        )  # fmt: skip
        gate = DamageGate(spec) if config.gate == "damage" else Router(spec, config.mode == "soft")
        return {e.target: AdaPConv(e.bounds[1:], gate, (e.fqn,), config.hinge, config.balance)}

    def fill(
        self, adaptive: dict[str, Any], dense: dict[str, Any], entries: list[Any], moments: dict[str, Tensor]
    ) -> None:
        """The pretrained kernel, its leading block, and it beside an identity."""
        for e in entries:
            kernel = dense[e.roles["conv"]].weight.detach()
            small, same, large = (conv.weight for conv in adaptive[e.target].convs)
            quarter = len(kernel)
            same.copy_(kernel)
            small.copy_(kernel[: len(small), : len(small)])
            large.zero_()
            large[:quarter, :quarter] = kernel
            rest = range(quarter, len(large))
            large[rest, rest, 1, 1] = 1.0
