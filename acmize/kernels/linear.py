"""The two primitives on a GPU, as in `acmize.ops`, one pass each over tokens sorted by width.

    expand    h[i, :w_i] = act(x[i] @ W[:w_i].T + b[:w_i]),  zero beyond
    contract  y[i]       = h[i, :w_i] @ W[:, :w_i].T + table[choice[i]] + residual[i]

With heads > 1 the units of every head are cut alike. Sums are float32 whatever the tokens are; weights are cast to the
tokens' dtype, or to autocast's where it is on.

Gradients are as adaptive as the forward pass: the gradient of an expansion's x is a contraction through the transposed
weight, that of a contraction's h an expansion, and a unit's weights read only the tokens that ran the unit.

Shapes: M tokens, D input width, H heads, U units of a head, O output width, N learners.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmize.errors import AcmizeError
from acmize.kernels.order import DeviceOrder, tokens_of_unit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "gelu": F.gelu, "silu": F.silu}
"""The activations that can be fused, by name, and what each is in torch; `gelu` is the exact one."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SPLIT_TOKENS = 2048  # tokens each part of a weight gradient sums at least
_MOST_SPLITS = 8


def is_available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: a CUDA device, or triton's interpreter was asked for."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def expand(
    x_MD: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: DeviceOrder,
    heads: int = 1,
    activation: str = "none",
    tf32: bool = False,
) -> Tensor:
    """Expand each token to its own width.

    Args:
        x_MD: (M, D) tokens, in their own order.
        weight: (H * U, D).
        bias: (H * U,) or None.
        order: from `order_on_device`, with bounds that end at U.
        heads: H.
        activation: a name in `ACTIVATIONS`, applied before anything is written.
        tf32: let float32 products round their factors to 10 bits.

    Returns:
        (M, H * U) in the tokens' own order, zero beyond each token's width. Differentiable in x, weight and bias.

    Raises:
        AcmizeError: sizes, dtypes or devices that do not belong together, or an activation that cannot be fused.
    """
    _check_activation(activation)
    x, w, b = _ready(x_MD, weight, bias)
    _check(x, order, found=w.shape, expected=(heads * order.units, x.shape[1]), name="weight")
    if _needs_grad(x, w, b):
        return ACTIVATIONS[activation](_Expand.apply(x, w, b, order, heads, tf32))
    return _expand(x, w, b, order, heads, tf32, activation=activation)


def contract(
    h_MU: Tensor,
    weight: Tensor,
    table: Tensor | None,
    order: DeviceOrder,
    heads: int = 1,
    residual: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """Contract each token from its own width; units beyond it are not read and may hold anything.

    Args:
        h_MU: (M, H * U) units, tokens in their own order.
        weight: (O, H * U).
        table: (N + 1, O) what is added for each choice, or None.
        order: from `order_on_device`, with bounds that end at U.
        heads: H.
        residual: (M, O) added to the result, or None.
        tf32: let float32 products round their factors to 10 bits.

    Returns:
        (M, O) in the tokens' own order. Differentiable in h, weight, table and residual.

    Raises:
        AcmizeError: sizes, dtypes or devices that do not belong together.
    """
    h, w, t, r = _ready(h_MU, weight, table, residual)
    _check(h, order, found=w.shape, expected=(w.shape[0], heads * order.units), name="weight")
    _check(h, order, found=h.shape, expected=(len(order.index), w.shape[1]), name="h")
    if r is not None:
        _check(h, order, found=r.shape, expected=(len(h), w.shape[0]), name="residual")
    if _needs_grad(h, w, t, r):
        return _Contract.apply(h, w, t, r, order, heads, tf32)
    return _contract(h, w, t, r, order, heads, tf32)


def mlp(
    x_MD: Tensor,
    ups: Sequence[tuple[Tensor, Tensor | None]],
    activation: str,
    down: Tensor,
    table: Tensor,
    order: DeviceOrder,
    residual: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """Expand, activation and contract: two kernels, and no hidden unit that does not run is written or read.

    Args:
        x_MD: (M, D) tokens, in their own order.
        ups: (weight, bias) of each expansion: one for a plain MLP, two (gate, value) for act(gate) * value.
        activation: a name in `ACTIVATIONS`.
        down: (O, U) weight of the contraction.
        table: (N + 1, O) what is added for each choice.
        order: from `order_on_device`.
        residual: (M, O) added to the result, or None.
        tf32: let float32 products round their factors to 10 bits.

    Returns:
        (M, O) in the tokens' own order. Differentiable in all of it.

    Raises:
        AcmizeError: sizes, dtypes or devices that do not belong together, or an activation that cannot be fused.
    """
    _check_activation(activation)
    if _needs_grad(x_MD, *(t for pair in ups for t in pair)):
        first, *value = (expand(x_MD, w, b, order, tf32=tf32) for w, b in ups)
        hidden = ACTIVATIONS[activation](first)
        return contract(hidden * value[0] if value else hidden, down, table, order, residual=residual, tf32=tf32)
    x, w, b = _ready(x_MD, *ups[-1])
    _check(x, order, found=w.shape, expected=(order.units, x.shape[1]), name="weight")
    gate = None
    if len(ups) == 2:
        _, gate_w, gate_b = _ready(x_MD, *ups[0])
        _check(x, order, found=gate_w.shape, expected=tuple(w.shape), name="gate weight")
        gate = (gate_w, gate_b)
    hidden = _expand(x, w, b, order, 1, tf32, activation=activation, gate=gate, zero_tail=False)
    return contract(hidden, down, table, order, residual=residual, tf32=tf32)


# --- launching the programs -----------------------------------------------------------------------------------


def _launch(name: str, grid: Callable[[dict[str, int]], int], *args: Any, **constants: Any) -> None:
    """Run a program on as many blocks as `grid` finds for the tile sizes that were chosen; args[0] is a tensor."""
    program = getattr(importlib.import_module("acmize.kernels.programs"), name)  # imports triton
    with torch.cuda.device_of(args[0]):  # triton launches on the current device
        program[lambda tile: (grid(tile),)](*args, **constants)


def _expand(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    order: DeviceOrder,
    heads: int,
    tf32: bool,
    activation: str = "none",
    gate: tuple[Tensor, Tensor | None] | None = None,
    zero_tail: bool = True,
) -> Tensor:
    x, tokens, units = _rows(x), len(x), order.units
    out = x.new_empty(tokens, heads * units)
    if gate is not None:
        w, gate_w, gate_b = w.contiguous(), gate[0].contiguous(), gate[1]  # one pair of strides serves both
        if (b is None) != (gate_b is None):  # and one flag
            zeros = x.new_zeros(heads * units)
            b, gate_b = zeros if b is None else b, zeros if gate_b is None else gate_b
        gate = (gate_w, None if gate_b is None else gate_b.contiguous())
    b = None if b is None else b.contiguous()
    if out.numel():
        _launch(
            "expand_program",
            lambda t: _tiles(tokens, t["BM"]) * heads * _tiles(units, t["BN"]),
            *(x, w, b, *(gate or (None, None)), out, order.index, order.widths, tokens, tokens.bit_length()),
            *(x.stride(0), *w.stride(), out.stride(0)),
            D=x.shape[1],
            U=units,
            HEADS=heads,
            HAS_BIAS=b is not None,
            GATED=gate is not None,
            ACT=activation,
            ZERO_TAIL=zero_tail,
            PRECISION="tf32" if tf32 else "ieee",
        )
    return out


def _contract(
    h: Tensor,
    w: Tensor,
    table: Tensor | None,
    residual: Tensor | None,
    order: DeviceOrder,
    heads: int,
    tf32: bool,
) -> Tensor:
    h, tokens, width = _rows(h), len(h), w.shape[0]
    residual = None if residual is None else _rows(residual)
    out = h.new_empty(tokens, width)
    if out.numel():
        _launch(
            "contract_program",
            lambda t: _tiles(tokens, t["BM"]) * _tiles(width, t["BN"]),
            *(h, w, None if table is None else table.contiguous(), residual, out),
            *(order.index, order.widths, order.choice, tokens, tokens.bit_length()),
            *(h.stride(0), *w.stride(), 0 if residual is None else residual.stride(0), out.stride(0)),
            O=width,
            U=order.units,
            HEADS=heads,
            HAS_TABLE=table is not None,
            HAS_RESIDUAL=residual is not None,
            PRECISION="tf32" if tf32 else "ieee",
        )
    return out


def _weight_grad(
    h: Tensor, z: Tensor, order: DeviceOrder, heads: int, tf32: bool, want_sum: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(H * U, width of z) sum over the tokens that run a unit of h[i, unit] * z[i], and (H * U,) of h[i, unit]."""
    h, z, tokens, units, width = _rows(h), _rows(z), len(h), order.units, z.shape[1]
    splits = min(_MOST_SPLITS, max(1, tokens // _SPLIT_TOKENS))
    out = torch.empty(splits, heads * units, width, dtype=torch.float32, device=h.device)
    sums = torch.empty(out.shape[:2], dtype=torch.float32, device=h.device) if want_sum else None
    if tokens and out.numel():
        _launch(
            "weight_program",
            lambda t: splits * heads * _tiles(units, t["BN"]) * _tiles(width, t["BK"]),
            *(h, z, out, sums, order.index, order.widths, tokens_of_unit(order)),
            *(splits, _tiles(tokens, splits), tokens.bit_length(), h.stride(0), z.stride(0)),
            U=units,
            WIDE=width,
            HEADS=heads,
            HAS_SUM=want_sum,
            PRECISION="tf32" if tf32 else "ieee",
        )
    else:
        out.zero_()
        sums = None if sums is None else sums.zero_()
    return out.sum(0), None if sums is None else sums.sum(0)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _rows(x: Tensor) -> Tensor:
    """The kernels step through a row one element at a time."""
    return x if x.stride(-1) == 1 else x.contiguous()


# --- gradients ------------------------------------------------------------------------------------------------


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, order: DeviceOrder, heads: int, tf32: bool
    ) -> Tensor:
        ctx.save_for_backward(x, w, *order[:3])
        ctx.units, ctx.heads, ctx.tf32, ctx.dtype = order.units, heads, tf32, None if b is None else b.dtype
        return _expand(x, w, b, order, heads, tf32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, index, widths, choice = ctx.saved_tensors
        order = DeviceOrder(index, widths, choice, ctx.units)
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _contract(grad, w.T, None, None, order, ctx.heads, ctx.tf32)
        if any(ctx.needs_input_grad[1:3]):
            grad_w, grad_b = _weight_grad(grad, x, order, ctx.heads, ctx.tf32, ctx.needs_input_grad[2])
            grad_w = grad_w.to(w.dtype)
            grad_b = None if grad_b is None else grad_b.to(ctx.dtype)
        return grad_x, grad_w, grad_b, None, None, None


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        h: Tensor,
        w: Tensor,
        table: Tensor | None,
        residual: Tensor | None,
        order: DeviceOrder,
        heads: int,
        tf32: bool,
    ) -> Tensor:
        ctx.save_for_backward(h, w, *order[:3])
        ctx.units, ctx.heads, ctx.tf32 = order.units, heads, tf32
        ctx.choices = 0 if table is None else len(table)
        return _contract(h, w, table, residual, order, heads, tf32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, w, index, widths, choice = ctx.saved_tensors
        order = DeviceOrder(index, widths, choice, ctx.units)
        grad_h = grad_w = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_h = _expand(grad, w.T, None, order, ctx.heads, ctx.tf32)
        if ctx.needs_input_grad[1]:
            grad_w = _weight_grad(h, grad, order, ctx.heads, ctx.tf32)[0].to(w.dtype).T
        if ctx.needs_input_grad[2]:
            # A product with one-hot rows: N + 1 columns are little work, and its sums do not depend on timing.
            rows = torch.arange(ctx.choices, device=grad.device)[:, None] == order.choice
            grad_table = rows.to(grad.dtype) @ grad
        return grad_h, grad_w, grad_table, grad if ctx.needs_input_grad[3] else None, None, None, None


# --- checks ---------------------------------------------------------------------------------------------------


def _ready(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All in one dtype: autocast's where it is on, else that of x."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype not in DTYPES:
        raise AcmizeError(f"tokens: found {dtype}, expected one of {DTYPES}; use the backend 'masked' for others")
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _check(x: Tensor, order: DeviceOrder, found: Sequence[int], expected: tuple[int, ...], name: str) -> None:
    if tuple(found) != expected:
        raise AcmizeError(f"{name}: found {tuple(found)}, expected {expected}")
    if len(order.index) != len(x):
        raise AcmizeError(f"tokens: found {len(x)}, expected {len(order.index)}, as the order was made for")
    if not is_available(x.device):
        raise AcmizeError(f"tokens: found on {x.device}, expected a CUDA device with triton installed")


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise AcmizeError(f"activation: found {name!r}, expected one of {tuple(ACTIVATIONS)}")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
