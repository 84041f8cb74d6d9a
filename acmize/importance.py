"""Which units of a hidden activation matter, from second moments: linear algebra in float64.

Shapes: U units, O outputs of what reads them; moments (U + 1, U + 1) are of [z; 1], augmented by a constant one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_units(moments: Tensor, w2: Tensor) -> Tensor:
    """Hidden units, greedily by the output variance they explain: pivoted Cholesky on their covariance.

    Args:
        moments: (U + 1, U + 1) augmented second moments.
        w2: (O, U) weights that read the units.

    Returns:
        (U,) order. Wide layers take several units a step (at most 1/256 of them), which costs no accuracy that was seen
        and makes the work one of matrix products.
    """
    r, _ = covariance(moments)
    units, variance = len(r), r.diagonal().clone()
    step = max(1, units // 256)
    floor = variance.max().clamp_min(1e-30) * 1e-9
    g, free, order = w2 @ r, torch.ones(units, dtype=torch.bool, device=r.device), []
    rows = r.new_empty(units, units)  # of the Cholesky factor: what is left of r is r - rows^T rows, never formed
    while (done := len(order)) < units:
        gain = g.square().sum(0) / variance.clamp_min(floor)
        gain[variance <= floor] = 0.0  # what is left of them is rounding
        gain[~free] = -1.0
        best = gain.topk(min(step, units - done)).indices
        left = torch.addmm(r[best], rows[:done, best].T, rows[:done], alpha=-1)
        w, v = torch.linalg.eigh(left[:, best])  # rounding may have made it indefinite
        root = v / w.clamp_min(floor).sqrt()
        # In exact arithmetic no row exceeds this (Cauchy-Schwarz); in moments of rounded products they would grow.
        bound = variance.clamp_min(0).sqrt()
        new = rows[done : done + len(best)] = (root.T @ left).clamp(-bound, bound)
        g.addmm_(g[:, best] @ root, new, alpha=-1)
        variance -= new.square().sum(0)
        free[best] = False
        order += best.tolist()
    return torch.tensor(order)


def covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(U, U) covariance and (U,) mean from augmented moments."""
    mean = moments[:-1, -1] / moments[-1, -1]
    return moments[:-1, :-1] / moments[-1, -1] - mean[:, None] * mean, mean
