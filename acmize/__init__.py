"""acmize turns a pretrained model into one that spends compute only where the input needs it."""

from typing import TYPE_CHECKING

import acmize.cifar_models
import acmize.timm_entry  # noqa: F401 - both register models with timm
from acmize.__about__ import __version__
from acmize.after import after
from acmize.errors import AcmizeError
from acmize.methods.acm import AcmConfig
from acmize.plan import Plan, PlanEntry, Site

if TYPE_CHECKING:
    from acmize.api import convert
    from acmize.fusion import fuse_
    from acmize.hosts import make_plan
    from acmize.hub import from_pretrained, push_to_hub, save_pretrained
    from acmize.insert import convert_
    from acmize.recipe import Recipe
    from acmize.recording import record

_LAZY = {
    "Recipe": "acmize.recipe",
    "convert": "acmize.api",
    "convert_": "acmize.insert",
    "from_pretrained": "acmize.hub",
    "fuse_": "acmize.fusion",
    "make_plan": "acmize.hosts",
    "push_to_hub": "acmize.hub",
    "record": "acmize.recording",
    "save_pretrained": "acmize.hub",
}
__all__ = [
    "AcmConfig",
    "AcmizeError",
    "Plan",
    "PlanEntry",
    "Recipe",
    "Site",
    "__version__",
    "convert",
    "convert_",
    "from_pretrained",
    "fuse_",
    "make_plan",
    "push_to_hub",
    "record",
    "save_pretrained",
]

after("transformers.models.auto.modeling_auto", then="acmize.hf_entry")


def __getattr__(name: str) -> object:
    """Import what needs timm, accelerate or datasets only when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'acmize' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
