"""Files written whole or not at all: safetensors and JSON, under a temporary name that is renamed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acmize.errors import AcmizeError


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (a full disk, say) into an error with a remedy."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise AcmizeError(f"{path}: cannot be written ({why}); free space or choose another folder") from error
    except SafetensorError as error:
        raise AcmizeError(f"{path}: cannot be written ({error}); free space or choose another folder") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved over it when the block succeeds and removed when it fails."""
    path = Path(path)
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Tied and non-contiguous tensors are stored as copies."""
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with _replacing(Path(path)) as temporary:
        save_file(own, temporary, metadata=metadata)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        AcmizeError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AcmizeError(f"{path}: missing or damaged ({error}); restore the file or make it again") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, atomically."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        AcmizeError: missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AcmizeError(f"{path}: missing or damaged ({error}); restore the file or make it again") from None


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, moved into its place when the block succeeds and removed when it fails.

    A folder that is already there is kept until the new one is complete.
    """
    path = Path(path).absolute()
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            old = temporary.with_suffix(".old")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# --- training state -------------------------------------------------------------------------------------------


def save_training_state(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    ema: nn.Module | None = None,
) -> None:
    """Everything a resumed run needs: weights, optimiser, generators, and `progress` (JSON)."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, slots in state["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = value
    with atomic_dir(folder) as new:
        save_tensors(new / "model.safetensors", model.state_dict())
        save_tensors(new / "optimizer.safetensors", tensors)
        save_tensors(new / "random.safetensors", _generators())
        if ema is not None:
            save_tensors(new / "ema.safetensors", ema.state_dict())
        version, words, position = random.getstate()
        python = [version, list(words), position]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
        write_json(new / "state.json", {"progress": progress, "scalars": scalars, "groups": groups, "random": python})


def load_training_state(
    folder: str | Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
) -> dict[str, Any]:
    """Put back what `save_training_state` wrote and return its progress.

    Raises:
        AcmizeError: damaged, or of another model or optimiser.
    """
    folder = Path(folder)
    stored = read_json(folder / "state.json")
    state = optimizer.state_dict()
    slots: dict[int, dict[str, Any]] = {}
    try:
        values = {**load_tensors(folder / "optimizer.safetensors"), **stored["scalars"]}
        for name, value in values.items():
            index, key = name.split(".", 1)
            slots.setdefault(int(index), {})[key] = value
        model.load_state_dict(load_tensors(folder / "model.safetensors"))
        if ema is not None:
            ema.load_state_dict(load_tensors(folder / "ema.safetensors"))
        groups = [{**g, **kept} for g, kept in zip(state["param_groups"], stored["groups"], strict=True)]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
        _set_generators(load_tensors(folder / "random.safetensors"), stored["random"])
        return stored["progress"]
    except AcmizeError:
        raise
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise AcmizeError(
            f"{folder}: checkpoint damaged or of another run ({first}); remove it and start anew"
        ) from None


def _generators() -> dict[str, Tensor]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937"
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    states["numpy_rest"] = torch.tensor([float(position), float(has_gauss), float(cached)], dtype=torch.float64)
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: dict[str, Tensor], python: list[Any]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, words, place = python
    random.setstate((version, tuple(words), place))
    cuda = [states[k] for k in sorted(states) if k.startswith("cuda")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
