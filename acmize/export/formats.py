"""From an adaptive model to a file of one of `FORMATS`."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acmize.errors import AcmizeError
from acmize.export.trace import check_exportable, trace

SUFFIXES = {"onnx": ".onnx", "onnx-int8": ".onnx", "torch-export": ".pt2"}
FORMATS = tuple(SUFFIXES)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(model: Any, path: str | Path, format: str = "onnx") -> Path:
    """Write an adaptive vision model as one file whose inputs are images and a budget.

    Args:
        model: adaptive, see `hub.Adaptive`, on the CPU; left as it was.
        path: of the file, which is replaced if it exists; its suffix is that of the format.
        format: "onnx"; "onnx-int8", its weights and activations in 8 bits; "torch-export", a program for
            `torch.export.load` after `import acmize.export`.

    Returns:
        The path.

    Raises:
        AcmizeError: an unknown format, a wrong suffix, a model that cannot be exported, or packages that are missing.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise AcmizeError(f"format: found {format!r}, expected one of {', '.join(FORMATS)}; choose one of them")
    if path.suffix != SUFFIXES[format]:
        raise AcmizeError(f"output {path}: expected a file {SUFFIXES[format]} for {format}; name it so")
    if not path.absolute().parent.is_dir():
        raise AcmizeError(f"output {path}: {path.absolute().parent} is no folder; make it first")
    check_exportable(model)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
        made = Path(folder) / path.name
        _WRITERS[format](model, made)
        made.replace(path)
    return path


def _onnx(model: Any, path: Path) -> None:
    _need_onnx()
    from acmize.export.onnx import write_onnx

    write_onnx(model, path)


def _onnx_int8(model: Any, path: Path) -> None:
    _need_onnx()
    from acmize.export.onnx import write_int8

    write_int8(model, path)


def _need_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AcmizeError(f'export: found no {", ".join(missing)}, expected it for ONNX; pip install "acmize[export]"')


def _torch_export(model: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():  # the memory of `Contract.weight` is transposed; it is saved and read as it is
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(trace(model), path)


_WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "torch-export": _torch_export,
}
