"""What a gate decided for every token: how many learners run, and the multiplier that carries the gradient.

Shapes: ... any leading axes (batch, tokens), G groups, N learners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from acmize import ops


@dataclass(frozen=True)
class Decision:
    """What a gate decided: `choice` (..., G) learners to run; `keep` (..., G, N), 1 where a learner runs.

    `keep` is None in plain inference; where it is set it carries the gradient. The decision of one group has `order`:
    learners -> its tokens in the order of their choice. `valid` (...) is False for padded tokens, which run none; None:
    all are real.
    """

    choice: Tensor
    keep: Tensor | None = None
    order: Callable[[int], ops.Order] | None = field(default=None, repr=False, compare=False)
    _orders: list[ops.Order] = field(default_factory=list, repr=False, compare=False)
    valid: Tensor | None = field(default=None, kw_only=True)

    def group(self, g: int) -> Decision:
        """The decision of one group: choice (...), keep (..., N)."""
        keep = None if self.keep is None else self.keep[..., g, :]
        return Decision(self.choice[..., g], keep, partial(self._order, g), valid=self.valid)

    def _order(self, g: int, num_learners: int) -> ops.Order:
        """All groups are sorted at once, when the first is asked for."""
        if not self._orders:
            self._orders.extend(ops.sort_tokens(self.choice.flatten(0, -2), num_learners))
        return self._orders[g]

    def without_padding(self, valid: Tensor) -> Decision:
        """The decision with no learner where `valid` (...) is False."""
        keep = None if self.keep is None else self.keep * valid[..., None, None]
        return Decision(self.choice * valid[..., None], keep, valid=valid)

    def keep_or_hard(self, num_learners: int, dtype: torch.dtype) -> Tensor:
        """`keep`, or the hard 0/1 mask of `choice`."""
        if self.keep is not None:
            return self.keep.to(dtype)
        return hard_keep(self.choice, num_learners).to(dtype)


def hard_keep(choice: Tensor, num_learners: int) -> Tensor:
    """(...) choices -> (..., N) bool, True for the learners that run."""
    return torch.arange(num_learners, device=choice.device) < choice.unsqueeze(-1)
