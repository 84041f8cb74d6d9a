"""Which function finds the sites of which class. Classes are matched exactly: a subclass may do otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from acmize.plan import Refusal, Site

Found = list[Site | Refusal]
Handler = Callable[[str, Any], Found]
LINEAR = ("mlp", "attention", "linear")
HANDLERS: dict[type, dict[str, Handler]] = {}  # class -> kind of site -> what finds it


def plain(module: Any) -> bool:
    """Whether there is nothing to run: no module, or the identity."""
    return module is None or type(module) is nn.Identity


def handles(*paths: str, kinds: tuple[str, ...] = LINEAR) -> Callable[[Handler], Handler]:
    """Register a handler for exact classes by their import path; paths that this version lacks are passed over.

    `kinds` are those of the sites it finds: only methods that convert one of them are shown the class.
    """

    def decorate(handler: Handler) -> Handler:
        for path in paths:
            module, _, name = path.rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), name, None)
            except ImportError:
                cls = None
            if cls is not None:
                HANDLERS.setdefault(cls, {}).update(dict.fromkeys(kinds, handler))
        return handler

    return decorate
