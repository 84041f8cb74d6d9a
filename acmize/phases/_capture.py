"""Inputs and outputs of chosen modules, seen while a model runs: what phases 1 and 2 learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from acmize.padding import rows, watching
from acmize.recording import AdaptiveModule
from acmize.windows import AcmConv

Seen = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def capture(source: nn.Module, paths: Sequence[str]) -> Iterator[Seen]:
    """While open, each forward of `source` leaves path -> (input, output), without padded tokens."""
    seen: Seen = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            own = None if isinstance(module, (nn.Conv1d, AcmConv)) else padding(path)  # its time comes last
            seen[path] = rows(inputs[0].detach(), own), rows(output.detach(), own)

        return keep

    handles = [source.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with watching(source) as padding:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(module: AdaptiveModule, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the learners of an adaptive module read (M, D), and what it gives (M, O)."""
    return module.tokens(x).flatten(0, -2), module.output_tokens(y).flatten(0, -2)
