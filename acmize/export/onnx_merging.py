"""The merging of tokens by `torch.ops.acmize` in ONNX: what `torch.onnx.export` writes in its place.

Shapes: B samples, T tokens, D width, R pairs.
"""

# onnxscript types its operators by symbolic values, but takes lists, numbers and None in their place.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from acmize.export.onnx_ops import END, FLOAT, Value, array, either, integer, integers, op, recorder, width


def merge(x: Value, sizes: Value, r: Value, prefix: int) -> tuple[Value, Value]:
    """`merge_pairs.merge` of x (B, T, D), sizes (B, T) by r () pairs; without a pair tokens keep their order."""
    name = f"merge_{len(recorder().nodes)}"
    out, left = either(
        op.Equal(r, integer(0)),
        {f"{name}_none": lambda: (op.Identity(x), op.Identity(sizes)), name: lambda: _merged(x, sizes, r, prefix)},
    )
    return out, left


def _merged(x: Value, sizes: Value, r: Value, prefix: int) -> tuple[Value, Value]:
    """By one pair or more; sums over pairs are a product with 0 and 1."""
    b_from = prefix + 1
    a, b = op.Slice(x, [prefix], [END], [1], [2]), op.Slice(x, [b_from], [END], [1], [2])
    size_a, size_b = op.Slice(sizes, [prefix], [END], [1], [2]), op.Slice(sizes, [b_from], [END], [1], [2])
    squares_a, squares_b = (op.ReduceSum(op.Mul(t, t), [2], keepdims=0) for t in (a, b))
    product = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    both = op.Add(op.Unsqueeze(squares_a, [2]), op.Unsqueeze(squares_b, [1]))
    distance = op.Sub(both, op.Mul(product, 2.0))
    wide_a, wide_b = op.Unsqueeze(size_a, [2]), op.Unsqueeze(size_b, [1])
    costs = op.Mul(op.Div(op.Mul(wide_a, wide_b), op.Add(wide_a, wide_b)), distance)
    cost, partner = op.ReduceMin(costs, [2], keepdims=0), op.ArgMin(costs, axis=2, keepdims=0)
    _, gone = op.TopK(cost, op.Reshape(r, [1]), axis=1, largest=0, sorted=1)
    # What stays, in order: the places that are not zero, row by row; as many in each row.
    stayed = op.ScatterElements(
        op.Expand(integer(1), op.Shape(cost)), gone, op.Expand(integer(0), op.Shape(gone)), axis=1
    )
    samples = op.Shape(x, start=0, end=1)
    left = op.Sub(op.Shape(cost, start=1, end=2), op.Reshape(r, [1]))
    stays = op.Reshape(op.Gather(op.NonZero(stayed), integer(1)), op.Concat(samples, left, axis=0), allowzero=1)
    first = op.Mul(op.Range(integer(0), op.Squeeze(samples), integer(1)), op.Squeeze(op.Shape(cost, start=1, end=2)))
    flat_a = op.Reshape(a, [-1, width(x)])

    def rows(index: Value) -> Value:
        return op.Gather(flat_a, op.Add(index, op.Unsqueeze(first, [1])))

    places = op.Range(integer(0), op.Squeeze(op.Shape(b, start=1, end=2)), integer(1))
    into = op.Unsqueeze(op.GatherElements(partner, gone, axis=1), [1])
    joins = op.Cast(op.Equal(op.Unsqueeze(places, [0, 2]), into), to=FLOAT)
    weights = op.Mul(joins, op.Unsqueeze(op.GatherElements(size_a, gone, axis=1), [1]))  # (B, T_b, r)
    sizes_b = op.Add(size_b, op.ReduceSum(weights, [2], keepdims=0))
    sums = op.Add(op.Mul(b, op.Unsqueeze(size_b, [2])), op.MatMul(weights, rows(gone)))
    merged_b = op.Div(sums, op.Unsqueeze(sizes_b, [2]))
    out = op.Concat(op.Slice(x, [0], [prefix], [1]), rows(stays), merged_b, axis=1)
    kept = op.GatherElements(size_a, stays, axis=1)
    return out, op.Concat(op.Slice(sizes, [0], [prefix], [1]), kept, sizes_b, axis=1)


def merge_neighbours(x: Value, sizes: Value, r: Value) -> tuple[Value, Value]:
    """`merge_pairs.neighbours` and `fold` of x (B, T, D), sizes (B, T) by r () pairs, none of the sizes 0.

    A token that stays is a sum over itself and the two beside it, of weight 0 where they do not go into it.
    """
    one = array(np.float32(1))
    left, right = _but_last(sizes), _but_first(sizes)
    squares = op.ReduceSumSquare(op.Sub(_but_first(x), _but_last(x)), [2], keepdims=0)
    apart = op.Mul(squares, op.Div(op.Mul(left, right), op.Add(left, right)))
    beside = op.Pad(apart, integers(0, 1, 0, 1), array(np.float32(np.inf)))
    before, behind = _but_last(beside), _but_first(beside)
    places = op.Range(integer(0), op.Squeeze(op.Shape(x, start=1, end=2)), integer(1))
    odd = op.Equal(op.Mod(places, integer(2)), integer(1))
    cost = op.Where(odd, array(np.float32(np.inf)), op.Min(before, behind))
    _, gone = op.TopK(cost, op.Reshape(r, [1]), axis=1, largest=0, sorted=0)
    goes = op.ScatterElements(op.Mul(sizes, array(np.float32(0))), gone, op.Expand(one, op.Shape(gone)), axis=1)
    back = op.Mul(goes, op.Cast(op.Less(before, behind), to=FLOAT))
    from_before = op.Pad(_but_last(op.Mul(op.Sub(goes, back), sizes)), integers(0, 1, 0, 0))
    from_behind = op.Pad(_but_first(op.Mul(back, sizes)), integers(0, 0, 0, 1))
    together = op.Add(sizes, op.Add(from_before, from_behind))
    sample, place = op.Split(op.NonZero(op.Sub(one, goes)), num_outputs=2, axis=0)  # of what stays, in order
    shape = op.Concat(op.Shape(x, start=0, end=1), op.Sub(op.Shape(x, start=1, end=2), op.Reshape(r, [1])), axis=0)
    here = op.Reshape(op.Add(op.Mul(sample, op.Shape(x, start=1, end=2)), place), [-1])
    flat, last = op.Reshape(x, [-1, width(x)]), op.Sub(op.Size(sizes), integer(1))

    def part(weight: Value, index: Value) -> Value:
        share = op.Gather(op.Reshape(op.Div(weight, together), [-1]), here)
        return op.Mul(op.Gather(flat, index), op.Unsqueeze(share, [1]))

    at_before, at_behind = op.Max(op.Sub(here, integer(1)), integer(0)), op.Min(op.Add(here, integer(1)), last)
    out = op.Add(part(sizes, here), op.Add(part(from_before, at_before), part(from_behind, at_behind)))
    whole = op.Concat(shape, integers(width(x)), axis=0)
    kept = op.Gather(op.Reshape(together, [-1]), here)
    return op.Reshape(out, whole, allowzero=1), op.Reshape(kept, shape, allowzero=1)


def _but_last(x: Value) -> Value:
    return op.Slice(x, [0], [-1], [1])


def _but_first(x: Value) -> Value:
    return op.Slice(x, [1], [END], [1])


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.acmize.merge.default: merge,
    torch.ops.acmize.merge_neighbours.default: merge_neighbours,
}
