"""Inputs and outputs of chosen modules, seen while a model runs: what phases 1 and 2 learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from acmize.padding import rows, watching

Seen = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def capture(source: nn.Module, paths: Sequence[str]) -> Iterator[Seen]:
    """While open, each forward of `source` leaves path -> (input, output), without padded tokens."""
    seen: Seen = {}

    def hook(path: str) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = rows(inputs[0].detach(), padding(path)), rows(output.detach(), padding(path))

        return keep

    handles = [source.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with watching(source) as padding:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D), or (B, D, H, W) where the adaptive module takes channels first -> (M, D), for input and output."""
    if getattr(module, "channels_first", False):
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    return x.flatten(0, -2), y.flatten(0, -2)
