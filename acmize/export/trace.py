"""One graph of a converted model in which the budget is an input: what all exported files are made of.

In Python, `set_budget` turns the dial and writes the merging schedule before a forward. Here both are computed from the
budget inside the graph, by the same rules; the adaptive products and the merging of tokens are the operators of
`torch.ops.acmize`, whose widths and numbers of tokens are known at run time alone.

Shapes: B samples, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.gates import gates_of
from acmize.hosts_speech import is_speech
from acmize.methods.acm import AcmConfig
from acmize.methods.token_merging import hooks_of
from acmize.phases.calibrate import Calibration
from acmize.plan import Merging
from acmize.registry import method_for


class AnyBudget(nn.Module):
    """A converted model as a function of an input and a budget; budgets out of the plan's range are clamped to it.

    Args:
        model: adaptive, see `hub.Adaptive`; used as it is, and left as it was.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.range = budget_range(model)

    def forward(self, x: Tensor, budget: Tensor) -> Tensor:
        """X (B, C, H, W), budget () -> logits (B, classes)."""
        share = budget.double().clamp(*self.range)  # as Python computes: what is rounded below must not differ
        dial = dial_at(self.model.calibration, share)
        buffers: dict[str, Tensor] = {}
        names = {id(m): name for name, m in self.model.named_modules()}
        for gate in gates_of(self.model):
            buffers[f"{names[id(gate)]}.dial"] = dial.to(gate.dial.dtype)
            buffers[f"{names[id(gate)]}.price"] = gate.price_at(dial).to(gate.price.dtype)
        merging = self.model.plan.merging
        with merging_by(self.model, [] if merging is None else schedule_at(merging, share)):
            return torch.func.functional_call(self.model, buffers, (x,))


def budget_range(model: Any) -> tuple[float, float]:
    """The smallest and the largest budget that an exported model takes as they are."""
    return model.plan.budget_range[0], 1.0


def dial_at(calibration: Calibration, budget: Tensor) -> Tensor:
    """`Calibration.dial` of a tensor (): linear between the table's rows and clamped at its ends."""
    rows = list(zip(calibration.budgets, calibration.dials, strict=True))
    dial = torch.full_like(budget, rows[0][1])
    for (high, near), (low, far) in pairwise(rows):
        dial = dial + ((high - budget) / (high - low)).clamp(0, 1) * (far - near)
    return dial


def schedule_at(merging: Merging, budget: Tensor) -> list[int | Tensor]:
    """`Merging.schedule` of a tensor (): pairs to merge before each block, tensors () where the budget decides.

    The rule looks at budgets in thousandths, so the graph holds a table of all of them.
    """
    columns = list(zip(*(merging.schedule(b / 1000) for b in range(1001)), strict=True))
    row = (budget * 1000).round().long()
    return [torch.tensor(pairs)[row] if len(set(pairs)) > 1 else pairs[0] for pairs in columns]


@contextmanager
def merging_by(model: nn.Module, schedule: Sequence[int | Tensor]) -> Iterator[None]:
    """Merge by this schedule inside the context; the one in force comes back after it."""
    hooks = hooks_of(model)
    before = [hook.r for hook in hooks]
    for hook, r in zip(hooks, schedule or [0] * len(hooks), strict=True):
        hook.r = r
    try:
        yield
    finally:
        for hook, r in zip(hooks, before, strict=True):
            hook.r = r


def trace(model: Any, *, fused_attention: bool = True, samples: int = 2) -> ExportedProgram:
    """The program (x, budget) -> logits, for any number of samples.

    Args:
        model: adaptive, on the CPU; left as it was.
        fused_attention: keep timm's one operator for attention; ONNX cannot break it up once tokens are merged.
        samples: in the example that is traced.
    """
    check_exportable(model)
    example = (torch.zeros(samples, *model.plan.input_size), torch.tensor(0.75))
    with evaluating(model), _attention(model, fused_attention):
        return torch.export.export(AnyBudget(model).eval(), example, dynamic_shapes=({0: Dim.DYNAMIC}, None))


@contextmanager
def _attention(model: nn.Module, fused: bool) -> Iterator[None]:
    """Switch timm's attention layers to products of matrices inside the context, unless `fused`."""
    layers: list[Any] = [] if fused else [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True


def check_exportable(model: Any) -> None:
    """Raise unless one graph can serve every input of this model.

    Raises:
        AcmizeError: a speech model, a method without operators of its own, or a model that is not on the CPU.
    """
    if is_speech(model):
        raise AcmizeError(f"export: found {type(model).__name__}, a speech model; only images can be exported so far")
    if not isinstance(model.plan.config, AcmConfig):
        name = method_for(model.plan.config).name
        raise AcmizeError(f"export: found method {name}, expected acm; other methods run in Python alone so far")
    device = next(model.parameters()).device.type
    if device != "cpu":
        raise AcmizeError(f"export: found a model on {device}, expected cpu; move it there with model.cpu()")
