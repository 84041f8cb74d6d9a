"""What each choice would cost the model's output, per token, without labels: the targets of the damage gates.

A choice k leaves learners k..N-1 out. With keep[n] the multiplier of learner n and L the cross-entropy of the model on
a class drawn from the dense model's own softmax (in speech: one for each frame, or each token of the dense model's own
transcript), to first order

    damage(k) = E[(sum_{n >= k} dL / d keep[n])^2]

which is the Gauss-Newton measure of METHODS, (sum_u g_u (z_u - mu_u))^2 summed over the units left out, since
dL/dkeep[n] = g . s_n(x) for every kind of site. One backward pass a drawn class; all k at once by a reversed
cumulative sum. Nothing here knows a method by name.

Shapes: B samples, M tokens, D input width, G groups of a gate, N learners.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.environment import release_memory
from acmize.errors import AcmizeError
from acmize.gates import Choose, Gate, choosing
from acmize.inputs import Batch, counted, forward, logits_of
from acmize.recording import AdaptiveModule, record


@dataclass
class GateData:
    """What one gate is fitted on: `x` (M, D) its inputs, `damage` (M, G, N), `dial` (M, 1) where the dial stood.

    With several processes these are the rows that this one collected, and `place` says where each of all rows lies in
    them, -1 where with another process.
    """

    x: Tensor
    damage: Tensor
    dial: Tensor
    place: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x) if self.place is None else len(self.place)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """This process's rows among `count` drawn from those of all."""
        drawn = torch.randint(len(self), (min(count, len(self)),), generator=generator)
        if self.place is None:
            return drawn
        here = self.place[drawn]
        return here[here >= 0]

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor]], own: Sequence[Tensor]) -> GateData:
        """From batches of (x, damage, dial), and masks of which of all rows were this process's."""
        x, damage, dial = (torch.cat(each) for each in zip(*parts, strict=True))
        mask = torch.cat(list(own))
        place = None if parallel.processes() == 1 else (mask.cumsum(0) - 1).masked_fill(~mask, -1)
        return cls(x, damage, dial, place)


@dataclass
class _Rows:
    dtype: torch.dtype
    x: list[Tensor] = field(default_factory=list)
    damage: list[Tensor] = field(default_factory=list)
    dial: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    def joined(self) -> GateData:
        return GateData.joined(list(zip(self.x, self.damage, self.dial, strict=True)), self.own)


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
    rows: dict[Gate, _Rows] = defaultdict(partial(_Rows, torch.bfloat16 if keep_bf16 else torch.float32))
    training = model.training
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(False)
    try:
        for whole in batches:
            with (
                parallel.rows_of(whole).counted() as batch,
                torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16),
            ):
                with torch.no_grad():
                    probabilities = counted(logits_of(forward(teacher, batch)), batch).float().softmax(-1)
                if parallel.any_of(not probabilities.isfinite().all(), probabilities.device):
                    raise AcmizeError("found outputs of the dense model that are not finite; check weights and data")
                drawn = _drawn(probabilities, draws, generator)
                _one_batch(model, batch, len(whole), drawn, choose, generator, keep_tokens, rows)
            if keep_bf16:  # gigabytes of activations are gone, but rows that are kept lie between them
                release_memory()
    finally:
        model.train(training)
        for p in frozen:
            p.requires_grad_(True)
    return {gate: rows.pop(gate).joined() for gate in list(rows)}  # one after the other: they are gigabytes


def _drawn(probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(rows, draws) classes; drawn for the rows of all processes, so that they do not depend on whose they are."""
    ((before, _),) = parallel.offsets([len(probabilities)], probabilities.device)
    before = 0 if parallel.idle() else before  # the sample that is run for company is the first
    drawn = torch.multinomial(parallel.gather(probabilities).cpu(), draws, replacement=True, generator=generator)
    return drawn[before:][: len(probabilities)].to(probabilities.device)


def _one_batch(
    model: nn.Module,
    batch: Batch,
    samples: int,
    drawn: Tensor,
    choose: Choose | None,
    generator: torch.Generator,
    keep_tokens: float,
    rows: dict[Gate, _Rows],
) -> None:
    with torch.enable_grad(), choosing(model, choose, probe=True), record(model, len(batch), keep_inputs=True) as seen:
        logits = counted(logits_of(forward(model, batch)), batch).float()
        keeps = [decision.keep for _, _, decision in seen.seen if decision.keep is not None]
        damages: list[Tensor | float] = [0.0] * len(keeps)
        for r in range(drawn.shape[1]):
            loss = F.cross_entropy(logits, drawn[:, r], reduction="sum")
            grads = torch.autograd.grad(loss, keeps, retain_graph=r + 1 < drawn.shape[1])
            for i, grad in enumerate(grads):
                left_out = grad.flip(-1).cumsum(-1).flip(-1)
                damages[i] = damages[i] + left_out.square() / drawn.shape[1]
    found: list[tuple[AdaptiveModule, Tensor, Tensor]] = []
    for (module, x, decision), damage in zip(seen.seen, damages, strict=True):
        real = slice(None) if decision.valid is None else decision.valid
        x, damage = x.detach()[real].flatten(0, -2), damage[real].flatten(0, -3)  # pyright: ignore[reportIndexIssue]
        found.append((module, x, damage))
    places = parallel.offsets([len(x) for _, x, _ in found], batch.device)
    for (module, x, damage), (before, everything) in zip(found, places, strict=True):
        count = max(1, round(min(max(keep_tokens, samples / everything), 1.0) * everything))
        pick, own = parallel.places(torch.randperm(everything, generator=generator)[:count], before, len(x))
        into, pick = rows[module.gate], pick.to(x.device)
        into.x.append(x[pick].to(into.dtype).cpu())
        into.damage.append(damage[pick].float().cpu())
        into.dial.append(module.gate.dial.float().cpu().expand(len(pick), 1))
        into.own.append(own)
