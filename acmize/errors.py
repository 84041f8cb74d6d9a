"""The one exception that stands for something the user can put right."""

from __future__ import annotations


class AcmizeError(ValueError):
    """Bad input or a state that the user can mend: says what was found, what was expected, and the remedy.

    The command line prints its message on one line and exits with status 2.
    """
