"""What each choice would cost the model's output, per token, without labels: the targets of the damage gates.

A choice k leaves learners k..N-1 out. With keep[n] the multiplier of learner n and L the cross-entropy of the model on
a class drawn from the dense model's own softmax (in speech: one for each frame, or each token of the dense model's own
transcript), to first order

    damage(k) = E[(sum_{n >= k} dL / d keep[n])^2]

which is the Gauss-Newton measure of METHODS, (sum_u g_u (z_u - mu_u))^2 summed over the units left out, since
dL/dkeep[n] = g . s_n(x) for every kind of site. One backward pass a drawn class; all k at once by a reversed
cumulative sum. Nothing here knows a method by name.

With several processes, whole batches are dealt out in turns, and each gate's rows go to the process that fits it.
Nothing depends on how many there are, not even by rounding: a choice that falls otherwise changes a damage by more.

Shapes: B samples, M tokens, D input width, G groups of a gate, N learners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.environment import release_memory
from acmize.errors import AcmizeError
from acmize.gates import Choose, Gate, choosing, gates_of
from acmize.inputs import Batch, counted, forward, logits_of
from acmize.recording import AdaptiveModule, record

Parts = tuple[Tensor, Tensor, Tensor]  # x, damage, dial
Sizes = tuple[Tensor, list[tuple[int, int]]]  # class probabilities; tokens of each gate, and how many are kept


@dataclass
class GateData:
    """What one gate is fitted on: `x` (M, D) its inputs, `damage` (M, G, N), `dial` (M, 1) where the dial stood.

    With several processes `owner` has all rows; the others have none, and `count` tells them how many there are.
    """

    x: Tensor
    damage: Tensor
    dial: Tensor
    owner: int = 0
    count: int | None = None

    def __len__(self) -> int:
        return len(self.x) if self.count is None else self.count

    @property
    def here(self) -> bool:
        """Whether this process has the rows."""
        return self.owner == parallel.rank()

    def of(self, places: Tensor) -> GateData:
        """Some of the rows; places (n,) are the same in every process."""
        here = (t[places] if self.here else t for t in (self.x, self.damage, self.dial))
        return GateData(*here, owner=self.owner, count=None if self.count is None else len(places))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Places of `count` rows, drawn alike by every process."""
        return torch.randint(len(self), (min(count, len(self)),), generator=generator)


class GateRows:
    """The rows of every gate, at the process that owns it, in the order of the batches that `in_turns` dealt out."""

    def __init__(self, model: nn.Module) -> None:
        self._gates = gates_of(model)
        self._owners = parallel.owners([sum(p.numel() for p in gate.parameters()) for gate in self._gates])
        self._number = {gate: i for i, gate in enumerate(self._gates)}
        self._here: dict[int, list[Parts]] = {}
        self._found: dict[int, int] = {}

    def add(self, found: Sequence[tuple[Gate, Parts]]) -> None:
        """What this process found in a turn; every process calls it in every turn."""
        sent: list[list[tuple[int, Parts]]] = [[] for _ in range(parallel.processes())]
        for gate, parts in found:
            number = self._number[gate]
            sent[self._owners[number]].append((number, parts))
            self._found[number] = self._found.get(number, 0) + len(parts[0])
        for came in parallel.exchanged(sent):
            for number, parts in came:
                self._here.setdefault(number, []).append(parts)

    def joined(self) -> dict[Gate, GateData]:
        """Gates in the order in which they were met, on every process; the rows are given away, being gigabytes."""
        counts: dict[int, int] = {}
        for found in parallel.gather_objects([self._found]):
            for number, count in found.items():
                counts[number] = counts.get(number, 0) + count
        return {self._gates[number]: self._data(number, count) for number, count in counts.items()}

    def _data(self, number: int, count: int) -> GateData:
        none = torch.empty(0)
        x, damage, dial = zip(*self._here.pop(number, [(none, none, none)]), strict=True)
        return GateData(torch.cat(x), torch.cat(damage), torch.cat(dial), self._owners[number], count)


def collect_damage(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    choose: Choose | None,
    generator: torch.Generator,
    draws: int = 3,
    keep_tokens: float = 0.5,
    bf16: bool = False,
    keep_bf16: bool = False,
) -> dict[Gate, GateData]:
    """Inputs and damages of every gate.

    Args:
        model: the converted model, run in eval mode by the masked backend.
        teacher: the dense model, whose softmax the classes are drawn from.
        batches: inputs, without labels.
        choose: `full_width` for a first round; None to collect with the gates on, where earlier layers err.
        generator: for the drawn classes and the tokens kept.
        draws: classes drawn a sample, a backward pass each.
        keep_tokens: share of tokens kept, to bound memory; at least one a sample.
        bf16: both models under autocast: a damage spans orders of magnitude, its rounding is far below that.
        keep_bf16: hold the inputs in half of the memory, and give back what each batch leaves free.

    Returns:
        gate -> its inputs and damages, on the CPU; damages in float32, inputs too or in bfloat16.
    """
    rows = GateRows(model)
    kept = torch.bfloat16 if keep_bf16 else torch.float32
    draw = partial(_drawn, draws=draws, generator=generator)
    probed = partial(_Probe.of, model, teacher, choose=choose, bf16=bf16)
    training = model.training
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(False)
    try:
        for batch in parallel.in_turns(batches):
            rows.add(_one_batch(batch, probed, draw, keep_tokens, kept))
            if keep_bf16:  # gigabytes of activations are gone, but rows that are kept lie between them
                release_memory()
    finally:
        model.train(training)
        for p in frozen:
            p.requires_grad_(True)
    return rows.joined()


def _one_batch(
    batch: Batch | None,
    probed: Callable[[Batch], _Probe],
    draw: Callable[[Sizes], tuple[Tensor, list[Tensor]]],
    keep_tokens: float,
    kept: torch.dtype,
) -> list[tuple[Gate, Parts]]:
    """What this process finds in a turn."""
    if batch is None:
        parallel.in_order(None, draw)
        return []
    probe = probed(batch)
    classes, picks = parallel.in_order(probe.sizes(keep_tokens), draw)
    return probe.rows(classes, picks, kept)


def _drawn(sizes: Sizes, draws: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Classes (rows, draws) of a batch, and places of the tokens that are kept, for each gate."""
    probabilities, tokens = sizes
    if not probabilities.isfinite().all():
        raise AcmizeError("found outputs of the dense model that are not finite; check weights and data")
    classes = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
    return classes, [torch.randperm(count, generator=generator)[:kept] for count, kept in tokens]


@dataclass
class _Probe:
    """A batch of `samples` run forward, with the multipliers of the learners as leaves.

    Attributes:
        probabilities: (rows, classes) the dense model's softmax, on the CPU.
        logits: (rows, classes) of the model.
        keeps: a gate's multipliers (..., G, N), for each module that decided.
        valid: which tokens are real, likewise; None where all are.
        inputs: module and its real tokens (M, D), likewise.
    """

    samples: int
    probabilities: Tensor
    logits: Tensor
    keeps: list[Tensor]
    valid: list[Tensor | None]
    inputs: list[tuple[AdaptiveModule, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, teacher: nn.Module, batch: Batch, choose: Choose | None, bf16: bool) -> _Probe:
        """Run both models."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                probabilities = counted(logits_of(forward(teacher, batch)), batch).float().softmax(-1)
            with (
                torch.enable_grad(),
                choosing(model, choose, probe=True),
                record(model, samples=len(batch), keep_inputs=True) as recorder,
            ):
                logits = counted(logits_of(forward(model, batch)), batch).float()
        seen = [(module, x, d.keep, d.valid) for module, x, d in recorder.seen]
        return cls(
            samples=len(batch),
            probabilities=probabilities.cpu(),
            logits=logits,
            keeps=[keep for _, _, keep, _ in seen if keep is not None],
            valid=[valid for _, _, _, valid in seen],
            inputs=[(module, _real(x.detach(), valid).flatten(0, -2)) for module, x, _, valid in seen],
        )

    def sizes(self, keep_tokens: float) -> Sizes:
        """What random numbers are drawn by; a share of the tokens is kept, one a sample at least."""
        counts = [len(x) for _, x in self.inputs]
        shares = [min(max(keep_tokens, self.samples / count), 1.0) for count in counts]
        return self.probabilities, [(n, max(1, round(share * n))) for n, share in zip(counts, shares, strict=True)]

    def rows(self, classes: Tensor, picks: list[Tensor], kept: torch.dtype) -> list[tuple[Gate, Parts]]:
        """Of the picked tokens, for each gate."""
        found: list[tuple[Gate, Parts]] = []
        damages = self._damages(classes.to(self.logits.device))
        for (module, x), damage, valid, pick in zip(self.inputs, damages, self.valid, picks, strict=True):
            gate, pick = module.gate, pick.to(x.device)
            damage = _real(damage, valid).flatten(0, -3)[pick].float().cpu()
            dial = torch.full((len(pick), 1), float(gate.dial))  # a copy: the next batch may be run at another one
            found.append((gate, (x[pick].to(kept).cpu(), damage, dial)))
        return found

    def _damages(self, classes: Tensor) -> list[Tensor]:
        """The mean over the drawn classes (rows, draws), for each module that decided."""
        damages: list[Any] = [0.0] * len(self.keeps)
        for r in range(classes.shape[1]):
            loss = F.cross_entropy(self.logits, classes[:, r], reduction="sum")
            for i, grad in enumerate(torch.autograd.grad(loss, self.keeps, retain_graph=r + 1 < classes.shape[1])):
                left_out = grad.flip(-1).cumsum(-1).flip(-1)
                damages[i] = damages[i] + left_out.square() / classes.shape[1]
        return damages


def _real(x: Tensor, valid: Tensor | None) -> Tensor:
    """Without padded tokens."""
    return x if valid is None else x[valid]
