"""Products of matrices on a CPU, as fast as PyTorch can: by which library, on how many rows, in which memory.

PyTorch multiplies by its default BLAS. oneDNN, which it also carries, is twice as fast on some processors, but compiles
a kernel for every number of rows that it has not met: one to two milliseconds, where a layer of a small model takes a
third of one. So products of a part of the tokens run on rounded numbers of rows (`rows_for`), and inside an encoder
whose inputs have ever new lengths (`enter_ragged`) next to all do.

Fresh pages of memory cost more than what is written to them. What lives for one product alone is written to memory that
the next one uses again.

Shapes: M tokens, D input width, O output width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[Tensor], Tensor]
ONEDNN_MACS = 1_000_000  # a product from which on oneDNN's own preparations are small beside it
KERNEL_MACS = 400_000_000  # a product up to which compiling a kernel for it costs more than more rows in all layers do
WORK = 1 << 18  # numbers from which on memory is kept and used again


# --- activations ----------------------------------------------------------------------------------------------

ACTS: dict[str, nn.Module] = {
    "identity": nn.Identity(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
}
# What oneDNN can do to its output while it writes it: acmize's name of an activation -> (name, algorithm).
POST_OPS = {
    "identity": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def act_name(act: Act) -> str | None:
    """The name under which an operator knows an activation; None for one it does not know."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    modules: dict[Any, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Identity: "identity"}
    functions: dict[Any, str] = {F.gelu: "gelu", F.silu: "silu", F.relu: "relu", torch.sigmoid: "sigmoid"}
    return modules.get(type(act)) or functions.get(act)


# --- the product ----------------------------------------------------------------------------------------------


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: Act | None = None) -> Tensor:
    """`act(F.linear(x))`; by oneDNN where that is fast, which it is not (by three orders) for weights with gaps.

    Args:
        x: (M, D).
        weight: (O, D), of any strides.
        bias: (O,).
        act: elementwise, or None.
    """
    macs = len(x) * weight.numel()
    if macs < ONEDNN_MACS or not (weight.is_contiguous() or weight.T.is_contiguous()) or not onednn_for(x):
        y = F.linear(x, weight, bias)
        return y if act is None else act(y)
    post = None if act is None else POST_OPS.get(act_name(act) or "")
    name, algorithm = post or ("none", "")
    rows = _rounded(len(x)) if _thread.ragged and macs < KERNEL_MACS else len(x)
    y = torch.ops.mkldnn._linear_pointwise(_ready(x, rows), weight, bias, name, [], algorithm)[: len(x)]
    return y if act is None or post else act(y)


def onednn_for(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices like x here."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and has_onednn()


def has_onednn() -> bool:
    """Whether PyTorch carries oneDNN, with products and convolutions that apply what follows them, and may use it."""
    # the flag alone: `torch.backends.mkldnn.enabled` goes through a property and a class
    return _onednn_built() and torch._C._get_mkldnn_enabled()


@lru_cache
def _onednn_built() -> bool:
    named = ("_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in named)


# --- rows and memory ------------------------------------------------------------------------------------------


class _Thread(threading.local):
    """What the products of a thread share.

    Attributes:
        ragged: encoders that run whose inputs have ever new lengths.
        kept: (purpose, dtype) -> memory to be used again.
    """

    def __init__(self) -> None:
        self.ragged = 0
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}


_thread = _Thread()


def enter_ragged() -> None:
    """From here to `leave_ragged` products of this thread run on rounded numbers of rows, but for very large ones.

    For inputs of ever new lengths: where they are all alike it would only cost.
    """
    _thread.ragged += 1


def leave_ragged() -> None:
    """See `enter_ragged`; they may be nested."""
    _thread.ragged -= 1


def rows_for(count: int, x: Tensor, weight: Tensor) -> int:
    """Rows of x to multiply with weight for the first `count` tokens: one of few numbers, at least `count`."""
    if count * weight.numel() < ONEDNN_MACS or not onednn_for(x):
        return count
    return min(len(x), _rounded(count))


def _rounded(count: int) -> int:
    """The next of few numbers: four significant bits, at least 16; at most an eighth more, in the mean 3 %."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of x (M, D), all of them, and perhaps zeros behind them; valid until the next call."""
    out = _room("order", x, _rounded(len(x)) if _thread.ragged else len(x))
    torch.index_select(x, 0, index, out=out[: len(x)])
    return out


def _ready(x: Tensor, rows: int) -> Tensor:
    """X, zeros behind it, as oneDNN reads it: rows with gaps it would copy itself, to fresh memory."""
    if rows == len(x) and x.is_contiguous():
        return x
    out = _room("rows", x, rows)
    out[: len(x)] = x
    return out


def _room(purpose: str, x: Tensor, rows: int) -> Tensor:
    """Memory for `rows` rows like those of x; zero beyond as many as x has."""
    size = rows * x.shape[1]
    if x.device.type != "cpu" or size < WORK:
        out = x.new_empty(rows, x.shape[1])
    else:
        kept = _thread.kept.get((purpose, x.dtype))
        if kept is None or len(kept) < size:
            with torch.inference_mode(False):  # what is made in that mode may not be written to outside
                kept = _thread.kept[purpose, x.dtype] = torch.empty(size, dtype=x.dtype)
        out = kept[:size].view(rows, -1)
    if rows > len(x):
        out[len(x) :] = 0
    return out
