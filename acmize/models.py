"""From what a user names to a model: of timm or transformers by name or folder, or this package's own."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from acmize import hf_models
from acmize.checkpoint import read_json
from acmize.errors import AcmizeError
from acmize.untrusted import MAX_TENSORS, check_sizes, no_more_parameters, sketched
from acmize.weights import WEIGHTS, Weights, lean, weights_in


def load_model(name: str, weights: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A pretrained model of timm, or a speech model of transformers, in eval mode.

    Args:
        name: timm architecture, with or without tag, "acmize_vit_digits", or a folder with timm's `config.json` and
            `model.safetensors`, or shards; or, of transformers, a folder or a repository USER/NAME.
        weights: safetensors file with the weights, index of several, or the folder of either; without it they come
            from the Hub (or its cache).
        kwargs: further arguments of `timm.create_model`, such as `img_size`.

    Raises:
        AcmizeError: an unknown name, weights that are missing, of another format or of another model, no network.
    """
    if _of_transformers(name):
        if weights is not None or kwargs:
            raise AcmizeError(f"model {name}: is one of transformers; give its folder or repository alone")
        return hf_models.load(name)
    import timm

    overlay: dict[str, Any] = {}
    if Path(name).is_dir():
        folder, (name, built, overlay) = Path(name), _folder(Path(name))
        kwargs, weights = {**built, **kwargs}, weights or folder
    _known(name)
    if weights is not None:
        if "num_classes" in kwargs:  # timm would drop a head that is not of the published size, without a word
            overlay["num_classes"] = kwargs["num_classes"]
        path = _weights_file(Path(weights), name)
        try:
            return lean(partial(_loaded, name, path, overlay, kwargs)).eval()
        except Exception as error:  # kinds of timm, of safetensors, ours
            raise AcmizeError(
                f"--weights {path}: does not fit {name} or is damaged ({_line(error)}); give the weights of {name}"
            ) from None
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **kwargs).eval()
    except Exception as error:
        first = _line(error)
        raise AcmizeError(
            f"model {name}: its weights could not be had from the Hub ({first}); give --weights FILE.safetensors"
        ) from None


def _weights_file(path: Path, name: str) -> Path:
    """The safetensors file, or index of several, that a user or a folder means."""
    found = (weights_in(path) or path / WEIGHTS) if path.is_dir() else path
    if not found.name.endswith((".safetensors", ".safetensors.index.json")):
        raise AcmizeError(
            f"--weights {found}: expected a .safetensors file; pickled weights are never read, convert them"
        )
    if not found.is_file():
        raise AcmizeError(f"--weights {found}: no such file; give a .safetensors file with the weights of {name}")
    return found


def _loaded(name: str, path: Path, overlay: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """A timm model with the weights of a file, through timm's own way of fitting them to it."""
    import timm
    from timm.models import clean_state_dict

    tensors = clean_state_dict(Weights.open(path).tensors())
    if not tensors:
        raise AcmizeError("no tensors in it")  # timm would look for others
    model: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={**overlay, "state_dict": tensors}, **kwargs
    )
    del model.pretrained_cfg["state_dict"]
    return model


def architecture(name: str) -> nn.Module:
    """The timm model of this name or folder with random weights, which is all that a plan needs.

    Raises:
        AcmizeError: an unknown name.
    """
    if _of_transformers(name):
        return hf_models.architecture(name)
    import timm

    built: dict[str, Any] = {}
    overlay: dict[str, Any] = {}
    if Path(name).is_dir():
        name, built, overlay = _folder(Path(name))
    _known(name)
    try:
        with no_more_parameters(MAX_TENSORS):
            return timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay or None, **built).eval()
    except (Exception, MemoryError) as error:  # any kind: the arguments come from a file
        raise AcmizeError(
            f"model {name}: cannot be built as its config.json says ({_line(error)}); restore it"
        ) from None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _of_transformers(name: str) -> bool:
    """A folder that transformers wrote, or a repository USER/NAME."""
    return hf_models.is_folder(name) if Path(name).is_dir() else name.count("/") == 1 and ":" not in name


def _folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments and preprocessing from the `config.json` of a folder written by timm."""
    if not (folder / "config.json").is_file():
        raise AcmizeError(f"model {folder}: found no config.json, expected a folder as timm saves it, or a timm name")
    config = read_json(folder / "config.json")
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise AcmizeError(f"{folder}/config.json: found no architecture of timm; give a timm name and --weights FILE")
    if "acmize" in config:
        raise AcmizeError(f"model {folder}: is converted already; give the dense model, or use acmize.from_pretrained")
    args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if not isinstance(args, dict) or not isinstance(cfg, dict):
        raise AcmizeError(f"{folder}/config.json: model_args or pretrained_cfg is damaged; restore the file")
    args = {k: v for k, v in args.items() if k not in SOURCES}
    if "num_classes" in config:
        args.setdefault("num_classes", config["num_classes"])
    cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in KEPT}
    check_sizes([args, *cfg.values()], f"{folder}/config.json")
    if (weights := weights_in(folder)) is not None:
        _fitting(name, args, cfg, Weights.open(weights).shapes, folder)
    return name, args, cfg


def _fitting(
    name: str, args: dict[str, Any], cfg: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path
) -> None:
    """Refuse to build a model that is far larger than the weights beside its config.json."""
    import timm

    _known(name)
    try:
        sketch = sketched(lambda: timm.create_model(name, pretrained_cfg_overlay=cfg or None, **args), shapes)
    except Exception as error:  # any kind: the arguments come from a file
        raise AcmizeError(f"{folder}/config.json: cannot be built ({_line(error)}); restore the file") from None
    numbers = sum(tensor.numel() for tensor in (*sketch.parameters(), *sketch.buffers()))
    stored = sum(math.prod(shape) for shape in shapes.values())
    if numbers > 2 * stored + 50_000_000:
        found = f"a model of {numbers} numbers for weights of {stored}"
        raise AcmizeError(f"{folder}/config.json: found {found}; restore the file")


# What says where weights come from: never taken from a file, since it could name a pickle or another host.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable")
KEPT = (
    "input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "tag",
    "license", "first_conv", "classifier",
)  # fmt: skip


def _known(name: str) -> None:
    import timm

    import acmize.cifar_models
    import acmize.quickstart_model  # noqa: F401 - both register models of this package

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:4])
        hint = f"; did you mean {close}?" if close else "; `timm.list_models()` names them"
        raise AcmizeError(f"model: found {name!r}, expected a timm model{hint}")
