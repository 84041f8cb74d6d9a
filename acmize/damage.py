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

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize.errors import AcmizeError
from acmize.gates import AdaptiveModule, Choose, Gate, choosing, record
from acmize.inputs import Batch, counted, forward, logits_of


@dataclass
class GateData:
    """What one gate is fitted on: `x` (M, D) its inputs, `damage` (M, G, N), `dial` (M, 1) where the dial stood."""

    x: Tensor
    damage: Tensor
    dial: Tensor


@dataclass
class _Rows:
    x: list[Tensor] = field(default_factory=list)
    damage: list[Tensor] = field(default_factory=list)
    dial: list[Tensor] = field(default_factory=list)

    def joined(self) -> GateData:
        return GateData(torch.cat(self.x), torch.cat(self.damage), torch.cat(self.dial))


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

    Returns:
        gate -> its inputs and damages, on the CPU in float32.
    """
    rows: dict[Gate, _Rows] = {}
    training = model.training
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(False)
    try:
        for batch in batches:
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    probabilities = counted(logits_of(forward(teacher, batch)), batch).float().softmax(-1)
                if not probabilities.isfinite().all():
                    raise AcmizeError("found outputs of the dense model that are not finite; check weights and data")
                drawn = torch.multinomial(probabilities.cpu(), draws, replacement=True, generator=generator)
                _one_batch(model, batch, drawn.to(probabilities.device), choose, generator, keep_tokens, rows)
    finally:
        model.train(training)
        for p in frozen:
            p.requires_grad_(True)
    return {gate: rows.pop(gate).joined() for gate in list(rows)}  # one after the other: they are gigabytes


def _one_batch(
    model: nn.Module,
    batch: Batch,
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
    for (module, x, decision), damage in zip(seen.seen, damages, strict=True):
        if decision.valid is not None:
            x, damage = x[decision.valid], damage[decision.valid]  # pyright: ignore[reportIndexIssue]
        share = max(keep_tokens, len(batch) / x[..., 0].numel())
        _keep_rows(module, x, damage, generator, share, rows)  # pyright: ignore[reportArgumentType]


def _keep_rows(
    module: AdaptiveModule,
    x: Tensor,
    damage: Tensor,
    generator: torch.Generator,
    share: float,
    rows: dict[Gate, _Rows],
) -> None:
    x, damage = x.detach().flatten(0, -2), damage.flatten(0, -3)
    count = max(1, round(min(share, 1.0) * len(x)))
    pick = torch.randperm(len(x), generator=generator)[:count].to(x.device)
    into = rows.setdefault(module.gate, _Rows())
    into.x.append(x[pick].float().cpu())
    into.damage.append(damage[pick].float().cpu())
    into.dial.append(module.gate.dial.float().cpu().expand(count, 1))
