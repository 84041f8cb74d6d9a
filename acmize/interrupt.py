"""SIGTERM as a request: training saves where it stands, anything else stops at once; `--resume` goes on from there.

A scheduler that takes a machine back sends SIGTERM and some seconds later SIGKILL. Within `deferred` (the training
loop) the request only sets a flag, which the loop looks at between two steps, when its state is whole; elsewhere it
raises `Stopped` where the program stands, for every file is written under another name first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STATUS = 128 + signal.SIGTERM


class Stopped(BaseException):
    """SIGTERM came. No error: nothing but the command line should catch it."""


class _State:
    asked = False
    deferring = 0


_state = _State()


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `Stopped` while the context is open; a second one is as immediate as ever."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals there alone
        yield
        return

    def handle(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _state.asked = True
        if not _state.deferring:
            raise Stopped("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _state.asked = False


@contextmanager
def deferred() -> Iterator[None]:
    """SIGTERM only sets `asked` while the context is open; what did not obey it inside does so at the end."""
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1
    if _state.asked and not _state.deferring:
        raise Stopped("stopped by SIGTERM")


def asked() -> bool:
    """Whether SIGTERM came."""
    return _state.asked


__all__ = ["EXIT_STATUS", "Stopped", "asked", "deferred", "stopping_on_sigterm"]
