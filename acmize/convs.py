"""Convolutions with what follows them in one call of oneDNN: inference on a CPU.

    y = act(norm(conv(x)) + residual)

The norm is folded into the weights, sum and activation are applied while the output is written, tensors are channels
last, and weights are kept in the order in which oneDNN reads them. Three of four tensors that a plain network writes
are never written.

Shapes: B samples, D input and O output channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from acmize import ops
from acmize.products import POST_OPS, act_name, has_onednn

# oneDNN chooses the order of weights by the shape of the input; that for 16 samples serves 1 to 64 of them, while
# weights that were ordered for no shape can be ordered again, slowly, at every call.
ORDERED_FOR = 16
NO_POST = ("none", [], "")
_POINTWISE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_CONV: Any = getattr(_POINTWISE, "default", None)
_CONV_ADD: Any = getattr(_POINTWISE, "binary", None)


def usable(x: Tensor) -> bool:
    """Whether images x (B, D, H, W) can be convolved so: plain fp32 on a CPU, no gradients, nothing compiled."""
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.dim() == 4
        and ops.pick_backend(x) == "sorted"
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and has_onednn()
    )


# --- what follows a convolution -------------------------------------------------------------------------------


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.LeakyReLU, nn.Tanh)


def post_op(act: Any) -> tuple[str, list[float], str] | None:
    """OneDNN's (name, scalars, algorithm) for an activation module; None for one that it does not apply."""
    if type(act) is nn.ReLU6:
        return "hardtanh", [0.0, 6.0], ""
    if type(act) is nn.Hardswish:
        return "hardswish", [], ""
    found = POST_OPS.get(act_name(act) or "")
    return None if found is None else (found[0], [], found[1])


@dataclass(frozen=True, eq=False)
class Tail:
    """What follows a convolution: y -> act(norm(y) + residual).

    Attributes:
        norm: a BatchNorm in eval mode, or None.
        act: an elementwise module, or None.
    """

    norm: Any = None
    act: nn.Module | None = None

    def plain(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same by the modules themselves."""
        if self.norm is not None:  # of timm's BatchNormAct2d the norm alone: its activation is ours
            n = self.norm
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, training=False, eps=n.eps)
        if residual is not None:
            y = y + residual
        return y if self.act is None else self.act(y)


NO_TAIL = Tail()


def scale_and_shift(norm: Any) -> tuple[Any, Any]:
    """What a BatchNorm in eval mode does to each channel, y -> scale * y + shift, (O,) each; None, None without one."""
    if norm is None:
        return None, None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return scale, (0 if norm.bias is None else norm.bias) - scale * norm.running_mean


def folded(weight: Tensor, bias: Tensor | None, scale: Any, shift: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (O, ...) and bias (O,) of a layer with the norm behind it, of which these are scale and shift."""
    if scale is None:
        return weight, bias
    bias = shift if bias is None else scale * bias + shift
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bias


# --- the convolution ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; `same` pads as TensorFlow does, by the size of the input."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    same: bool

    @staticmethod
    def of(conv: nn.Conv2d, groups: int | None = None) -> Geometry | None:
        """That of a layer; None if oneDNN is not given its kind: other padding than zeros, or by name."""
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return None
        same = isinstance(conv, Conv2dSame)
        return Geometry(conv.stride, conv.padding, conv.dilation, groups or conv.groups, same)

    def pad(self, x: Tensor, kernel: Sequence[int]) -> tuple[Tensor, list[int]]:
        """(input, padding): what oneDNN cannot pad, more on one side than on the other, is padded here."""
        if not self.same:
            return x, list(self.padding)
        need: Any = [get_same_padding(*n) for n in zip(x.shape[2:], kernel, self.stride, self.dilation, strict=True)]
        if all(n % 2 == 0 for n in need):
            return x, [n // 2 for n in need]
        (h, w) = need
        return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)), [0, 0]


class FusedConv:
    """act(conv(x) + residual) in one call, norms folded already.

    Args:
        weight: (O, D / groups, kh, kw).
        bias: (O,) or None.
        geometry: of the layer.
        act: elementwise module or None; what oneDNN cannot apply is called.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, act: nn.Module | None = None) -> None:
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.detach().clone()
        self.geometry, self.act = geometry, act
        post = NO_POST if act is None else post_op(act)
        self.post, self.after = post or NO_POST, None if post else act
        self.sum_post, self.after_sum = ("relu", None) if type(act) is nn.ReLU else (None, act)
        self.ordered: dict[Sequence[int], tuple[Any, ...]] = {}  # by the size of the input

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """X (B, D, H, W), residual (B, O, h, w) -> (B, O, h, w); fastest channels last."""
        padding = self.geometry.padding
        if self.geometry.same:
            x, padding = self.geometry.pad(x, self.weight.shape[2:])
        weight, place, out = self.ordered.get(x.shape[1:]) or self._order(x, padding)
        if residual is None:
            y = _CONV(x, weight, self.bias, *place, *self.post)
            return y if self.after is None else self.after(y)
        if residual.shape[1:] == out and residual.size(0) == x.size(0):
            y = _CONV_ADD(x, residual, weight, self.bias, *place, "add", 1.0, self.sum_post, [], "")
            return y if self.after_sum is None else self.after_sum(y)
        y = _CONV(x, weight, self.bias, *place, *NO_POST) + residual  # broadcast
        return y if self.act is None else self.act(y)

    def _order(self, x: Tensor, padding: Sequence[int]) -> tuple[Any, ...]:
        g, kernel = self.geometry, self.weight.shape[2:]
        place = (list(padding), list(g.stride), list(g.dilation), g.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *place, [ORDERED_FOR, *x.shape[1:]])
        axes = zip(x.shape[2:], padding, g.dilation, kernel, g.stride, strict=True)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes]
        self.ordered[x.shape[1:]] = found = weight, place, torch.Size((len(self.weight), *size))
        return found
