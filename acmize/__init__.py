"""acmize turns a pretrained model into one that spends compute only where the input needs it."""

import sys
import types

from acmize.__about__ import __version__
from acmize.errors import AcmizeError
from acmize.methods import acm as _acm
from acmize.plan import Plan, PlanEntry, Site

AcmConfig = _acm.AcmConfig

_LAZY = {
    "Recipe": "acmize.recipe",
    "convert": "acmize.api",
    "convert_": "acmize.convert",
    "from_pretrained": "acmize.hub",
    "make_plan": "acmize.hosts",
    "push_to_hub": "acmize.hub",
    "record": "acmize.gates",
    "save_pretrained": "acmize.hub",
}
__all__ = ["AcmConfig", "AcmizeError", "Plan", "PlanEntry", "Site", "__version__", *_LAZY]


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Keep the function `acmize.convert` where Python would put the submodule of that name."""
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Import what needs timm, accelerate or datasets only when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'acmize' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
