"""MACs of a whole model, counted and analytic. FLOPs = 2 x MACs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acmize.inputs import forward


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the context; the training flags come back after it."""
    flags = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def count_macs(model: nn.Module, *inputs: Any) -> int:
    """MACs that one forward really does: matrix products, convolutions and attention, by `FlopCounterMode`.

    Args:
        model: any module.
        inputs: its positional inputs, or one `Inputs`.

    Returns:
        Multiply-adds of the whole forward.
    """
    return _counted(model, inputs).get_total_flops() // 2


@dataclass(frozen=True)
class Work:
    """What one sample costs at every module of a model, in one forward.

    Attributes:
        macs: path -> MACs, 0 where there is nothing to count.
        inputs: path of a module that ran -> shape of its first input.
        outputs: path of a module that ran -> shape of its output.
    """

    macs: Mapping[str, int]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


def measure_work(model: nn.Module, *inputs: Any) -> Work:
    """Run a model once on inputs of one sample and count what each of its modules does."""
    taken: dict[str, tuple[int, ...]] = {}
    given: dict[str, tuple[int, ...]] = {}

    def hook(path: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                taken[path], given[path] = tuple(args[0].shape), tuple(output.shape)

        return note

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path]
    try:
        counts = _counted(model, inputs).get_flop_counts()
    finally:
        for handle in handles:
            handle.remove()
    macs = {key.partition(".")[2]: sum(ops.values()) // 2 for key, ops in counts.items() if "." in key}
    return Work(macs=dict.fromkeys(taken, 0) | macs, inputs=taken, outputs=given)


def _counted(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCounterMode:
    """The counter after one forward of the model."""
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted())
    # The counter hooks the gradient of every input of a module; a parameter that is one (a pooling query) breaks it.
    learnt = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learnt:
            p.requires_grad_(False)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            forward(model, *inputs)
    finally:
        for p in learnt:
            p.requires_grad_(True)
    return counter


def _uncounted() -> dict[Any, Any]:
    """OneDNN's products and convolutions, which the counter does not know by itself."""
    ops, known = torch.ops.mkldnn, {"_linear_pointwise": _linear_flops, "_convolution_pointwise": _conv_flops}
    return {getattr(ops, name): count for name, count in known.items() if hasattr(ops, name)}


def _conv_flops(x: Any, second: Any, third: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Shapes of (x, weight, bias), or (x, what is added, weight): each output is a product with a channel's weights."""
    weight = third if third is not None and len(third) > 1 else second
    return 2 * math.prod(out_shape) * math.prod(weight) // out_shape[1]


def _linear_flops(x: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def tokens_at(model: nn.Module, names: list[str], *inputs: Any) -> dict[str, int]:
    """How many tokens (rows of its matrix product) each named linear layer sees in one forward."""
    modules, counts, handles = dict(model.named_modules()), {}, []

    def hook(name: str, channels_first: bool) -> Any:
        def count(_module: nn.Module, _args: Any, output: Tensor) -> None:
            width = output.shape[1] if channels_first else output.shape[-1]
            counts[name] = counts.get(name, 0) + output.numel() // width

        return count

    for name in names:
        module = modules[name]
        handles.append(module.register_forward_hook(hook(name, isinstance(module, (nn.Conv1d, nn.Conv2d)))))
    try:
        with evaluating(model):
            forward(model, *inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
