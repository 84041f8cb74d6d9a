"""Samples that cannot be read are left out, counted and named, up to a limit; beyond it the data are at fault."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from acmize.errors import AcmizeError, UnreadableSample

log = logging.getLogger("acmize")
LIMIT = 10
T = TypeVar("T")


class Unreadable:
    """The samples of one run that could not be read.

    Args:
        limit: how many are left out at most.

    Attributes:
        found: sample -> why.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.found: dict[Hashable, str] = {}

    def note(self, key: Hashable, error: UnreadableSample) -> None:
        """Count a sample once, however often it is met.

        Raises:
            AcmizeError: it is one too many.
        """
        if key in self.found:
            return
        self.found[key] = str(error)
        if len(self.found) > self.limit:
            raise AcmizeError(
                f"{error} (found {len(self.found)} unreadable samples, expected {self.limit} at most; mend the data, "
                "or raise --max-corrupt)"
            ) from error
        log.warning("left out (%d of at most %d): %s", len(self.found), self.limit, error)

    def read(
        self, get: Callable[[int], T], indices: Iterable[int], size: int, key: Callable[[int], Hashable]
    ) -> list[T]:
        """The readable ones of some samples; where none is, the next one of the data that is, so that none is empty.

        Args:
            get: the sample of an index, or `UnreadableSample`.
            indices: of a batch.
            size: of the data.
            key: what the sample of an index is known by.

        Raises:
            AcmizeError: more than `limit` samples could not be read, or none of the data can be.
        """
        wanted, made = list(indices), []
        for index in wanted:
            try:
                made.append(get(index))
            except UnreadableSample as error:
                self.note(key(index), error)
        following = ((wanted[-1] + step) % size for step in range(1, size)) if wanted and not made else ()
        for index in following:
            try:
                return [get(index)]
            except UnreadableSample as error:
                self.note(key(index), error)
        if wanted and not made:
            raise AcmizeError(f"data: found no readable sample among {size}, expected some; mend the data")
        return made


__all__ = ["LIMIT", "Unreadable"]
