"""Accuracy against executed MACs: of the gated model at a list of budgets, and of controls at equal MACs.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.cost import evaluating
from acmize.evaluate_speech import SpeechReference, evaluate_speech_at, reference_speech
from acmize.gates import Choose, choosing
from acmize.inputs import logits_of
from acmize.methods.token_merging import schedule_of
from acmize.phases.calibrate import Calibration, missed, set_budget
from acmize.plan import Plan
from acmize.recording import SiteTally, record
from acmize.speech import Spoken

Batch = tuple[Tensor, Tensor]
KL_FLOOR = 1e-3  # less of it is no difference


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The dense model's answers on the evaluation data, computed once: logits (B, C), labels (B,) with -1 unknown."""

    logits: Tensor
    labels: Tensor
    seconds: float

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy, or None without labels."""
        return top1(self.logits, self.labels)

    @property
    def described(self) -> dict[str, float | None]:
        """What stands for the dense model in the results."""
        return {"accuracy": self.accuracy}

    def __len__(self) -> int:
        return len(self.labels)


def top1(logits: Tensor, labels: Tensor) -> float | None:
    """Share of labelled samples whose label has the largest logit; None without labels."""
    known = labels >= 0
    if not known.any():
        return None
    return (logits.argmax(-1) == labels)[known].double().mean().item()


def reference(dense: nn.Module, batches: Iterable[Batch] | Spoken) -> Any:
    """Run the dense model over (inputs, labels) batches; a `SpeechReference` for utterances."""
    if isinstance(batches, Spoken):
        return reference_speech(dense, batches)
    logits, labels, start = [], [], time.perf_counter()
    with evaluating(dense):
        for inputs, target in batches:
            logits.append(logits_of(dense(inputs)).float().cpu())
            labels.append(target.cpu())
    answers, known = parallel.gather(torch.cat(logits)), parallel.gather(torch.cat(labels))
    return Reference(logits=answers, labels=known, seconds=time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered and what each sample cost, with its gates as they stood.

    Attributes:
        logits: (N, C).
        executed: (N,) MACs that ran, as shares of the dense model's.
        chosen: (N,) the same, had every module skipped what it did not choose.
        load: entry -> (N,) share of its learners that were chosen, weighted by their MACs.
        choices: entry -> histogram (learners + 1,) of choices.
        seconds: that it took.
    """

    logits: Tensor
    executed: Tensor
    chosen: Tensor
    load: dict[str, Tensor]
    choices: dict[str, Tensor]
    seconds: float


def answers(model: nn.Module, plan: Plan, batches: Iterable[Batch], choose: Choose | None = None) -> Answers:
    """Run a converted model over (inputs, labels) batches; `choose` in place of its gates, where given."""
    logits, executed, chosen, start = [], [], [], time.perf_counter()
    rest, sites = plan.macs_rest(schedule_of(model)), SiteTally()
    with evaluating(model), choosing(model, choose):
        for inputs, _ in batches:
            with record(model, len(inputs)) as seen:
                logits.append(logits_of(model(inputs)).float().cpu())
            executed.append((rest + seen.executed().double().cpu()) / plan.macs_dense)
            chosen.append((rest + seen.chosen().double().cpu()) / plan.macs_dense)
            sites.add(seen)
    return Answers(
        logits=parallel.gather(torch.cat(logits)),
        executed=parallel.gather(torch.cat(executed)),
        chosen=parallel.gather(torch.cat(chosen)),
        **sites.gathered(),
        seconds=time.perf_counter() - start,
    )


def evaluate_at(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch] | Spoken,
    dense: Reference | SpeechReference,
    choose: Choose | None = None,
) -> dict[str, Any]:
    """Metric and executed work of the model as its gates stand (or as `choose` forces them).

    Returns:
        accuracy (None without labels), agreement with the dense model's top-1, kl to it, macs_ratio (executed, mean of
        samples), macs_ratio_std (spread over samples), chosen_ratio (what would be executed if every module skipped
        what it does not choose), seconds, sites (entry -> mean share of its learners that were chosen).
    """
    if isinstance(batches, Spoken):
        assert isinstance(dense, SpeechReference)
        return evaluate_speech_at(model, plan, batches, dense, choose)
    assert isinstance(dense, Reference)
    found = answers(model, plan, batches, choose)
    out, ratio = found.logits, found.executed
    teacher = dense.logits.log_softmax(-1)
    return {
        "macs_ratio": ratio.mean().item(),
        "macs_ratio_std": ratio.std(correction=0).item(),
        "chosen_ratio": found.chosen.mean().item(),
        "macs": ratio.mean().item() * plan.macs_dense,
        "accuracy": top1(out, dense.labels),
        "agreement": (out.argmax(-1) == dense.logits.argmax(-1)).double().mean().item(),
        "kl": (teacher.exp() * (teacher - out.log_softmax(-1))).sum(-1).mean().item(),
        "seconds": found.seconds,
        "sites": {name: shares.mean().item() for name, shares in found.load.items()},
    }


def evaluate(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    batches: Iterable[Batch] | Spoken,
    dense: Reference | SpeechReference,
    budgets: Sequence[float],
) -> dict[str, Any]:
    """The results of a conversion: `{"dense": {...}, "results": [{"budget": ..., "macs_ratio": ..., ...}, ...]}`.

    A budget missed by more than the tolerance carries its warning under "missed".
    """
    results = []
    for budget in budgets:
        set_budget(model, plan, calibration, budget)
        row = {"budget": budget, **evaluate_at(model, plan, batches, dense)}
        row["missed"] = missed(budget, row["chosen_ratio"])
        results.append(row)
    first = {"macs": plan.macs_dense, "seconds": dense.seconds, **dense.described}
    return {"dense": first, "samples": len(dense), "results": results}


def mean_error(results: Sequence[dict[str, Any]], *, by_labels: bool = True) -> float:
    """One number for the rows of `evaluate`, less is better: the mean error rate, or the geometric mean KL to dense.

    The KL where there are no labels, or where nothing was trained on them (`by_labels` False): on a few hundred images
    it tells apart what counted errors cannot. Its mean is geometric, above `KL_FLOOR`: a budget out of reach, with a
    hundred times the KL of the others, would decide alone. The cross-entropy is not asked: it rises as soon as
    training makes the model too sure of itself, errors or not.
    """
    if by_labels and all(r["accuracy"] is not None for r in results):
        return fmean(1 - r["accuracy"] for r in results)
    return math.exp(fmean(math.log(max(r["kl"], 0.0) + KL_FLOOR) for r in results)) - KL_FLOOR
