"""Steps of a training whose loss or gradient is no number.

Such a step is skipped: weights and moments stay as they are. After `IN_ROW` of them one after the other the learning
rate is halved, for good, and training goes back to its last checkpoint; after `ROLLBACKS` of these it gives up.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from acmize.errors import AcmizeError

log = logging.getLogger("acmize")
IN_ROW, ROLLBACKS, FACTOR = 3, 3, 0.5
CALMER = "lower lr, lower clip_norm or use mixed_precision='no'"


class Diverged(Exception):
    """Too many steps in a row were skipped: the loop should go back to its last checkpoint."""


@dataclass
class Faults:
    """What went wrong in one training so far, and what was done about it; kept in its checkpoints.

    Attributes:
        name: of the phase.
        skipped: steps in all.
        in_row: of them, the last ones without a good step between.
        rollbacks: times the rate was lowered.
    """

    name: str
    skipped: int = 0
    in_row: int = 0
    rollbacks: int = 0

    @property
    def rate(self) -> float:
        """What every learning rate is multiplied by."""
        return FACTOR**self.rollbacks

    def good(self) -> None:
        """A step was taken."""
        self.in_row = 0

    def bad(self, step: int, found: str) -> None:
        """A step was skipped.

        Raises:
            Diverged: it is one too many in a row.
            AcmizeError: and the rate was lowered often enough.
        """
        self.skipped += 1
        self.in_row += 1
        log.warning("%s: step %d: found %s; the step is skipped", self.name, step, found)
        if self.in_row < IN_ROW:
            return
        if self.rollbacks == ROLLBACKS:
            told = f"{self.skipped} steps were skipped and the rate was lowered {self.rollbacks} times"
            raise AcmizeError(f"{self.name}: step {step}: found {found}, expected a finite one; {told}; {CALMER}")
        raise Diverged(found)

    def back(self, step: int) -> None:
        """Training went back to a step; the rate is lowered."""
        self.rollbacks += 1
        self.in_row = 0
        told = "%s: %d steps in a row were skipped: back to step %d, with %g of the learning rate"
        log.warning(told, self.name, IN_ROW, step, self.rate)

    def finish(self, steps: int) -> None:
        """The last step is done.

        Raises:
            AcmizeError: none of the steps was taken.
        """
        if self.skipped >= steps:
            told = f"found {self.skipped} steps of {steps} whose loss or gradient is not finite, expected few"
            raise AcmizeError(f"{self.name}: {told}; {CALMER}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


__all__ = ["Diverged", "Faults"]
