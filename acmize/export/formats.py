"""From an adaptive model to a file of one of `FORMATS`."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from acmize.errors import AcmizeError
from acmize.export.trace import check_exportable, trace

SUFFIXES = {
    "onnx": ".onnx",
    "onnx-int8": ".onnx",
    "onnx-int8-dynamic": ".onnx",
    "torch-export": ".pt2",
    "aoti": ".pt2",
}
FORMATS = tuple(SUFFIXES)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(model: Any, path: str | Path, format: str = "onnx", *, compute: bool = False) -> Path:
    """Write an adaptive model as one file whose inputs are `x`, images or audio, and a budget.

    Args:
        model: adaptive, see `hub.Adaptive`, on the CPU; left as it was. Of a speech-to-text model, the encoder.
        path: of the file, which is replaced if it exists; its suffix is that of the format.
        format: "onnx"; "onnx-int8", its weights and inputs in 8 bits, block by block; "onnx-int8-dynamic", the same
            with coarser scales; "torch-export", a program for `torch.export.load` after `import acmize.export`;
            "aoti", that program compiled by a C++ compiler, for `torch._inductor.aoti_load_package` after the same
            import.
        compute: give the file a second output, `macs_ratio` (samples,): the share of the dense MACs each one took.

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
        _WRITERS[format](model, made, compute)
        made.replace(path)
    return path


def _onnx(model: Any, path: Path, compute: bool) -> None:
    _need_onnx()
    from acmize.export.onnx import write_onnx

    write_onnx(model, path, compute)


def _onnx_int8(model: Any, path: Path, compute: bool, *, dynamic: bool = False) -> None:
    _need_onnx()
    from acmize.export.onnx import write_int8

    write_int8(model, path, compute, dynamic=dynamic)


def _need_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AcmizeError(f'export: found no {", ".join(missing)}, expected it for ONNX; pip install "acmize[export]"')


def _torch_export(model: Any, path: Path, compute: bool) -> None:
    import torch

    with warnings.catch_warnings():  # the memory of `Contract.weight` is transposed; it is saved and read as it is
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(trace(model, compute=compute), path)


def _aoti(model: Any, path: Path, compute: bool) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise AcmizeError(
            "export: found no C++ compiler, expected one for aoti; install g++ or clang++, or name it in CXX"
        ) from None
    aoti_compile_and_package(trace(model, compute=compute), package_path=str(path))


_WRITERS: dict[str, Callable[[Any, Path, bool], None]] = {
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "onnx-int8-dynamic": partial(_onnx_int8, dynamic=True),
    "torch-export": _torch_export,
    "aoti": _aoti,
}
