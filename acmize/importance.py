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
    units = len(r)
    step = max(1, units // 256)
    g, free, order = w2 @ r, torch.ones(units, dtype=torch.bool, device=r.device), []
    floor = r.diagonal().max().clamp_min(1e-30) * 1e-9
    while len(order) < units:
        gain = g.square().sum(0) / r.diagonal().clamp_min(floor)
        gain[~free] = -1.0
        best = gain.topk(min(step, units - len(order))).indices
        order += best.tolist()
        free[best] = False
        block = r[best][:, best] + floor * torch.eye(len(best), dtype=r.dtype, device=r.device)
        scaled = torch.linalg.solve(block, r[best])
        g = g - g[:, best] @ scaled
        r = r - r[:, best] @ scaled
    return torch.tensor(order)


def covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(U, U) covariance and (U,) mean from augmented moments."""
    mean = moments[:-1, -1] / moments[-1, -1]
    return moments[:-1, :-1] / moments[-1, -1] - mean[:, None] * mean, mean
