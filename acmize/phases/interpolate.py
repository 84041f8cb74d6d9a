"""After phase 3: how far from the weights it started with, chosen on held-out images.

    theta(share) = (1 - share) * theta_before + share * theta_after

Finetuning on little data moves the model away from the dense one, most visibly at the large budgets, which had nothing
to gain. On the line between the two ends there is often a model better than both (WiSE-FT, arXiv 2109.01903, eq. 1,
where the ends are a zero-shot and a finetuned model). Both ends are tried, so training never makes it worse on these
images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from acmize.cost import evaluating
from acmize.damage import logits_of
from acmize.losses import teacher_loss
from acmize.phases.calibrate import Calibration, set_budget
from acmize.plan import Plan

log = logging.getLogger("acmize")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def interpolate_(
    model: nn.Module, before: dict[str, Tensor], score: Callable[[], float], shares: Sequence[float] = SHARES
) -> dict[float, float]:
    """Leave the model at the share with the least score.

    Args:
        model: after training.
        before: name -> parameter as it was before training.
        score: of the model as it stands, less is better.
        shares: to try, 1 being the model as trained; the first of equals wins.

    Returns:
        share -> score, the chosen one first.
    """
    after = {name: p.detach().clone() for name, p in model.named_parameters()}

    def go_to(share: float) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.lerp(before[name], after[name], share))

    found = {}
    for share in shares:
        go_to(share)
        found[share] = score()
        log.info("interpolate: share %g of the training, held-out score %.4f", share, found[share])
    best = min(found, key=lambda share: found[share])
    go_to(best)
    return {best: found.pop(best), **found}


def held_out_score(
    model: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    calibration: Calibration,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> float:
    """Mean over the calibrated budgets of the error rate where there are labels, else of KL(teacher || model).

    The cross-entropy is not asked: it rises as soon as training makes the model too sure of itself, errors or not.

    Args:
        model: with its gates calibrated as it stands.
        teacher: the dense model.
        plan: the model's.
        calibration: the budgets to look at.
        batches: held-out inputs and labels, -1 unknown.
    """
    errors, known, divergence, seen = 0, 0, 0.0, 0
    with evaluating(model), evaluating(teacher):
        for inputs, labels in batches:
            wanted = logits_of(teacher(inputs))
            for budget in calibration.budgets:
                set_budget(model, plan, calibration, budget)
                logits = logits_of(model(inputs))
                errors += int((logits.argmax(-1) != labels)[labels >= 0].sum())
                known += int((labels >= 0).sum())
                divergence += teacher_loss(logits, wanted).item() * len(inputs)
                seen += len(inputs)
    return errors / known if known else divergence / seen


__all__ = ["SHARES", "held_out_score", "interpolate_"]
