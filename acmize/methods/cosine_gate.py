"""CosineGate (arXiv 2512.22206): a sample skips the residual blocks that would tell it nothing new.

    CIR(x) = 1 - cos(x, F(x))          of one sample and one block y = rest(x + F(x))
    run the block  <=>  a CIR(x) + c(x) > log price(cost of the block),   c a small network on the pooled input

What is published computes F(x) to decide whether to compute F(x), so nothing is saved. Two modes:

    predict   (default) the network predicts CIR from the block's input, taught by the true one (smooth L1); the gate
              goes from the true to the predicted value over the first 40 % of phase 3. Samples that keep the block are
              gathered and run, the others pass through.
    oracle    as published: everything runs, then the gate decides; 0 % is saved, and the results say so. It tells
              whether CIR helps at all.

Gates: "cosine" (above); "plain", the same without CIR (ConvNet-AIG, arXiv 1711.11503), its control; "damage", the gate
of the other methods. All three read the same pooled input, are on one scale, log damage, and so have one price and one
dial: no labels are needed to start them (phase 2 fits them to damages). The first two are trained with Gumbel noise.

Deviations from the paper, and why
- The gate's threshold is the price of the block's MACs, so that one checkpoint serves every budget; the published
  penalty (a hinge on the rate, without gradient in the released code) is the budget loss of phase 3, weighted by MACs.
- The consistency loss is the distillation from the dense model in phase 3.
- Blocks that change the shape always run. BatchNorm keeps the statistics of the dense model.

Shapes: B samples, C channels, H x W positions, D gate inputs (C, or C + 1 with the true CIR in oracle mode).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops, parallel
from acmize.decision import Decision
from acmize.gates import DamageGate, Gate, GateSpec
from acmize.recording import AdaptiveModule
from acmize.registry import Keep, Method, Refused, register
from acmize.samples import joined, padded, put_among, put_back, run_rows, take

IN_VAIN = 8  # one sample in so many may run a block in vain: moving the others costs as much
ANNEAL = 0.4  # share of phase 3 over which the true CIR gives way to the predicted one


@dataclass(frozen=True, kw_only=True)
class CosineGateConfig:
    """What a skippable block looks like.

    Attributes:
        mode: "predict" (skips) or "oracle" (as published; saves nothing).
        gate: "cosine", "plain" or "damage"; see the module's docstring.
        gate_hidden: hidden width of a gate.
        cir_loss: weight of the prediction of CIR in phase 3.
    """

    mode: Literal["predict", "oracle"] = "predict"
    gate: Literal["cosine", "plain", "damage"] = "cosine"
    gate_hidden: int = 16
    cir_loss: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("predict", "oracle")), ("gate", ("cosine", "plain", "damage"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        if self.gate_hidden < 1:
            raise ValueError(f"gate_hidden: found {self.gate_hidden}, expected at least 1")
        if self.cir_loss < 0:
            raise ValueError(f"cir_loss: found {self.cir_loss}, expected a weight of at least 0")


# --- gates ----------------------------------------------------------------------------------------------------


class BlockGate(DamageGate):
    """A damage gate of one block, whose decision is one comparison.

    Its activation is ReLU: on a CPU, GELU between the convolutions of a single sample costs as much as all else here.
    """

    act = staticmethod(F.relu)

    pick = Gate.pick

    def margin(self, x: Tensor) -> Tensor:
        """X (B, D) -> (B, 1), log damage less what is worth the block, by the fewest operators; positive: it runs."""
        w1, b1, w2, b2 = self._parts.get(self.modules, self._folded)
        return F.linear(self.act(F.linear(x, w1, b1)), w2, b2)

    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (1, hidden) and bias (1,) from hidden units to log damage."""
        return self.fc2.weight, self.fc2.bias

    def _folded(self) -> tuple[Any, ...]:
        """First layer with the dial in its bias, last layer less the threshold."""
        weight, bias = self.head()
        threshold = (self.price * self.cost[0, -1]).log()
        return self.fc1.weight, self.fc1.bias + self.level * self.dial, weight, bias - threshold


class GumbelGate(BlockGate):
    """A damage gate that is trained as published: choices drawn with Gumbel noise, on the logarithm of the energies."""

    def __init__(self, spec: GateSpec) -> None:
        super().__init__(spec)
        self.temperature = 0.6

    def soft_scores(self, energy: Tensor) -> Tensor:
        """Log odds: running a block has energy price x cost, skipping it its damage."""
        return -energy.clamp_min(1e-30).log() / self.temperature

    def _straight_through(self, energy: Tensor) -> Decision:
        noise = -torch.empty_like(energy).exponential_().log()
        return super()._straight_through(energy * (-noise).exp())


class CosineGate(GumbelGate):
    """Log damage as a CIR + c: CIR predicted from the input, or (oracle) the last feature of the input."""

    def __init__(self, spec: GateSpec, reads_cir: bool) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(()))
        self.cir = None if reads_cir else nn.Linear(spec.hidden, 1)
        self.known_cir: Tensor | None = None  # set by the block while it is trained

    def predicted_cir(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., 1)."""
        assert self.cir is not None
        return self.cir(self.hidden(x))

    def head(self) -> tuple[Tensor, Tensor]:
        """The heads of c and of CIR as one."""
        weight, bias = super().head()
        if self.cir is None:
            raise TypeError("an oracle decides when the block has run: it has no quick decision")
        return weight + self.scale * self.cir.weight, bias + self.scale * self.cir.bias

    def log_damage(self, x: Tensor, dial: Tensor | None = None) -> Tensor:
        """X (..., D) -> (..., 1, 1)."""
        h = self.hidden(x, dial)
        if self.cir is None:
            eta = self.fc2(h) + self.scale * x[..., -1:]
        else:
            eta = F.linear(h, *self.head())
            if self.known_cir is not None:
                share = min(1.0, self.progress / ANNEAL)
                eta = eta + (1 - share) * self.scale * (self.known_cir - self.cir(h))
        return eta.unsqueeze(-1).float().clamp(-25.0, 10.0)


# --- the block ------------------------------------------------------------------------------------------------


class SkippableBlock(AdaptiveModule):
    """A residual block that each sample runs or skips.

    Args:
        block: the dense block, y = rest(x + F(x)), which keeps its weights.
        gate: one group, one learner.
        name: plan entry.
        branch: path within the block of the module whose output is F(x); None: F(x) = y - x.
        rest: path within the block of the module that a skipped input passes through; None: the identity.
        oracle: decide after running (see the module's docstring).
        cir_loss: weight of the prediction of CIR.
    """

    per_sample = True

    def __init__(
        self,
        block: nn.Module,
        gate: Gate,
        name: str,
        *,
        branch: str | None = None,
        rest: str | None = None,
        oracle: bool = False,
        cir_loss: float = 0.0,
    ) -> None:
        super().__init__((name,))
        self.block, self.gate = block, gate
        self.branch, self.rest, self.cir_loss = branch, rest, cir_loss
        self.oracle, self.skips = oracle, not oracle

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, H, W) -> the same shape."""
        pooled = x.mean((2, 3))
        learns_cir = isinstance(self.gate, CosineGate) and self.training
        if self.oracle or learns_cir:
            y, cir = self.run_with_cir(x)
            decision = self.decide(torch.cat([pooled, cir], 1)) if self.oracle else self._taught(pooled, cir)
            return self.blend(x, y, decision)
        masked = ops.pick_backend(x) == "masked"
        gate: Any = self.gate
        watched = self.recorder is not None or gate.choose is not None or gate.probe
        if not (watched or masked or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            margin = gate.margin(pooled)
            if x.size(0) == 1:
                return self.block(x) if margin.item() > 0 else self.skipped(x)
            return _gathered(self, x, margin[:, 0] > 0)
        decision = self.decide(pooled)
        if decision.keep is not None or masked:
            return self.forward_reference(x, decision)
        return _gathered(self, x, decision.choice[:, 0] > 0)

    def forward_reference(self, x: Tensor, decision: Decision) -> Tensor:
        """All the work, then a choice between the two outputs."""
        return self.blend(x, self.block(x), decision)

    def blend(self, x: Tensor, y: Tensor, decision: Decision) -> Tensor:
        """The block's output y where it is kept, else what a skipped input becomes; `keep` carries the gradient."""
        keep = decision.group(0).keep_or_hard(1, y.dtype)[:, :, None, None]
        return keep * y + (1 - keep) * self.skipped(x)

    def skipped(self, x: Tensor, owned: bool = False) -> Tensor:
        """What an input becomes that does not run the block; activations write into an input that is `owned`."""
        if self.rest is None:
            return x
        rest = self.block.get_submodule(self.rest)
        if type(rest) is nn.ReLU and not owned:
            return x.relu()
        return rest(x if owned else x.clone())

    def run_with_cir(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, C, H, W) of the whole block, and CIR (B, 1) without gradient."""
        if self.branch is None:
            y = self.block(x)
            return y, incongruity(x, y - x)
        seen: list[Tensor] = []
        module = self.block.get_submodule(self.branch)
        # measured at once: the block adds the shortcut to this tensor in place
        handle = module.register_forward_hook(lambda _m, _args, branch: seen.append(incongruity(x, branch)))
        try:
            return self.block(x), seen[-1]
        finally:
            handle.remove()

    def _taught(self, pooled: Tensor, cir: Tensor) -> Decision:
        """The decision of a gate that still sees the true CIR in part, and learns to predict it."""
        assert isinstance(self.gate, CosineGate)
        if self.recorder is not None and self.cir_loss:
            errors = F.smooth_l1_loss(self.gate.predicted_cir(pooled), cir, reduction="none")
            self.recorder.add_loss("cir", self.cir_loss * parallel.mean(errors))
        self.gate.known_cir = cir
        try:
            return self.decide(pooled)
        finally:
            self.gate.known_cir = None


@ops.eager
def _gathered(module: SkippableBlock, x: Tensor, runs: Tensor) -> Tensor:
    """Run the block on the samples (B,) that keep it, some at a time, and on nothing else."""
    if len(x) < 2:
        return module.block(x) if runs.any() else module.skipped(x)
    rows, rest = runs.nonzero().flatten(), runs.logical_not().nonzero().flatten()
    if len(rest) * IN_VAIN <= len(x):
        y = joined(run_rows(module.block, (x,), 0, len(x)))
        return put_among(y, rest, [module.skipped(take(x, rest), owned=True)] if len(rest) else [])
    if len(rows) <= len(rest):  # most only pass through: the others are put among them
        out = module.skipped(x)
        out = out.clone() if out is x else out
        return put_among(out, rows, run_rows(module.block, (take(x, padded(rows)),), 0, len(rows)))
    order = torch.cat([rows, rest])
    x = take(x, order)
    skipped = module.skipped(x[len(rows) :], owned=True)  # first: a block that writes to its input may run on them too
    return put_back([*run_rows(module.block, (x,), 0, len(rows)), skipped], order)


@torch.no_grad()
def incongruity(x: Tensor, branch: Tensor) -> Tensor:
    """CIR of each sample, 1 - cos(x, F(x)): (B, C, H, W) twice -> (B, 1)."""
    return 1 - F.cosine_similarity(x.flatten(1), branch.flatten(1)).unsqueeze(1)


# --- plan and build -------------------------------------------------------------------------------------------


@register(CosineGateConfig)
class CosineGateMethod(Method):
    """Plans and builds skippable residual blocks."""

    name = "cosine-gate"
    kinds = ("block",)
    gates: ClassVar = {"cosine": ("damage", "none"), "plain": ("damage", "none"), "damage": ("damage",)}
    defaults: ClassVar = {
        "merge": "none",
        "phases": ("gates", "finetune"),
        "gates": {"images": 2000, "draws": 4},
        "train": {"gate_lr": 3e-3, "gate_decay": 0.0},
        # With a budget loss of 1 every gate opened in the first steps, for good: at first a block is worth more.
        "losses": {"task": 1.0, "features": 0.0, "budget": 10.0, "entropy": 0.0, "diversity": 0.0},
    }

    def plan(
        self, site: Any, modules: dict[str, nn.Module], config: CosineGateConfig, keep: Keep, work: Any
    ) -> list[dict[str, Any]]:
        """The entry of one block; see `PlanEntry`."""
        fqn = site.fqn
        if fqn not in work.inputs:
            raise Refused("did not run on the example input")
        taken, given, macs = work.inputs[fqn], work.outputs[fqn], work.macs[fqn]
        if taken != given or len(taken) != 4:
            raise Refused(f"takes {taken[1:]} and gives {given[1:]}: only a block that keeps (C, H, W) can be skipped")
        if "branch" not in site.roles and "rest" in site.roles and config.gate == "cosine":
            raise Refused("its branch is not named, so F(x) cannot be seen; name it: PATH:block(branch=NAME,rest=NAME)")
        gate_macs = (_gate_inputs(taken[1], config) + 1) * config.gate_hidden  # the heads of c and CIR are one
        if gate_macs > macs // 2:
            raise Refused(f"too small: its gate would cost {gate_macs} of {macs} MACs")
        if not keep(fqn, fqn):
            return []
        options = {**site.options, "channels": taken[1]}
        entry = {"fqn": fqn, "target": fqn, "gate_at": fqn, "kind": "block", "form": "skip", "roles": dict(site.roles)}
        sizes = {"bounds": (0, 1), "heads": 1, "learner_macs": (macs,), "gate_macs": gate_macs, "min_choice": 0}
        return [{**entry, **sizes, "tokens": 1, "macs": macs, "options": options}]

    def build(
        self, modules: dict[str, nn.Module], entries: list[Any], config: CosineGateConfig, macs_total: int
    ) -> dict[str, nn.Module]:
        """The block inside its skippable form."""
        (entry,) = entries
        spec = GateSpec(
            dim=_gate_inputs(entry.options["channels"], config),
            hidden=config.gate_hidden,
            learner_macs=(entry.learner_macs,),
            gate_macs=(entry.gate_macs,),
            macs_total=macs_total,
        )
        oracle = config.mode == "oracle"
        if config.gate == "cosine":
            gate = CosineGate(spec, reads_cir=oracle)
        else:
            gate = (GumbelGate if config.gate == "plain" else BlockGate)(spec)
        inner = {role: path.removeprefix(f"{entry.target}.") for role, path in entry.roles.items()}
        block = SkippableBlock(
            modules[entry.target], gate, entry.fqn, branch=inner.get("branch"), rest=inner.get("rest"), oracle=oracle,
            cir_loss=config.cir_loss,
        )  # fmt: skip
        return {entry.target: block}


def _gate_inputs(channels: int, config: CosineGateConfig) -> int:
    return channels + (config.mode == "oracle")
