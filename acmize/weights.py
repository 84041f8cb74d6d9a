"""Weights of a model in one safetensors file or in several: written, checked, and read tensor by tensor.

Several files are laid out as transformers and timm do it: `model-00001-of-00003.safetensors` and the like, and beside
them `model.safetensors.index.json`, which says in which of them each tensor is. Neither is trusted.

Loading holds the model and hardly more: parameters get memory when they are about to be filled (`unset`), and tensors
of a file are read when they are used (`Stored`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only

from acmize.checkpoint import read_json, save_tensors, write_json
from acmize.errors import AcmizeError
from acmize.untrusted import shapes_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # names that `save_weights` writes
MAX_SHARD_SIZE = "5GB"  # as transformers has it
MAX_SHARDS = 1000
WINDOW = 16 << 20  # bytes read of a file before it is opened again
SMALL = 1 << 16  # bytes of a parameter that is not worth the trouble


# --- writing --------------------------------------------------------------------------------------------------


def save_weights(folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write `model.safetensors`, or shards and their index where the tensors are larger than that.

    Args:
        folder: there already, without weights.
        state: tensors by name; those that share memory go into one file, once for each name.
        max_shard_size: bytes of a file, or "300MB"; a tensor that is larger has a file of its own.

    Raises:
        AcmizeError: a size that is none, more than `MAX_SHARDS` files, or the disk refuses.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("less than a byte")
        split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        found = f"{max_shard_size!r} ({error})"
        raise AcmizeError(f"max_shard_size: found {found}, expected bytes, or text such as '5GB'") from None
    if len(split.filename_to_tensors) > MAX_SHARDS:
        found = f"{max_shard_size!r}, which makes {len(split.filename_to_tensors)} files"
        raise AcmizeError(f"max_shard_size: found {found}, expected {MAX_SHARDS} at most; make it larger")
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: state[name] for name in names})
    if split.is_sharded:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename})


# --- finding and checking -------------------------------------------------------------------------------------


def weights_in(folder: Path) -> Path | None:
    """The weights of a folder: its one file, else its index, else None."""
    return next((path for path in (folder / WEIGHTS, folder / INDEX) if path.is_file()), None)


@dataclass(frozen=True)
class Weights:
    """The tensors of a model as they lie on the disk; none of them has been read.

    Attributes:
        path: the file, or the index of several.
        files: where each tensor is.
        shapes: of each, from the files' headers.
    """

    path: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> Weights:
        """Look at the headers of a safetensors file, or of those that an index names.

        Raises:
            AcmizeError: a file is damaged, or the index is not true of the files.
        """
        if not path.name.endswith(".index.json"):
            shapes = shapes_of(path)
            return cls(path, dict.fromkeys(shapes, path), shapes)
        files, shapes = {}, {}
        for name, told in read_index(path).items():
            file = path.parent / name
            found = shapes_of(file)
            if wrong := sorted(found.keys() ^ told):
                lack = f"lacks {wrong[0]!r}" if wrong[0] in told else f"holds {wrong[0]!r} as well"
                raise AcmizeError(f"{path}: {name} {lack[:300]}; restore the files or save the model again")
            files |= dict.fromkeys(found, file)
            shapes |= found
        return cls(path, files, shapes)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, each read when something is computed with it.

        Raises:
            AcmizeError: a dtype that torch does not know.
        """
        reader = _Reader()
        return {name: Stored(reader, file, name) for name, file in self.files.items()}


def read_index(path: Path) -> dict[str, set[str]]:
    """File -> its tensors, of a `model.safetensors.index.json`; what else it says, such as sizes, decides nothing.

    Raises:
        AcmizeError: it is damaged, or names what is no safetensors file in its own folder.
    """
    found = read_json(path)
    told = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(told, dict) or not told or not all(isinstance(name, str) for name in told.values()):
        raise AcmizeError(f"{path}: found no weight_map of names, expected tensors and their files; restore the file")
    files: dict[str, set[str]] = {name: set() for name in sorted(set(told.values()))}
    for tensor, name in told.items():
        files[name].add(tensor)
    if len(files) > MAX_SHARDS:
        raise AcmizeError(f"{path}: names {len(files)} files, expected {MAX_SHARDS} at most; save the model again")
    for name in files:
        if not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name, re.ASCII):  # nothing that leads out of the folder
            raise AcmizeError(f"{path}: names {name[:200]!r}, expected a .safetensors file beside it; restore the file")
        if not (path.parent / name).is_file():
            raise AcmizeError(f"{path}: {name} is missing; copy or download all files of the model")
    return files


# --- reading --------------------------------------------------------------------------------------------------


class _Reader:
    """Reads tensors of safetensors files, of which one is open at a time, and opened again and again.

    A page stays mapped, and counts as memory, until its file is closed and no tensor of it is left.
    """

    def __init__(self) -> None:
        self._path, self._left, self._file = Path(), 0, None

    def read(self, path: Path, name: str) -> Tensor:
        """A tensor in mapped memory, not to be kept; its bytes are not looked at here."""
        try:
            if self._file is None or self._path != path or self._left <= 0:
                self._file, self._path, self._left = None, path, WINDOW
                self._file = safe_open(path, framework="pt")
            tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:  # the last: an unknown dtype
            raise AcmizeError(f"{path}: {name}: damaged ({str(error)[:300]}); restore the file") from None
        self._left -= tensor.numel() * tensor.element_size()
        return tensor


class Stored(Tensor):
    """A tensor of a file: has shape and dtype, and is read anew by every operation that touches it."""

    _source: tuple[_Reader, Path, str]

    @staticmethod
    def __new__(cls, reader: _Reader, path: Path, name: str) -> Stored:
        tensor = reader.read(path, name)
        made = Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)  # pyright: ignore
        made._source = (reader, path, name)
        return made

    def __init__(self, reader: _Reader, path: Path, name: str) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(stored: Stored) -> Tensor:
            reader, path, name = stored._source
            return reader.read(path, name)

        return func(*tree_map_only(cls, read, args), **tree_map_only(cls, read, kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Stored:
        return self  # timm copies configs, and with them the tensors they name


@contextmanager
def unset() -> Iterator[None]:
    """Inside, parameters are made on the meta device, and given memory when a state dict fills them; buffers are real.

    Values that are overwritten are neither drawn nor held, and those that a model computes for itself are right.
    Small parameters stay where they are: some families compute buffers on the device of a norm. What no state dict has
    filled is on the meta device still: see `lean`.
    """
    real: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the one on the meta device; tied ones stay tied
    handles: dict[nn.Module, Any] = {}

    def fill(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and prefix + name in state:
                made = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                vars(made).update(vars(parameter))
                module._parameters[name] = real.setdefault(id(parameter), (parameter, made))[1]

    def away(module: nn.Module, _name: str, parameter: Any) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter:
            return None
        if module not in handles:
            handles[module] = module.register_load_state_dict_pre_hook(fill)
        if parameter.is_meta or parameter.numel() * parameter.element_size() < SMALL:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(away)  # pyright: ignore[reportArgumentType] - its stub is wrong
    try:
        yield
    finally:
        handle.remove()
        for hook in handles.values():
            hook.remove()


def lean(load: Callable[[], nn.Module]) -> nn.Module:
    """A model that is built and loaded without memory for what is overwritten.

    Args:
        load: builds a model and loads its weights. Where it cannot do without values to begin with (a family that
            computes with its parameters, weights that do not fill all of them), it is called again with them.
    """
    try:
        with unset():
            model = load()
        if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            return model
    except Exception:  # any kind, by family; where the weights themselves are at fault, they are so again
        pass
    return load()


__all__ = ["INDEX", "MAX_SHARD_SIZE", "WEIGHTS", "Weights", "lean", "read_index", "save_weights", "weights_in"]
