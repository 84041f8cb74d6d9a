"""Files that are either whole or absent: tensors as safetensors, everything else as JSON, nothing pickled.

Every write goes to a temporary name in the same folder, is flushed to the disk, and is renamed into place.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acmize.errors import AcmizeError

log = logging.getLogger("acmize")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MAX_JSON = 64 << 20  # bytes; the plan of a model of a billion parameters takes one hundredth of them
AGAIN = "remove the folder to start again, or name another one"


@contextmanager
def _disk(path: Path, verb: str) -> Iterator[None]:
    """Turns what the disk refuses into one sentence for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # safetensors hides the errno in its text
        number = int(found[1]) if found else getattr(error, "errno", None)
        why = os.strerror(number) if number else str(error)
        remedy = "free some space or choose another folder" if number in FULL else "check the path and its rights"
        path = Path(getattr(error, "filename", None) or path)
        message = f"{path}: cannot {verb}: found {why!r}, expected a place that allows it; {remedy}"
        raise AcmizeError(message) from error


def _flush(path: Path) -> None:
    """Forces a file, or on POSIX the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` that becomes `path` when the block succeeds."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk(path, "write"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.touch()
            mode = new.stat().st_mode
            yield new
            new.chmod(mode)  # safetensors replaces the file by one that only its owner can read
            _flush(new)
            os.replace(new, path)
            _flush(path.parent)
        finally:
            new.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file, atomically.

    Args:
        path: The file; its folder is made if it is missing.
        tensors: Dense tensors of any device and layout. Tensors that share memory (tied weights, views) are
            written once for each name, so that every reader finds every name.
        metadata: Text kept in the file's header.

    Raises:
        AcmizeError: The disk is full or refuses, or a value is not a tensor that safetensors can hold.
    """
    path, ready, seen = Path(path), {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise AcmizeError(f"{path}: {name}: found {type(tensor).__name__}, expected a dense tensor; leave it out")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with _atomic_file(path) as new:
        save_file(ready, new, metadata=dict(metadata) if metadata else None)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file, on the CPU.

    Raises:
        AcmizeError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:  # the last: an unknown dtype
        raise _unreadable(path, error, "a whole safetensors file") from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, atomically; NaN and infinity are refused, since other readers would refuse them.

    Raises:
        AcmizeError: The disk is full or refuses, or the value is not JSON.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AcmizeError(f"{path}: {error}; expected finite numbers, text, lists and dicts") from error
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, atomically.

    Raises:
        AcmizeError: The disk is full or refuses.
    """
    with _atomic_file(Path(path)) as new:
        new.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file as `write_json` writes it: UTF-8, finite numbers, no key twice.

    Raises:
        AcmizeError: The file is missing, damaged, no file, or larger than `MAX_JSON`.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder or a device")
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_JSON}")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a character could be neither printed nor saved
        return value
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise _unreadable(path, error, "a whole JSON file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values for one key, readers may see one each."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice[:80]!r} twice")
    return made


def _finite(text: str) -> float:
    """A number that is one: neither NaN nor infinite, as 1e999 would be."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]}")
    return value


def _unreadable(path: str | Path, error: Exception, expected: str) -> AcmizeError:
    missing = isinstance(error, FileNotFoundError)
    found, remedy = ("nothing", "check the path") if missing else (repr(str(error))[:300], "copy or save it again")
    return AcmizeError(f"{path}: found {found}, expected {expected}; {remedy}")


def _aside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def remove_dir(path: Path) -> None:
    """Remove a folder: all of it is gone from its name at once, whenever the process is killed."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)  # what an earlier removal was killed over
    path.rename(gone)
    shutil.rmtree(gone)


def recover_dir(path: str | Path) -> bool:
    """Puts the old folder back if a kill fell between the two renames of `atomic_dir`; True if one exists."""
    path = Path(os.path.realpath(path))
    old = _aside(path, "old")
    if old.is_dir() and not path.exists():
        with _disk(path, "recover"):
            old.rename(path)
    return path.is_dir()


@contextmanager
def atomic_dir(path: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that replaces `path`, as a whole, when the block succeeds.

    When the block fails the new folder is removed and an old one stays as it was. One writer at a time. With `keep`,
    the folder that was replaced stays beside the new one, for `older`.

    Raises:
        AcmizeError: The disk is full or refuses, or `path` is a file.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    new, old = _aside(path, "new"), _aside(path, "old")
    if path.exists() and not path.is_dir():
        raise AcmizeError(f"{path}: found a file, expected a folder or nothing; choose another name")
    recover_dir(path)
    with _disk(path, "write"):
        try:
            if new.exists():
                shutil.rmtree(new)
            new.mkdir(parents=True)
            yield new
            for part in new.rglob("*"):
                _flush(part)
            _flush(new)
            if path.exists():
                if old.exists():
                    shutil.rmtree(old)
                path.rename(old)
            new.rename(path)
            _flush(path.parent)
        except BaseException:
            recover_dir(path)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if path.exists() and not keep:
                shutil.rmtree(old, ignore_errors=True)


def older(path: str | Path) -> Path | None:
    """The folder that the last `atomic_dir(path, keep=True)` replaced, if there is one."""
    old = _aside(Path(os.path.realpath(path)), "old")
    return old if old.is_dir() else None


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the global generators of python, numpy and torch, as tensors and a JSON value."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]}


def set_rng_state(state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Restores what `rng_state` returned; states of CUDA devices that this machine lacks are left out."""
    tensors, rest = state
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors named `index.name`, and JSON for its groups and scalars."""
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        tensors |= {f"group{number}.{k}": v for k, v in group.items() if isinstance(v, Tensor)}
        groups.append({k: v for k, v in group.items() if not isinstance(v, Tensor)})
    return tensors, {"groups": groups, "scalars": scalars}


def _unflatten(tensors: dict[str, Tensor], structure: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_flatten`; `now`, the optimizer's present state dict, says what JSON forgot: tuples."""
    groups = [dict(group) for group in structure["groups"]]
    for group, present in zip(groups, now["param_groups"], strict=True):
        other = [k for k in present if k in group and not isinstance(present[k], Tensor | tuple | type(group[k]))]
        if other:
            raise TypeError(f"{other[0]} {str(group[other[0]])[:40]!r}")
        group |= {k: tuple(v) for k, v in group.items() if isinstance(present.get(k), tuple)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *structure["scalars"].items()]:
        index, name = key.split(".", 1)
        if index.startswith("group"):
            groups[int(index[5:])][name] = value
        else:
            state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def save_training_state(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    epoch: int,
    extra: dict[str, Any],
    ema: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes all that an exact resume needs into `folder`, which is replaced as a whole; the one before is kept.

    Args:
        folder: Holds `model`, `optimizer`, `rng` and perhaps `ema` as safetensors, and `state.json`.
        model: Its whole state dict is written; every entry has to be a tensor.
        optimizer: Any torch optimizer; schedulers belong into `extra`, or follow from the step.
        step: Optimizer steps done.
        epoch: Epochs done, or begun.
        extra: JSON values of the caller.
        ema: Averaged tensors by name.

    Raises:
        AcmizeError: The disk is full or refuses.
    """
    tensors, structure = _flatten(optimizer.state_dict())
    rng_tensors, rng = rng_state()
    with atomic_dir(folder, keep=True) as new:
        save_tensors(new / "model.safetensors", model.state_dict())
        save_tensors(new / "optimizer.safetensors", tensors)
        save_tensors(new / "rng.safetensors", rng_tensors)
        if ema is not None:
            save_tensors(new / "ema.safetensors", ema)
        state = {"step": step, "epoch": epoch, "extra": extra, "optimizer": structure, "rng": rng}
        write_json(new / "state.json", state)


def load_training_state(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Restores what `save_training_state` wrote, random generators included; changes all or nothing.

    Where the last state is damaged, the one before it is restored, with a warning.

    Returns:
        `step`, `epoch` and `extra` as they were given.

    Raises:
        AcmizeError: A file is missing, damaged, or belongs to another model or optimizer.
    """
    recover_dir(folder)
    try:
        return _load_training_state(Path(folder), model, optimizer, ema)
    except AcmizeError as error:
        if (before := older(folder)) is None:
            raise
        try:
            restored = _load_training_state(before, model, optimizer, ema)
        except AcmizeError:
            raise error from None
        log.warning("%s; going on from the checkpoint before it, step %d", error, restored["step"])
        return restored


def _load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    state = read_json(folder / "state.json")
    weights = load_tensors(folder / "model.safetensors")
    moments = load_tensors(folder / "optimizer.safetensors")
    averages = load_tensors(folder / "ema.safetensors") if ema is not None else {}
    rng_tensors = load_tensors(folder / "rng.safetensors")
    _compare(folder / "model.safetensors", weights, model.state_dict())
    _compare(folder / "ema.safetensors", averages, ema or {})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = rng_state()
    try:
        restored = _unflatten(moments, state["optimizer"], optimizer.state_dict())
        for index, values in restored["state"].items():
            for value in values.values():
                if isinstance(value, Tensor) and value.ndim and value.shape != params[index].shape:
                    raise ValueError(f"parameter {index} of shape {list(value.shape)}")
        rest = {key: state[key] for key in ("step", "epoch", "extra")}
        if not all(type(rest[key]) is int and rest[key] >= 0 for key in ("step", "epoch")):
            raise ValueError(f"step {rest['step']!r} of epoch {rest['epoch']!r}")
        set_rng_state((rng_tensors, state["rng"]))
        optimizer.load_state_dict(restored)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        set_rng_state(before)
        raise AcmizeError(
            f"{folder / 'state.json'}: found {str(error)[:300]}, expected the state of this optimizer; {AGAIN}"
        ) from error
    model.load_state_dict(weights)
    for name, tensor in (ema or {}).items():
        tensor.copy_(averages[name])
    return rest


def _compare(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses a file whose names or shapes are not the expected ones, naming the first that differs."""
    for name in sorted(found.keys() | expected.keys()):
        here = list(found[name].shape) if name in found else "nothing"
        there = list(expected[name].shape) if name in expected else "nothing"
        if here != there:
            raise AcmizeError(f"{file}: {name}: found {here}, expected {there}; {AGAIN}")
