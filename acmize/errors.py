"""The one exception that stands for something the user can put right."""

from __future__ import annotations

HALF = 900  # characters


class AcmizeError(ValueError):
    """Bad input or a state that the user can mend: says what was found, what was expected, and the remedy.

    The command line prints its message on one line and exits with status 2. What was found may be of any length: of a
    long message the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= 2 * HALF else f"{text[:HALF]} ... {text[-HALF:]}"


class UnreadableSample(AcmizeError):
    """One sample of the data cannot be read; some of them may be left out (`unreadable.Unreadable`)."""
