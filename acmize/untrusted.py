"""Limits for models that are built from files which anyone may have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from acmize.errors import AcmizeError

MAX_SIZE = 1 << 22  # of any one number that a model is built with
MAX_TENSORS = 5000  # of a model whose weights are not at hand to be counted


def check_sizes(value: Any, what: str) -> None:
    """Refuse numbers, anywhere in a JSON value, that no model is built with.

    Raises:
        AcmizeError: one is larger than `MAX_SIZE`.
    """
    for number in _numbers(value):
        if abs(number) > MAX_SIZE:
            raise AcmizeError(f"{what}: found the number {str(number)[:40]}, expected {MAX_SIZE} at most; restore it")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape from the header of a safetensors file, without reading the tensors.

    Raises:
        AcmizeError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise AcmizeError(f"{path}: damaged ({str(error)[:300]}); restore the file or convert again") from None


@contextmanager
def no_more_parameters(tensors: int) -> Iterator[None]:
    """A building that makes far more parameters than there are tensors to fill them is stopped: a depth of a million.

    Args:
        tensors: in the file. Some models replace layers while they are built, hence the factor.

    Raises:
        AcmizeError: from inside the building.
    """
    left = 4 * tensors + 1000

    def count(_module: nn.Module, name: str, _parameter: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise AcmizeError(
                f"config.json: the model it asks for has far more parameters than {tensors} tensors can fill; "
                "restore the files or convert again"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def sketched(build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A model on the meta device, where it takes no memory, of hardly more parameters than a file has tensors."""
    with torch.device("meta"), no_more_parameters(len(shapes)):
        return build()


__all__ = ["check_sizes", "no_more_parameters", "shapes_of", "sketched"]
