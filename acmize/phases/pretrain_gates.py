"""Phase 2: fit every gate, on collected damages (default) or on the published threshold labels.

No gradient step goes through the model; the gates are independent of each other, so one loss sums theirs.

Shapes: M tokens, D input width, G groups, N learners, K = N + 1 choices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.cost import evaluating
from acmize.damage import GateData, GateRows, Parts
from acmize.errors import AcmizeError
from acmize.gates import ClassificationGate, DamageGate, Gate, choosing, full_width
from acmize.inputs import Batch, forward
from acmize.losses import classification, gamma_deviance, threshold_labels
from acmize.phases._capture import capture, tokens_of
from acmize.phases._loop import FitConfig, History, fit
from acmize.recording import AdaptiveModule

ROWS = 4096  # inputs of a gate that are looked at at once
# Gates with fewer rows than this: the share held back, and after how many steps they are looked at.
FEW, HELD, LOOK = 8192, 0.2, 10


def fit_damage_gates(
    data: dict[Gate, GateData],
    *,
    steps: int = 400,
    batch_tokens: int = 1024,
    lr: float = 3e-3,
    seed: int = 0,
    fresh: bool = True,
    name: str = "gates",
    checkpoint: Path | None = None,
    resume: bool = False,
) -> History:
    """Regress each gate's log damage on its input by the Gamma deviance.

    Inputs are standardised while fitting; the scale is folded into the first layer afterwards. A gate with few rows,
    as those that decide once a sample have, learns them by heart within some steps: it ends as it was when a part of
    them that is held back said that it was best, perhaps at its start, which knows the mean alone.

    Args:
        data: from `collect_damage`.
        steps: optimiser steps.
        batch_tokens: tokens a gate sees each step.
        lr: peak learning rate of AdamW, cosine to a tenth.
        seed: of the order of tokens and, when fresh, the weights.
        fresh: start from new weights; else a later round goes on from the present ones, where they know something.
        name: of the phase, for progress and checkpoints.
        checkpoint: folder for checkpoints.
        resume: go on from the checkpoint there.
    """
    generator = torch.Generator().manual_seed(seed)
    data, held = _held_back(data, generator)
    scales: dict[DamageGate, tuple[Tensor, Tensor]] = {}
    for gate, rows in data.items():
        if not isinstance(gate, DamageGate):
            raise AcmizeError("gate labels 'damage' need damage gates; use --gate-labels threshold with this preset")
        log_mean, mean, std, known = parallel.from_owner(
            _looked_at(gate, rows, fresh) if rows.here else None, rows.owner
        )
        if known:
            _unfold(gate, mean, std)
        else:
            _start(gate, log_mean, generator)
        scales[gate] = mean, std

    def deviance(gate: Any, rows: GateData, i: Any) -> Tensor:
        (mean, std), device = scales[gate], gate.fc1.weight.device
        x = (rows.x[i].float() - mean) / std  # of these rows only: all inputs of all gates are gigabytes
        prediction = gate.log_damage(x.to(device), rows.dial[i].to(device))
        return gamma_deviance(prediction, rows.damage[i].to(device))

    under_way = _UnderWay(data, held, deviance)
    fitted = _summed(data, batch_tokens, deviance)

    def loss(step_seed: Tensor, step: int) -> dict[str, Tensor]:
        if step % LOOK == 0:
            under_way.look()
        return fitted(step_seed, step)

    config = FitConfig(epochs=1, lr=lr, min_lr=lr / 10, clip_norm=None, seed=seed, checkpoint_every=10**9)
    try:
        history = fit(
            name=name, model=under_way, loss=loss, batches=_seeds(seed, steps), steps_per_epoch=steps, config=config,
            checkpoint=checkpoint, resume=resume,
        )  # fmt: skip
        under_way.look()
        under_way.put_back_()
        return history
    finally:
        for gate, (mean, std) in scales.items():
            _fold(gate, mean, std)


def _held_back(
    data: dict[Gate, GateData], generator: torch.Generator
) -> tuple[dict[Gate, GateData], dict[Gate, GateData]]:
    """The rows that each gate is fitted on, and those held back where there are few; the same in every process."""
    fitted, held = dict(data), {}
    for gate, rows in data.items():
        if len(rows) < FEW and (count := int(HELD * len(rows))):
            order = torch.randperm(len(rows), generator=generator)
            held[gate], fitted[gate] = rows.of(order[:count]), rows.of(order[count:])
    return fitted, held


class _UnderWay(nn.Module):
    """Gates while they are fitted and, of those with rows held back, the best so far: one state in a checkpoint.

    Args:
        data: the gates.
        held: rows held back.
        deviance: of a gate on some of its rows.
    """

    least: Tensor

    def __init__(
        self, data: dict[Gate, GateData], held: dict[Gate, GateData], deviance: Callable[[Any, GateData, Any], Tensor]
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(data)
        self.best = nn.ModuleList(copy.deepcopy(gate).requires_grad_(False) for gate in held)
        self.register_buffer("least", torch.full((len(held),), torch.inf))
        self._held, self._deviance = held, deviance

    @torch.no_grad()
    def look(self) -> None:
        """Keep each gate that predicts the rows held back better than it has done before."""
        for number, (gate, rows) in enumerate(self._held.items()):
            found = self._deviance(gate, rows, slice(None)).cpu() if rows.here else None
            found = parallel.from_owner(found, rows.owner)
            if found < self.least[number]:
                self.least[number] = found
                self.best[number].load_state_dict(gate.state_dict())

    def put_back_(self) -> None:
        """Every gate as it was when it was best."""
        for gate, best in zip(self._held, self.best, strict=True):
            gate.load_state_dict(best.state_dict())


def _seeds(seed: int, steps: int) -> Any:
    return lambda epoch: (torch.tensor(seed * 1_000_003 + epoch * steps + i) for i in range(steps))


def _summed(
    data: dict[Gate, GateData], batch_tokens: int, error: Callable[[Any, GateData, Any], Tensor]
) -> Callable[[Tensor, int], dict[str, Tensor]]:
    """A step's loss: the sum over gates of `error(gate, rows, places drawn)`, each computed where its rows are."""

    def loss(step_seed: Tensor, _step: int) -> dict[str, Tensor]:
        pick = torch.Generator().manual_seed(int(step_seed))
        total = torch.zeros(())
        if not any(rows.here for rows in data.values()):  # the loop waits for a gradient on every process
            total = 0 * next(next(iter(data)).parameters()).sum().cpu()
        for gate, rows in data.items():
            i = rows.draw(batch_tokens, pick)
            if rows.here:
                total = total + error(gate, rows, i).cpu()
        total = parallel.total(total)
        return {"loss": total, error.__name__: total / len(data)}

    return loss


def _looked_at(gate: DamageGate, rows: GateData, fresh: bool) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Of a gate's rows: log of the mean damage (G, N), mean and deviation (D,) of the inputs; whether it knows them."""
    x, log_mean = rows.x.float(), (rows.damage.mean(0) + 1e-9).log()
    return log_mean, x.mean(0), x.std(0) + 1e-6, not fresh and _knows(gate, rows, log_mean)


def _start(gate: DamageGate, log_mean: Tensor, generator: torch.Generator) -> None:
    """Fresh weights; the last layer starts at `log_mean` (G, N), the log of the mean damage of each choice."""
    with torch.no_grad():
        for layer, gain in ((gate.fc1, 1.0), (gate.fc2, 0.1)):
            bound = gain * layer.in_features**-0.5
            layer.weight.copy_(torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator))
            layer.bias.zero_()
        gate.level.zero_()
        gate.fc2.bias.copy_(log_mean.flatten())


@torch.no_grad()
def _knows(gate: DamageGate, rows: GateData, log_mean: Tensor) -> bool:
    """Whether a gate's present predictions are better than `log_mean` (G, N).

    Where they are not, there is nothing to go on from, and the deviance, which is exponential in their error, fills
    AdamW's second moments with gradients that it takes hundreds of steps to forget.
    """
    device, gained = gate.fc1.weight.device, torch.zeros(())
    for x, damage, dial in zip(*(t.split(ROWS) for t in (rows.x, rows.damage, rows.dial)), strict=True):
        present = gate.log_damage(x.float().to(device), dial.to(device)).cpu()
        gained += len(x) * (gamma_deviance(log_mean.expand_as(damage), damage) - gamma_deviance(present, damage))
    return bool(gained > 0)


@torch.no_grad()
def _fold(gate: DamageGate, mean: Tensor, std: Tensor) -> None:
    mean, std = mean.to(gate.fc1.weight), std.to(gate.fc1.weight)
    gate.fc1.weight.div_(std)
    gate.fc1.bias.sub_(gate.fc1.weight @ mean)


@torch.no_grad()
def _unfold(gate: DamageGate, mean: Tensor, std: Tensor) -> None:
    mean, std = mean.to(gate.fc1.weight), std.to(gate.fc1.weight)
    gate.fc1.bias.add_(gate.fc1.weight @ mean)
    gate.fc1.weight.mul_(std)


# --- published labels -----------------------------------------------------------------------------------------


def collect_errors(
    model: nn.Module,
    source: nn.Module,
    batches: Iterable[Batch],
    *,
    generator: torch.Generator,
    keep_tokens: float = 0.1,
) -> dict[Gate, GateData]:
    """Inputs (M, D) and local reconstruction errors d(k) = ||h(x, k) - dense(x)||_2 (M, G, K) of every gate.

    Args:
        model: the converted model.
        source: what inputs and targets are captured from: the dense model, or the converted one at full width.
        batches: inputs, without labels.
        generator: for the tokens kept.
        keep_tokens: share of tokens kept.
    """
    adaptive = {f: m for f, m in model.named_modules() if isinstance(m, AdaptiveModule)}
    deciding = {f: [f, *_linked_to(m, adaptive)] for f, m in adaptive.items() if m.names}
    draw = partial(_picked, share=keep_tokens, generator=generator)
    rows = GateRows(model)
    with evaluating(model, source), capture(source, list(adaptive)) as seen, choosing(source, full_width):
        for batch in parallel.in_turns(batches):
            if batch is not None:
                forward(source, batch)
            inputs = {} if batch is None else {f: tokens_of(adaptive[f], *seen[f])[0] for f in deciding}
            found: list[tuple[Gate, Parts]] = []
            for path, pick in parallel.in_order({f: len(x) for f, x in inputs.items()}, draw).items():
                x, pick = inputs[path], pick.to(inputs[path].device)
                errors = torch.cat([_errors(adaptive[f], *seen[f], pick) for f in deciding[path]], 1)
                x = adaptive[path].gate_input(x[pick]).cpu()
                found.append((adaptive[path].gate, (x, errors.cpu(), torch.zeros(len(pick), 1))))
            rows.add(found)
    return rows.joined()


def _picked(lengths: dict[str, int], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Places of a share of so many tokens, one at least."""
    return {f: torch.randperm(n, generator=generator)[: max(1, round(share * n))] for f, n in lengths.items()}


def _linked_to(module: AdaptiveModule, adaptive: dict[str, AdaptiveModule]) -> list[str]:
    """Modules that read this one's decision and are counted under its names."""
    link = getattr(module, "link", None)
    if link is None or len(module.names) == 1:
        return []
    return [path for path, m in adaptive.items() if m is not module and getattr(m, "link", None) is link]


def _errors(module: Any, x: Tensor, y: Tensor, pick: Tensor) -> Tensor:
    """d(k) (M, G, K) of the picked tokens."""
    x, y = tokens_of(module, x, y)
    pairs = zip(module.all_choices(x[pick]), module.split_output(y[pick]), strict=True)
    return torch.stack([(h - t[:, None]).norm(dim=-1) for h, t in pairs], 1)


def fit_classification_gates(
    data: dict[Gate, GateData],
    *,
    tau: float = 1.2,
    steps: int = 500,
    batch_tokens: int = 2048,
    lr: float = 1e-2,
    seed: int = 0,
    name: str = "gates",
    checkpoint: Path | None = None,
    resume: bool = False,
) -> History:
    """Train each gate on the published threshold labels by cross-entropy on its logits.

    Args:
        data: from `collect_errors`.
        tau: improvement factor under which no further learner runs.
        steps: optimiser steps.
        batch_tokens: tokens a gate sees each step.
        lr: of AdamW, 1e-2 as published.
        seed: of the order of tokens.
        name: of the phase.
        checkpoint: folder for checkpoints.
        resume: go on from the checkpoint there.
    """
    labels: dict[Gate, Tensor] = {}
    for gate, rows in data.items():
        if not isinstance(gate, ClassificationGate):
            raise AcmizeError(
                "gate labels 'threshold' need classification gates; use --preset paper or gate=classification"
            )
        if rows.here:
            found = torch.stack([threshold_labels(errors, tau) for errors in rows.damage.unbind(1)], 1)
            labels[gate] = found.clamp_min(gate.min_choice)

    def cross_entropy(gate: Any, rows: GateData, i: Tensor) -> Tensor:
        logits = gate.logits(rows.x[i].to(gate.fc1.weight.device))
        return classification(logits.flatten(0, 1), labels[gate][i].flatten().to(logits.device))

    config = FitConfig(epochs=1, lr=lr, clip_norm=None, seed=seed, checkpoint_every=10**9)
    return fit(
        name=name, model=nn.ModuleList(data), loss=_summed(data, batch_tokens, cross_entropy),
        batches=_seeds(seed, steps), steps_per_epoch=steps, config=config, checkpoint=checkpoint, resume=resume,
    )  # fmt: skip
