"""Padding is free: tokens that only fill up a batch run no learner, cost nothing and are not learned from.

A family's encoder gets a mask of its frames, or one it makes them from; a `Locate` registered for its exact class finds
them among the arguments of its forward, and a hook hands them to the adaptive modules inside for as long as it runs.

Shapes: B samples, T frames.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acmize import products

Locate = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor | None]
_LOCATE: dict[str, Locate] = {}


def class_path(module: nn.Module) -> str:
    """The import path of a module's exact class: libraries are told apart without being imported."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def locates(*paths: str) -> Callable[[Locate], Locate]:
    """Register what finds the frames' mask (B, T), True where real, for exact classes by import path."""

    def decorate(locate: Locate) -> Locate:
        _LOCATE.update(dict.fromkeys(paths, locate))
        return locate

    return decorate


class Padding:
    """Which tokens are real in the forward that runs now, for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return memo.setdefault(id(self), Padding())

    def publish(self, valid: Tensor | None) -> None:
        """Remember a mask (B, T), or that there is none."""
        self._local.valid = valid

    def read_any(self) -> Tensor | None:
        """The mask, whatever tokens it is of."""
        return getattr(self._local, "valid", None)

    def read(self, x: Tensor) -> Tensor | None:
        """The mask for tokens x (B, T, D); None where nothing is padded or x has other tokens."""
        valid = self.read_any()
        return valid if valid is not None and valid.shape == x.shape[:-1] else None


def install(model: nn.Module, wanted: type[nn.Module]) -> None:
    """Tell every module of class `wanted` inside a known encoder which of its tokens are real, and keep shapes few."""
    few_shapes(model)
    for encoder in _encoders(model).values():
        encoder.padding = Padding()
        encoder.register_forward_pre_hook(partial(_publish, _LOCATE[class_path(encoder)]), with_kwargs=True)
        encoder.register_forward_hook(_clear, always_call=True)
        for module in encoder.modules():
            if isinstance(module, wanted):
                module.padding = encoder.padding  # pyright: ignore[reportArgumentType]


@contextmanager
def watching(model: nn.Module) -> Iterator[Callable[[str], Padding | None]]:
    """While open: path of a module -> the `Padding` of its tokens, None outside known encoders."""
    found: dict[str, Padding] = {}
    handles = []
    for path, encoder in _encoders(model).items():
        installed = getattr(encoder, "padding", None)
        if installed is None:
            encoder.padding = Padding()
            publish = partial(_publish, _LOCATE[class_path(encoder)])
            handles.append((encoder, encoder.register_forward_pre_hook(publish, with_kwargs=True)))
        found[path] = encoder.padding
    try:
        yield lambda path: next((p for name, p in found.items() if not name or path.startswith(name + ".")), None)
    finally:
        for encoder, handle in handles:
            handle.remove()
            del encoder.padding


def rows(x: Tensor, padding: Padding | None) -> Tensor:
    """X (B, T, D) -> (M, D), padded tokens left out; other shapes as they are."""
    valid = None if padding is None else padding.read(x)
    return x if valid is None else x[valid]


def _encoders(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if class_path(module) in _LOCATE}


def few_shapes(model: nn.Module) -> None:
    """Products inside known encoders run on few numbers of rows: a dense rival of what `install` has prepared."""
    for encoder in _encoders(model).values():
        encoder.register_forward_pre_hook(_enter)
        encoder.register_forward_hook(_leave, always_call=True)


def _enter(_encoder: Any, _args: Any) -> None:
    if not torch.compiler.is_compiling():
        products.enter_ragged()


def _leave(_encoder: Any, _args: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling():
        products.leave_ragged()


def _publish(locate: Locate, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    valid = locate(encoder, args, kwargs)
    encoder.padding.publish(None if valid is None or bool(valid.all()) else valid)


def _clear(encoder: Any, _args: Any, _output: Any) -> None:
    encoder.padding.publish(None)
