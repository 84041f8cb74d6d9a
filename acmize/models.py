"""From what a user names to a model: a timm name, a folder of safetensors weights, or this package's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from acmize.errors import AcmizeError


def load_model(name: str, weights: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A pretrained timm model in eval mode.

    Args:
        name: timm architecture, with or without tag, or "acmize_vit_digits".
        weights: safetensors file with the weights; without it they come from the Hub (or its cache).
        kwargs: further arguments of `timm.create_model`, such as `img_size`.

    Raises:
        AcmizeError: an unknown name, weights that are missing, of another format or of another model, no network.
    """
    import timm

    _known(name)
    overlay: dict[str, Any] = {}
    if weights is not None:
        path = Path(weights)
        if path.suffix != ".safetensors":
            raise AcmizeError(
                f"--weights {path}: expected a .safetensors file; pickled weights are never read, convert them"
            )
        if not path.is_file():
            raise AcmizeError(f"--weights {path}: no such file")
        overlay["file"] = str(path)
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **kwargs).eval()
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if weights is not None:
            raise AcmizeError(f"--weights {weights}: does not fit {name} or is damaged ({first})") from None
        raise AcmizeError(
            f"model {name}: its weights could not be had from the Hub ({first}); give --weights FILE.safetensors"
        ) from None


def architecture(name: str) -> nn.Module:
    """The timm model of this name with random weights, which is all that a plan needs.

    Raises:
        AcmizeError: an unknown name.
    """
    import timm

    _known(name)
    return timm.create_model(name, pretrained=False).eval()


def _known(name: str) -> None:
    import timm

    import acmize.quickstart_model  # noqa: F401 - registers the model that ships with the package

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:4])
        hint = f"; did you mean {close}?" if close else "; `timm.list_models()` names them"
        raise AcmizeError(f"model: found {name!r}, expected a timm model{hint}")
