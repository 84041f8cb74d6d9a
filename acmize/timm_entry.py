"""Converted models under `timm.create_model("local-dir:FOLDER")` and `timm.create_model("hf-hub:USER/NAME")`.

The config.json of a saved folder names the architecture registered here; the folder says what to build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import nn

from acmize.errors import AcmizeError

IGNORED = ("pretrained_cfg_overlay", "cache_dir", "pretrained_model_args")  # timm hands them to every model


@register_model
def acmize_adaptive(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """A converted model, as `acmize.from_pretrained` gives it; its weights are always loaded.

    Raises:
        AcmizeError: no folder or repository behind the name, or options, which a converted model cannot take.
    """
    from acmize.hub import from_pretrained

    cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, "to_dict", dict)()
    options = sorted(name for name, value in kwargs.items() if name not in IGNORED and value is not None)
    if options:
        raise AcmizeError(f"{options[0]}: found an option, expected none; convert a dense model that was built with it")
    if cfg.get("hf_hub_id"):
        name, _, revision = str(cfg["hf_hub_id"]).partition("@")
        return from_pretrained(name, revision=revision or None)
    if not cfg.get("file"):
        raise AcmizeError("acmize_adaptive: found no source, expected local-dir:FOLDER or hf-hub:USER/NAME; give one")
    file = Path(cfg["file"])
    return from_pretrained(file.parent if file.is_file() else file)
