"""After phase 3: how far from the weights it started with, chosen on held-out images.

    theta(share) = (1 - share) * theta_before + share * theta_after

Finetuning on little data moves the model away from the dense one, most visibly at the large budgets, which had nothing
to gain. On the line between the two ends there is often a model better than both (WiSE-FT, arXiv 2109.01903, eq. 1,
where the ends are a zero-shot and a finetuned model). Both ends are tried, so training never makes it worse on these
images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


__all__ = ["SHARES", "interpolate_"]
