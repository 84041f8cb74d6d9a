"""Running a part of a batch of images: few sizes of batches, and no more samples at once than caches hold.

oneDNN compiles a kernel for every shape of a convolution it has not met, and results of several megabytes are fresh
pages each time; on a CPU either can cost more than the convolution.

Shapes: B samples, R of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2 << 20  # bytes of input that are run at once
ROWS = 4  # fewer samples than so many are run, or multiples of it


def at_once(x: Tensor) -> int:
    """Samples of x (B, ...) that are run at once."""
    return max(ROWS, CHUNK // max(1, x.shape[1:].numel() * x.element_size()) // ROWS * ROWS)


def rounded(rows: Tensor) -> Tensor:
    """Rows (R,), the last one repeated up to the next size that is run."""
    return rows if len(rows) < ROWS else torch.cat([rows, rows[-1:].expand(-len(rows) % ROWS)])


def run_rows(run: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor | None:
    """Put `run(x[rows])` into those rows of `out`.

    Args:
        run: some of x -> outputs of one shape a sample, whatever samples they come with.
        x: (B, ...).
        rows: (R,) without repetition.
        out: (B, ...) to write into; made where there is none and something is run.

    Returns:
        `out`, or what took its place where `run` gives another dtype.
    """
    for some in rows.split(at_once(x)) if len(rows) else ():
        y = run(x.index_select(0, rounded(some)))[: len(some)]
        out = y.new_empty(len(x), *y.shape[1:]) if out is None else out.to(y.dtype)
        out.index_copy_(0, some, y)
    return out
