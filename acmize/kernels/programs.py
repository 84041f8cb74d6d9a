"""The three Triton programs under `acmize.kernels.linear`: what each block of threads does.

Importing this module imports triton; everything else imports it late. Tokens come sorted by falling width, so the first
token of a tile is its widest and the last its narrowest: one load each gives a tile its limit (work beyond it is never
started) and the part of it that needs no mask. No program writes what another one writes: no atomics.

Of the language only built-ins are used, nothing of its library in Python (`tl.zeros`, `tl.sum`, `tl.cdiv`): whether
that library is compiled or interpreted was settled when triton was imported, for the programs here when they are.

Shapes: M tokens, D input width, H heads, U units of a head, O output width, N learners.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]
_WIDEN = tl.constexpr(INTERPRETED)


def _configs(*tiles: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """(tokens, columns, depth, warps, stages) of every candidate; one small tile where nothing can be timed."""
    if INTERPRETED:
        tiles = ((16, 16, 16, 4, 1),)
    return [triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=w, num_stages=s) for m, n, k, w, s in tiles]


_TILES = ((32, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _dot(left, right, acc, PRECISION: tl.constexpr):
    if _WIDEN:  # the interpreter would multiply the bits of bfloat16 as if they were whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.autotune(_configs(*_TILES), key=["size_class", "D", "U", "HEADS", "GATED"])
@triton.jit(do_not_specialize=["size_class"])
def expand_program(
    x,  # (M, D)
    w,  # (H * U, D), any strides
    b,  # (H * U,)
    gate_w,  # as w and b: the activated branch of a gated expansion
    gate_b,
    out,  # (M, H * U)
    index,  # (M,) tokens by falling width
    widths,  # (M,) units of the sorted tokens
    tokens,  # M
    size_class,  # of M, for the tuner alone
    x_row,
    w_row,
    w_col,
    out_row,
    D: tl.constexpr,
    U: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    ZERO_TAIL: tl.constexpr,  # write the zeros beyond a token's width, or leave them unwritten
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One (BM tokens, BN units of a head) tile of act(x @ w.T + b)."""
    per_head: tl.constexpr = (U + BN - 1) // BN
    first = tl.program_id(0) // (HEADS * per_head) * BM  # wide tiles, the long ones, start first
    column = tl.program_id(0) % (HEADS * per_head)
    head = column // per_head
    lowest = column % per_head * BN

    rows = first + tl.arange(0, BM)
    live = rows < tokens
    token = tl.load(index + rows, mask=live, other=0).to(tl.int64)
    width = tl.load(widths + rows, mask=live, other=0)
    widest = tl.load(widths + first)

    units = lowest + tl.arange(0, BN)
    real = units < U
    at = head * U + units
    ks = tl.arange(0, BK)
    x_tile = x + token[:, None] * x_row + ks[None, :]
    w_tile = ks[:, None] * w_col + at[None, :] * w_row

    acc = tl.full((BM, BN), 0.0, tl.float32)
    gate = tl.full((BM, BN), 0.0, tl.float32)
    depth = tl.where(widest > lowest, D, 0)  # nothing to do where even the widest token stops before this tile
    for k in range(0, depth, BK):
        if D % BK == 0:
            left = tl.load(x_tile + k)
            right = tl.load(w + w_tile + k * w_col, mask=real[None, :], other=0.0)
        else:
            left = tl.load(x_tile + k, mask=(k + ks < D)[None, :], other=0.0)
            right = tl.load(w + w_tile + k * w_col, mask=(k + ks < D)[:, None] & real[None, :], other=0.0)
        acc = _dot(left, right, acc, PRECISION)
        if GATED:
            right = tl.load(gate_w + w_tile + k * w_col, mask=(k + ks < D)[:, None] & real[None, :], other=0.0)
            gate = _dot(left, right, gate, PRECISION)

    if HAS_BIAS:
        acc += tl.load(b + at, mask=real, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(gate_b + at, mask=real, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = _activate(gate, ACT) * acc
    else:
        acc = _activate(acc, ACT)
    inside = units[None, :] < width[:, None]
    acc = tl.where(inside, acc, 0.0)
    written = live[:, None] & real[None, :]
    if not ZERO_TAIL:
        written &= inside
    tl.store(out + token[:, None] * out_row + at[None, :], acc.to(out.dtype.element_ty), mask=written)


@triton.autotune(_configs(*_TILES), key=["size_class", "O", "U", "HEADS"])
@triton.jit(do_not_specialize=["size_class"])
def contract_program(
    h,  # (M, H * U)
    w,  # (O, H * U), any strides
    table,  # (N + 1, O), contiguous
    residual,  # (M, O)
    out,  # (M, O)
    index,  # (M,) tokens by falling width
    widths,  # (M,) units of the sorted tokens
    choice,  # (M,) learners, in the tokens' own order
    tokens,  # M
    size_class,  # of M, for the tuner alone
    h_row,
    w_row,
    w_col,
    residual_row,
    out_row,
    O: tl.constexpr,  # noqa: E741
    U: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One (BM tokens, BN outputs) tile of h @ w.T + table[choice] + residual; no unit beyond a width is read."""
    columns: tl.constexpr = (O + BN - 1) // BN
    first = tl.program_id(0) // columns * BM
    rows = first + tl.arange(0, BM)
    live = rows < tokens
    token = tl.load(index + rows, mask=live, other=0).to(tl.int64)
    width = tl.load(widths + rows, mask=live, other=0)
    widest = tl.load(widths + first)
    narrowest = tl.load(widths + tl.minimum(first + BM, tokens) - 1)
    full = narrowest // BK * BK  # up to here every token of the tile runs every unit

    outs = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    real = outs < O
    ks = tl.arange(0, BK)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for head in range(HEADS):
        h_tile = h + token[:, None] * h_row + (head * U + ks)[None, :]
        w_tile = w + (head * U + ks)[:, None] * w_col + outs[None, :] * w_row
        for u in range(0, full, BK):
            left = tl.load(h_tile + u)
            right = tl.load(w_tile + u * w_col, mask=real[None, :], other=0.0)
            acc = _dot(left, right, acc, PRECISION)
        for u in range(full, widest, BK):
            left = tl.load(h_tile + u, mask=(u + ks)[None, :] < width[:, None], other=0.0)
            right = tl.load(w_tile + u * w_col, mask=(u + ks < widest)[:, None] & real[None, :], other=0.0)
            acc = _dot(left, right, acc, PRECISION)

    written = live[:, None] & real[None, :]
    if HAS_TABLE:
        picked = tl.load(choice + token, mask=live, other=0).to(tl.int64)
        acc += tl.load(table + picked[:, None] * O + outs[None, :], mask=written, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        near = residual + token[:, None] * residual_row + outs[None, :]
        acc += tl.load(near, mask=written, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * out_row + outs[None, :], acc.to(out.dtype.element_ty), mask=written)


@triton.autotune(
    _configs((32, 64, 64, 4, 3), (64, 64, 64, 4, 3), (32, 128, 128, 8, 3)),
    key=["size_class", "U", "WIDE", "HEADS", "splits"],
)
@triton.jit(do_not_specialize=["size_class"])
def weight_program(
    h,  # (M, H * U): the side that is limited
    z,  # (M, WIDE): the side that is not
    out,  # (splits, H * U, WIDE) float32, contiguous
    unit_sum,  # (splits, H * U) float32, contiguous
    index,  # (M,) tokens by falling width
    widths,  # (M,) units of the sorted tokens
    counts,  # (U,) tokens that run each unit
    splits,
    chunk,  # tokens of a split
    size_class,  # of M, for the tuner alone
    h_row,
    z_row,
    U: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One (BN units of a head, BK columns) tile of h.T @ z over the tokens that run the units, a split's part."""
    per_head: tl.constexpr = (U + BN - 1) // BN
    columns: tl.constexpr = (WIDE + BK - 1) // BK
    split = tl.program_id(0) % splits
    column = tl.program_id(0) // splits % columns
    tile = tl.program_id(0) // splits // columns
    head = tile // per_head
    lowest = tile % per_head * BN

    units = lowest + tl.arange(0, BN)
    real = units < U
    at = head * U + units
    cols = column * BK + tl.arange(0, BK)
    ms = tl.arange(0, BM)

    start = split * chunk
    end = tl.minimum(start + chunk, tl.load(counts + lowest))
    every = tl.load(counts + tl.minimum(lowest + BN, U) - 1)  # these many tokens run all units of the tile
    full = start + tl.maximum(tl.minimum(every, end) - start, 0) // BM * BM

    acc = tl.full((BN, BK), 0.0, tl.float32)
    sums = tl.full((BN, BM), 0.0, tl.float32)
    for m in range(start, full, BM):
        token = tl.load(index + m + ms).to(tl.int64)
        left = tl.load(h + token[None, :] * h_row + at[:, None], mask=real[:, None], other=0.0)
        right = tl.load(z + token[:, None] * z_row + cols[None, :], mask=(cols < WIDE)[None, :], other=0.0)
        acc = _dot(left, right, acc, PRECISION)
        if HAS_SUM:
            sums += left.to(tl.float32)
    for m in range(full, end, BM):
        live = m + ms < end
        token = tl.load(index + m + ms, mask=live, other=0).to(tl.int64)
        width = tl.load(widths + m + ms, mask=live, other=0)
        inside = units[:, None] < width[None, :]
        left = tl.load(h + token[None, :] * h_row + at[:, None], mask=inside, other=0.0)
        right_mask = live[:, None] & (cols < WIDE)[None, :]
        right = tl.load(z + token[:, None] * z_row + cols[None, :], mask=right_mask, other=0.0)
        acc = _dot(left, right, acc, PRECISION)
        if HAS_SUM:
            sums += left.to(tl.float32)

    place = split.to(tl.int64) * (HEADS * U) + at
    tl.store(out + place[:, None] * WIDE + cols[None, :], acc, mask=real[:, None] & (cols < WIDE)[None, :])
    if HAS_SUM:
        tl.store(unit_sum + place, tl.reduce(sums, 1, _add), mask=real & (column == 0))
