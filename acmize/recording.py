"""Adaptive modules, and what they tell of their decisions while a `record()` context is open.

Shapes: ... any leading axes (batch, tokens), D input width, G groups, N learners.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.decision import Decision
from acmize.errors import AcmizeError
from acmize.gates import Gate
from acmize.padding import Padding

_R = TypeVar("_R")


class AdaptiveModule(nn.Module):
    """Base of what methods insert: a gate, a name for each of its groups, and a place for a recorder.

    Subclasses call `decide(x)` once a forward and implement `forward_reference(x, decision)`.

    Attributes:
        per_sample: one decision a sample, from a pooled input (B, D), in place of one a token.
        skips: what is not chosen is not run; False where everything runs whatever is chosen, and nothing is saved.
    """

    gate: Gate
    per_sample = False
    skips = True

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names  # entries of the plan, one a group
        self.recorder: Recorder | None = None
        self.padding: Padding | None = None  # set where the host says which tokens are real

    def __setattr__(self, name: str, value: Any) -> None:
        inside = self.__dict__.get("_modules", {}).get(name)
        if inside is not None and isinstance(value, nn.Module) and value is not inside and inside in value.modules():
            raise AcmizeError(
                f"{self.names or type(self).__name__}: found {type(value).__name__} around its layer {name}, which is "
                "not called but cut; wrap layers that stay dense, or merge the adapter before the conversion"
            )
        super().__setattr__(name, value)

    def decide(self, x: Tensor) -> Decision:
        """Ask the gate about x (..., D), tokens (or samples alone) on the leading axes, and tell the recorder."""
        valid = self.valid(x)
        decision = self.gate(x) if valid is None else self.gate(x, valid)
        if self.recorder is not None:
            self.recorder.add(self, x, decision)
        return decision

    def valid(self, x: Tensor) -> Tensor | None:
        """X (B, T, D) -> (B, T), True for real tokens; None where all are."""
        return None if self.padding is None else self.padding.read(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The module's input -> what the learners read (..., D), tokens on the leading axes."""
        return x

    def output_tokens(self, y: Tensor) -> Tensor:
        """The module's output -> (..., O), tokens on the leading axes."""
        return y

    def few(self, x: Tensor, count: int) -> Tensor:
        """The module's input, cut to its first tokens, or samples where it decides for whole samples."""
        return x[:count] if self.per_sample else x.flatten(0, -2)[:count]

    def gate_input(self, x: Tensor) -> Tensor:
        """What the learners read (M, D) -> what the gate reads of it."""
        return x

    def split_output(self, y: Tensor) -> list[Tensor]:
        """The module's output (M, O) -> the share of each group of the gate."""
        return [y]

    def macs(self, decision: Decision) -> Tensor:
        """Executed MACs (..., G) of a decision, the gate not included."""
        table = F.pad(self.gate.learner_macs.cumsum(-1), (1, 0))
        return table.gather(1, decision.choice.flatten(0, -2).T).T.unflatten(0, decision.choice.shape[:-1])


@dataclass
class Recorder:
    """Collects decisions while a `record()` context is open; padded tokens are not counted.

    Attributes:
        samples: samples in the batch: leading axes are folded to it, so that windows belong to their image.
        keep_inputs: also keep the gates' inputs and decisions (for fitting and heat maps).
        macs: entry -> list of (samples,) MACs of the site as chosen, a tensor a forward.
        ran: the same as executed: all of it where a module skips nothing.
        expected: entry -> list of (samples,) MACs through `keep`, differentiable.
        most: entry -> MACs a sample if every learner ran; (samples,) where samples have unequal lengths.
        gates: entry -> MACs a sample of its share of the gate, likewise.
        tokens: entry -> tokens a sample, likewise; "" -> tokens before any were merged, where they are frames.
        choices: entry -> histogram (N + 1,) of choices.
        per_token: entry -> (samples, tokens) choices of the last forward, -1 where padded.
        seen: module -> (input, decision), when `keep_inputs`.
        losses: name -> terms, weighted already, that modules add to the loss of phase 3.
    """

    samples: int
    keep_inputs: bool = False
    macs: dict[str, list[Tensor]] = field(default_factory=dict)
    ran: dict[str, list[Tensor]] = field(default_factory=dict)
    expected: dict[str, list[Tensor]] = field(default_factory=dict)
    most: dict[str, float | Tensor] = field(default_factory=dict)
    gates: dict[str, float | Tensor] = field(default_factory=dict)
    tokens: dict[str, float | Tensor] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)
    seen: list[tuple[AdaptiveModule, Tensor, Decision]] = field(default_factory=list)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_loss(self, name: str, term: Tensor) -> None:
        """Called by adaptive modules that learn something beside the task."""
        self.losses.setdefault(name, []).append(term)

    def add(self, module: AdaptiveModule, x: Tensor, decision: Decision) -> None:
        """Called by the adaptive modules."""
        gate = module.gate
        if self.keep_inputs:
            self.seen.append((module, x, decision))
        macs = module.macs(decision).detach()
        valid = decision.valid
        tokens: float | Tensor = decision.choice[..., 0].numel() / self.samples
        if valid is not None:
            tokens = valid.reshape(self.samples, -1).sum(1).double()
        for g, name in enumerate(module.names):
            one = decision.group(g)
            self.tokens[name] = tokens
            self.gates[name] = gate.gate_macs[g] * tokens
            self.most[name] = float(gate.learner_macs[g].sum()) * tokens
            chosen = macs[..., g].reshape(self.samples, -1).sum(1)
            self.macs.setdefault(name, []).append(chosen)
            ran = chosen if module.skips else torch.zeros_like(chosen) + self.most[name]
            self.ran.setdefault(name, []).append(ran)
            real = one.choice if valid is None else one.choice[valid]
            histogram = torch.bincount(real.reshape(-1), minlength=gate.num_learners + 1)
            self.choices[name] = self.choices.get(name, 0) + histogram
            shown = one.choice if valid is None else one.choice.masked_fill(~valid, -1)
            self.per_token[name] = shown.reshape(self.samples, -1)
            if one.keep is not None:
                soft = (one.keep * gate.learner_macs[g]).sum(-1)
                self.expected.setdefault(name, []).append(soft.reshape(self.samples, -1).sum(1))

    def executed(self) -> Tensor:
        """(samples,) executed MACs of all adaptive sites in the last forward, their gates included."""
        return self._total(self.ran)

    def chosen(self) -> Tensor:
        """(samples,) the same as chosen: what would be executed if every module skipped."""
        return self._total(self.macs)

    def _total(self, parts: dict[str, list[Tensor]]) -> Tensor:
        if not parts:  # a plan that merges tokens and replaces nothing
            return torch.zeros(self.samples)
        return torch.stack([last[-1] for last in parts.values()]).sum(0) + sum(self.gates.values())

    def differentiable(self) -> Tensor:
        """(samples,) the same through `keep`: hard value, soft gradient."""
        return self._total(self.expected)


@dataclass
class SiteTally:
    """What sites did over the batches of a set, each recorded by itself.

    Attributes:
        load: entry -> shares of its learners that were chosen, weighted by their MACs, a tensor a batch.
        choices: entry -> histogram (N + 1,) of choices.
    """

    load: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Recorder) -> None:
        """One batch, as it was recorded."""
        for name, parts in seen.macs.items():
            self.load.setdefault(name, []).append((parts[-1] / seen.most[name]).double().cpu())
            self.choices[name] = self.choices.get(name, 0) + seen.choices[name].cpu()

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """`load`, (samples,) an entry, and `choices`, of all processes."""
        return {
            "load": {name: parallel.gather(torch.cat(parts)) for name, parts in self.load.items()},
            "choices": {name: parallel.total(counts) for name, counts in self.choices.items()},
        }


@contextmanager
def record(model: nn.Module, samples: int, keep_inputs: bool = False) -> Iterator[Recorder]:
    """Record what every module with a place for a recorder decides while the context is open.

    Raises:
        AcmizeError: there are no samples, so none to take a mean of.
    """
    if samples < 1:
        raise AcmizeError(f"batch: found {samples} samples, expected at least one; leave empty batches out")
    with recorded_by(model, Recorder(samples, keep_inputs)) as recorder:
        yield recorder


@contextmanager
def recorded_by(model: nn.Module, recorder: _R) -> Iterator[_R]:
    """Every module with a place for a recorder tells this one what it decides while the context is open."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "recorder")]
    for module in modules:
        module.recorder = recorder
    try:
        yield recorder
    finally:
        for module in modules:
            module.recorder = None
