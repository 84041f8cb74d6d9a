"""The adaptive products of `torch.ops.acmize` in ONNX: what `torch.onnx.export` writes in their place.

Each has two forms in the file, and an `If` that takes the cheaper one for the tokens at hand:

    masked    all the work, then a mask.
    skipping  tokens sorted by choice; each block of learners multiplies the leading tokens, those that run it, and what
              the blocks give is added up under one another (or put side by side) and put back in order.

Sorting and moving tokens cost time of their own, so skipping is taken where the multiply-adds left out are more than
that is worth. Learners are joined into blocks of `BLOCK_UNITS` units or more: the ones a token does not run within its
last block are masked.

Shapes: M tokens, D input width, H heads, U units of a head, O output width, N learners, B samples, T tokens a sample.
"""

# onnxscript types its operators by symbolic values, but takes lists, numbers and None in their place.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator, opset20

op: Any = opset20  # its operators take Python numbers and lists as well, which their annotations do not say

BLOCK_UNITS = 96  # units (of all heads) of a block of learners at least: a narrower product wastes the processor
BLOCKS = 4  # of a site at most
OVERHEAD_MACS = 4_000_000.0  # what skipping costs a call whatever the tokens, in MACs
MOVE_MACS = 8.0  # what moving one number costs, in MACs
END = 2**31  # behind the last element, for Slice
FLOAT, INT64 = 1, 7

Value = Any  # onnx_ir.Value


# --- adaptive products ----------------------------------------------------------------------------------------


def expand(x: Value, weight: Value, bias: Value | None, choice: Value, bounds: Sequence[int], heads: int) -> Value:
    """`ops.expand`: x (M, D) -> (M, H * U), zero beyond each token's width."""
    blocks, every = _blocks(bounds, heads), op.Transpose(weight, perm=[1, 0])
    cut = [(bounds[-1], heads, lo, hi) for lo, hi in blocks]
    parts = [(op.Transpose(_rows_of(weight, *c), perm=[1, 0]), _entries_of(bias, *c)) for c in cut]

    def masked() -> Value:
        return _masked(_linear(x, every, bias), choice, bounds, heads)

    def skipping() -> Value:
        sorted_by = _Sorted(choice)
        rows, columns = op.Gather(x, sorted_by.index), []
        for (lo, hi), (w, b) in zip(blocks, parts, strict=True):
            count = sorted_by.running(bounds, lo)
            h = _linear(_head(rows, count), w, b)
            h = _masked(h, _head(sorted_by.choice, count), bounds, heads, lo, hi)
            columns.append(op.Reshape(_padded(h, sorted_by.tokens), [0, heads, -1]))
        h = op.Concat(*columns, axis=2) if len(columns) > 1 else columns[0]
        return op.Gather(op.Reshape(h, [0, -1]), sorted_by.inverse)

    return _cheaper(weight, choice, bounds, heads, width(x), heads * bounds[-1], masked, skipping)


def contract(h: Value, weight: Value, table: Value, choice: Value, bounds: Sequence[int], heads: int) -> Value:
    """`ops.contract`: h (M, H * U) -> (M, O), with `table` (N + 1, O) added by choice."""
    blocks, every = _blocks(bounds, heads), op.Transpose(weight, perm=[1, 0])
    parts = [_rows_of(every, bounds[-1], heads, lo, hi) for lo, hi in blocks]

    def masked() -> Value:
        return op.Add(op.MatMul(_masked(h, choice, bounds, heads), every), op.Gather(table, choice))

    def skipping() -> Value:
        sorted_by = _Sorted(choice)
        rows = op.Reshape(op.Gather(h, sorted_by.index), [0, heads, -1])

        def block(number: int) -> tuple[Value, Value]:
            lo, hi = blocks[number]
            count = sorted_by.running(bounds, lo)
            part = op.Reshape(op.Slice(_head(rows, count), [lo], [hi], [2]), [0, heads * (hi - lo)])
            part = _masked(part, _head(sorted_by.choice, count), bounds, heads, lo, hi)
            return op.MatMul(part, parts[number]), count

        y = _summed([block(number) for number in range(len(blocks))], sorted_by.tokens)
        return op.Add(op.Gather(y, sorted_by.inverse), op.Gather(table, choice))

    return _cheaper(weight, choice, bounds, heads, width(table), width(table), masked, skipping)


def mlp(
    x: Value,
    weights: Sequence[Value],
    biases: Sequence[Value],
    has_bias: Sequence[bool],
    act: str,
    down: Value,
    table: Value,
    choice: Value,
    bounds: Sequence[int],
) -> Value:
    """`ops.mlp`: x (M, D) -> (M, O); one weight for a plain MLP, two (gate, value) for a gated one."""
    ups = [(w, b if known else None) for w, b, known in zip(weights, biases, has_bias, strict=True)]
    blocks, every = _blocks(bounds, 1), [(op.Transpose(w, perm=[1, 0]), b) for w, b in ups]
    back = op.Transpose(down, perm=[1, 0])
    cut = [(bounds[-1], 1, lo, hi) for lo, hi in blocks]
    parts = [
        ([(op.Transpose(_rows_of(w, *c), perm=[1, 0]), _entries_of(b, *c)) for w, b in ups], _rows_of(back, *c))
        for c in cut
    ]

    def hidden(rows: Value, layers: Sequence[tuple[Value, Value | None]]) -> Value:
        first, *value = (_linear(rows, w, b) for w, b in layers)
        return op.Mul(_ACTS[act](first), value[0]) if value else _ACTS[act](first)

    def masked() -> Value:
        h = _masked(hidden(x, every), choice, bounds, 1)
        return op.Add(op.MatMul(h, back), op.Gather(table, choice))

    def skipping() -> Value:
        sorted_by = _Sorted(choice)
        rows = op.Gather(x, sorted_by.index)

        def block(number: int) -> tuple[Value, Value]:
            (lo, hi), (layers, leave) = blocks[number], parts[number]
            count = sorted_by.running(bounds, lo)
            h = hidden(_head(rows, count), layers)
            h = _masked(h, _head(sorted_by.choice, count), bounds, 1, lo, hi)
            return op.MatMul(h, leave), count

        y = _summed([block(number) for number in range(len(blocks))], sorted_by.tokens)
        return op.Add(op.Gather(y, sorted_by.inverse), op.Gather(table, choice))

    return _cheaper(down, choice, bounds, 1 + len(ups), width(x), width(table), masked, skipping)


_ACTS: dict[str, Callable[[Value], Value]] = {
    "identity": op.Identity,
    "gelu": op.Gelu,
    "gelu_tanh": partial(op.Gelu, approximate="tanh"),
    "silu": lambda x: op.Mul(x, op.Sigmoid(x)),
    "relu": op.Relu,
    "sigmoid": op.Sigmoid,
}


class _Sorted:
    """Tokens by falling choice: `choice`, `index` and `inverse` (M,), `tokens` (1,) their number."""

    def __init__(self, choice: Value) -> None:
        self.tokens = op.Shape(choice, start=0, end=1)
        self.choice, self.index = op.TopK(choice, self.tokens, largest=1, sorted=1)
        places = op.Range(integer(0), op.Squeeze(self.tokens), integer(1))
        self.inverse = op.ScatterElements(places, self.index, places)

    def running(self, bounds: Sequence[int], unit: int) -> Value:
        """(1,) how many tokens run this unit."""
        runs = op.Greater(self.choice, integer(list(bounds).index(unit)))
        return op.ReduceSum(op.Cast(runs, to=INT64), [0], keepdims=1)


def _cheaper(
    weight: Value,
    choice: Value,
    bounds: Sequence[int],
    heads: int,
    dim: int,
    out: int,
    masked: Callable[[], Value],
    skipping: Callable[[], Value],
) -> Value:
    """An `If`: skipping where the MACs of the units left out, `heads * dim` each, are worth it."""
    left_out = np.asarray(bounds[-1] - np.asarray(bounds), np.float32) * heads * dim
    worth = left_out - MOVE_MACS * (2 * dim + 3 * out)
    gain = op.ReduceSum(op.Gather(array(worth.astype(np.float32)), choice), [0], keepdims=0)
    skips = op.Greater(gain, array(np.float32(OVERHEAD_MACS)))
    branches = {f"{weight.name}_skipping": lambda: (skipping(),), f"{weight.name}_masked": lambda: (masked(),)}
    return either(skips, branches)[0]


def either(condition: Value, branches: dict[str, Callable[[], Sequence[Value]]]) -> Sequence[Value]:
    """An `If`: what the first of two named branches writes where the condition () holds, else what the second does."""
    then, other = (_branch(write, name) for name, write in branches.items())
    attributes = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", other)]
    node = ir.Node("", "If", [condition], attributes, num_outputs=len(then.outputs))
    recorder().nodes.append(node)
    return node.outputs


def _branch(write: Callable[[], Sequence[Value]], name: str) -> ir.Graph:
    """What `write` emits, as a graph of its own that may read the values around it; no other value has its names."""
    around = recorder()
    nodes, constants = around.nodes, around.constant_farm
    around.nodes, around.constant_farm = [], {}  # a constant of one branch is not seen by the other
    try:
        out, inner = write(), around.nodes
    finally:
        around.nodes, around.constant_farm = nodes, constants
    for i, node in enumerate(inner):
        node.name = f"{name}_{i}"
        for j, value in enumerate(node.outputs):
            value.name = f"{name}_{i}_{j}"
    return ir.Graph((), list(out), nodes=inner, name=name)


def recorder() -> Any:
    """Where operators are written to."""
    return evaluator.default()


def _blocks(bounds: Sequence[int], heads: int) -> list[tuple[int, int]]:
    """Units lo..hi of a head of each block of learners."""
    learners = len(bounds) - 1
    count = max(1, min(BLOCKS, learners, heads * bounds[-1] // BLOCK_UNITS))
    return list(pairwise(bounds[round(learners * i / count)] for i in range(count + 1)))


def _masked(h: Value, choice: Value, bounds: Sequence[int], heads: int, lo: int = 0, hi: int | None = None) -> Value:
    """H (M, H * (hi - lo)) with zeros where a token does not run a unit."""
    if hi is not None and list(bounds).index(hi) == list(bounds).index(lo) + 1:
        return h  # a single learner: whoever is here runs it; there may be nobody, so no size below is left open
    units = np.arange(lo, bounds[-1] if hi is None else hi)
    mask = op.Gather(array((units < np.asarray(bounds)[:, None]).astype(np.float32)), choice)
    if heads == 1:
        return op.Mul(h, mask)
    apart = op.Mul(op.Reshape(h, [0, heads, len(units)]), op.Unsqueeze(mask, [1]))
    return op.Reshape(apart, [0, heads * len(units)])


def _summed(parts: Sequence[tuple[Value, Value]], tokens: Value) -> Value:
    """The sum (M, O) of parts (count, O) of falling counts, each on the leading tokens."""
    total, _ = parts[-1]
    for part, count in reversed(parts[:-1]):
        total = op.Add(part, _padded(total, count))
    return _padded(total, tokens)


def _padded(h: Value, count: Value) -> Value:
    """H (m, O) with zeros below, (count, O)."""
    missing = op.Sub(count, op.Shape(h, start=0, end=1))
    return op.Pad(h, op.Concat(integers(0, 0), missing, integers(0), axis=0))


def _head(x: Value, count: Value) -> Value:
    return op.Slice(x, [0], count, [0])


def _linear(x: Value, weight_DO: Value, bias: Value | None) -> Value:
    y = op.MatMul(x, weight_DO)
    return y if bias is None else op.Add(y, bias)


def _rows_of(weight: Value, units: int, heads: int, lo: int, hi: int) -> Value:
    """Rows of the units lo..hi of every head, of (H * U, columns)."""
    if heads == 1:
        return op.Slice(weight, [lo], [hi], [0])
    apart = op.Reshape(weight, [heads, units, -1])
    return op.Reshape(op.Slice(apart, [lo], [hi], [1]), [heads * (hi - lo), -1])


def _entries_of(bias: Value | None, units: int, heads: int, lo: int, hi: int) -> Value | None:
    """Entries of the units lo..hi of every head, of (H * U,)."""
    if bias is None:
        return None
    apart = op.Reshape(bias, [heads, units])
    return op.Reshape(op.Slice(apart, [lo], [hi], [1]), [-1])


def width(x: Value) -> int:
    """The size of the last axis, which is known."""
    return int(x.shape[-1])


def array(values: Any) -> Value:
    """A constant of numpy."""
    return op.Constant(value=ir.tensor(np.asarray(values)))


def integer(value: int) -> Value:
    """A constant ()."""
    return array(np.int64(value))


def integers(*values: int) -> Value:
    """A constant (n,)."""
    return array(np.asarray(values, np.int64))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.acmize.expand.default: expand,
    torch.ops.acmize.contract.default: contract,
    torch.ops.acmize.mlp.default: mlp,
}
