"""Running a part of a batch of images: few sizes of batches, and no more samples at once than caches hold.

oneDNN compiles a kernel for every shape of a convolution it has not met, and results of several megabytes are fresh
pages each time; on a CPU either can cost more than the convolution.

Shapes: B samples, R of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

CHUNK = 2 << 20  # bytes of input that are run at once, by up to two threads
ROWS = 4  # fewer samples than so many are run, or multiples of it


def at_once(x: Tensor) -> int:
    """Samples of x (B, ...) that are run at once."""
    return samples_in_cache(x.shape[1:].numel() * x.element_size())


def samples_in_cache(size: int) -> int:
    """Samples whose largest tensors, of so many bytes each, caches hold."""
    threads = max(1, torch.get_num_threads() // 2)
    return max(ROWS, CHUNK * threads // max(1, size) // ROWS * ROWS)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (R,) of x (B, ...), channels last if x is: by itself `index_select` would change that, four times slower."""
    if x.dim() != 4 or x.is_contiguous():
        return x.index_select(0, rows)
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def run_rows(run: Callable[..., Tensor], xs: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
    """Run samples start..end of all xs (B, ...), some at a time; those beside them may run along, in vain.

    Args:
        run: some of each of xs -> outputs of one shape a sample, whatever samples they come with.
        xs: what a sample is made of.
        start: the first sample.
        end: the first one that is not run.

    Returns:
        Outputs of samples start..end in parts.
    """
    parts, size, last = [], at_once(xs[0]), xs[0].size(0)  # len() of a tensor takes microseconds
    for lo in range(start, end, size):
        count = min(size, end - lo)
        rounded = count if count < ROWS else min(count + -count % ROWS, last)
        first = min(lo, last - rounded)
        parts.append(run(*(x[first : first + rounded] for x in xs))[lo - first :][:count])
    return parts


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts as one tensor, without a copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def padded(rows: Tensor) -> Tensor:
    """Rows (R,), the last one repeated up to the next size that is run."""
    return rows if len(rows) < ROWS else torch.cat([rows, rows[-1:].expand(-len(rows) % ROWS)])


def put_among(y: Tensor, rows: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Y (B, ...) with parts, together (R, ...), written into rows (R,)."""
    if parts:
        permuted = y.dim() == 4 and not y.is_contiguous()  # by memory, as in `take`
        into, some = (t.permute(0, 2, 3, 1) if permuted else t for t in (y, joined(parts)))
        into.index_copy_(0, rows, some.to(y.dtype))
    return y


def put_back(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Outputs in parts, of samples in this order (B,), in the order of the samples; no copy for each group."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return take(joined(parts), inverse)


def in_groups(xs: Sequence[Tensor], groups: Sequence[tuple[int, Tensor]], run: Callable[..., Tensor]) -> Tensor:
    """Run the samples of each group together; a sample is a row of each of xs.

    Args:
        xs: (B, ...).
        groups: of `grouped`.
        run: (some of each of xs, `choice`, theirs) -> outputs of one shape a sample, whatever the choice.

    Returns:
        (B, ...) in the order of the samples.
    """
    if len(groups) == 1:
        return run(*xs, choice=groups[0][0])
    order = torch.cat([index for _, index in groups])
    xs, parts, start = [take(x, order) for x in xs], [], 0
    for k, index in groups:
        parts += run_rows(partial(run, choice=k), xs, start, start + len(index))
        start += len(index)
    return put_back(parts, order)


def grouped(choice: Tensor) -> list[tuple[int, Tensor]]:
    """(B,) choices -> each choice that occurs, with the samples (M,) that made it; an empty batch has choice 0."""
    if len(choice) == 1:
        return [(int(choice), torch.zeros_like(choice))]
    counts = torch.bincount(choice, minlength=1).tolist()
    index = choice.argsort().split(counts)
    return [(k, i) for k, i in enumerate(index) if len(i)] or [(0, choice)]
