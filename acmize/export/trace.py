"""One graph of a converted model in which the budget is an input: what all exported files are made of.

In Python, `set_budget` turns the dial and writes the merging schedule before a forward. Here both are computed from the
budget inside the graph, by the same rules; the adaptive products and the merging of tokens are the operators of
`torch.ops.acmize`, whose widths and numbers of tokens are known at run time alone.

Shapes: B samples, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from acmize.cost import evaluating
from acmize.decision import Decision
from acmize.errors import AcmizeError
from acmize.gates import gates_of
from acmize.hosts_speech import encoder_path, example_speech, has_fixed_length, is_speech
from acmize.methods.acm import AcmConfig
from acmize.methods.token_merging import hooks_of
from acmize.phases.calibrate import Calibration
from acmize.plan import Merging
from acmize.recording import AdaptiveModule, recorded_by
from acmize.registry import method_for

EXAMPLE_FRAMES = 50  # of the utterance that is traced: the graph takes any number


class AnyBudget(nn.Module):
    """A converted model as a function of an input and a budget; budgets out of the plan's range are clamped to it.

    Args:
        model: adaptive, see `hub.Adaptive`; used as it is, and left as it was. Of a speech-to-text model, the encoder.
        compute: also return what each sample cost.
    """

    def __init__(self, model: Any, compute: bool = False) -> None:
        super().__init__()
        self.model, self.plan, self.compute = part_of(model), model.plan, compute
        self.calibration, self.range = model.calibration, budget_range(model)

    def forward(self, x: Tensor, budget: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """X (B, ...), budget () -> the part's output, and with `compute` the share of the dense MACs it took, (B,)."""
        share = budget.double().clamp(*self.range)  # as Python computes: what is rounded below must not differ
        dial = dial_at(self.calibration, share)
        buffers: dict[str, Tensor] = {}
        names = {id(m): name for name, m in self.model.named_modules()}
        for gate in gates_of(self.model):
            buffers[f"{names[id(gate)]}.dial"] = dial.to(gate.dial.dtype)
            buffers[f"{names[id(gate)]}.price"] = gate.price_at(dial).to(gate.price.dtype)
        merging, schedule = self.plan.merging, []
        if merging is not None:
            schedule = schedule_at(merging, share)
        with (
            merging_by(self.model, schedule, merging and AnyLength(merging)),
            recorded_by(self.model if self.compute else nn.Identity(), _Spent(x)) as spent,
        ):
            out = output_of(torch.func.functional_call(self.model, buffers, (x,)))
        if not self.compute:
            return out
        macs, whole = self.plan.account(spent.macs, spent.tokens)
        if merging is not None:
            if merging.neighbours:
                merging, schedule = AnyLength(merging).at(spent.tokens[""], schedule)
            macs = macs - merging.saved(schedule)
        return out, (macs / whole).float()


def part_of(model: Any) -> nn.Module:
    """What is exported of a model: all of it, or the encoder of a speech-to-text model."""
    return model.get_submodule(encoder_path(model)) if is_speech(model) else model


def output_of(found: Any) -> Tensor:
    """What a model answers: a tensor, or logits or hidden states of an output of transformers."""
    if isinstance(found, Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


class _Spent:
    """In the place of a `Recorder`: MACs alone, by operators that can be exported.

    Attributes:
        macs: (samples,) of the sites and their gates.
        tokens: entry -> tokens a sample; "" -> tokens before any were merged, where they are frames.
    """

    def __init__(self, x: Tensor) -> None:
        self.samples, self.macs, self.tokens = x.shape[0], x.new_zeros(x.shape[0]), {}

    def add(self, module: AdaptiveModule, x: Tensor, decision: Decision) -> None:
        """Called by the adaptive modules."""
        each = (module.macs(decision).sum(-1) + sum(module.gate.gate_macs)).reshape(self.samples, -1)
        self.macs = self.macs + each.sum(1)
        self.tokens |= dict.fromkeys(module.names, each.shape[1])


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
    return [table_at(pairs, budget) if len(set(pairs)) > 1 else pairs[0] for pairs in columns]


@dataclass(frozen=True)
class AnyLength:
    """In the place of a plan's `Merging` where frames are merged: stretches a schedule of tensors to any length."""

    merging: Merging

    def at(self, tokens: int | Tensor, schedule: Sequence[int | Tensor]) -> tuple[Merging, list[int | Tensor]]:
        """`Merging.at` of a length and of numbers that are known at run time alone.

        What a bisection finds in Python, the smallest share in thousandths that saves enough, is found by trying all of
        them at once. Numbers are whole, in double precision, until they are returned.
        """
        length = tokens if isinstance(tokens, Tensor) else torch.scalar_tensor(tokens, dtype=torch.float64)
        near, length = self.merging, length.double()
        far: Any = replace(near, tokens=length)
        shares = torch.tensor([k / 1000 for k in range(2001)], dtype=torch.float64) * length / near.tokens
        left, pairs = length - near.prefix, []
        for r in schedule:
            pairs.append(torch.minimum((shares * r).round(), (left / 2).floor()))
            left = left - pairs[-1]
        wanted = torch.as_tensor(near._saved(schedule, near.linear_macs)).double() / near._cost() * far._cost()
        first = (far._saved(pairs, near.linear_macs)[:-1] < wanted).sum()
        same = length == near.tokens
        return far, [torch.where(same, r, p[first].long()) for r, p in zip(schedule, pairs, strict=True)]


def table_at(values: Sequence[int], budget: Tensor) -> Tensor:
    """The value () for a budget (), of one for each thousandth from 0 to 1."""
    return torch.tensor(values)[(budget * 1000).round().long()]


@contextmanager
def merging_by(model: nn.Module, schedule: Sequence[int | Tensor], merging: AnyLength | None = None) -> Iterator[None]:
    """Merge by this schedule inside the context, stretched by `merging`; what was in force comes back after it."""
    hooks = hooks_of(model)
    before = [(hook.r, hook.merging) for hook in hooks]
    for hook, r in zip(hooks, schedule or [0] * len(hooks), strict=True):
        hook.r, hook.merging = r, merging
    try:
        yield
    finally:
        for hook, old in zip(hooks, before, strict=True):
            hook.r, hook.merging = old


def trace(model: Any, *, fused_attention: bool = True, samples: int = 2, compute: bool = False) -> ExportedProgram:
    """The program (x, budget) -> output, for any number of samples, of any length where the model takes them.

    Args:
        model: adaptive, on the CPU; left as it was.
        fused_attention: keep one operator for attention; ONNX cannot break it up once tokens are merged.
        samples: in the example that is traced.
        compute: also return what each sample cost, a share of the dense MACs, (B,).
    """
    check_exportable(model)
    x, free = torch.zeros(samples, *model.plan.input_size), {0: Dim.DYNAMIC}
    if is_speech(model):
        one = example_speech(model, EXAMPLE_FRAMES).tensors[model.main_input_name]
        x = one.expand(samples, *one.shape[1:]).clone()
        free |= {} if has_fixed_length(model) else {1: Dim.DYNAMIC}
    with evaluating(model), _attention(model, fused_attention):
        program = AnyBudget(model, compute).eval()
        return torch.export.export(program, (x, torch.tensor(0.75)), dynamic_shapes=(free, None))


@contextmanager
def _attention(model: Any, fused: bool) -> Iterator[None]:
    """Switch attention to products of matrices inside the context, unless `fused`; of speech, if frames are merged."""
    layers: list[Any] = [] if fused else [m for m in model.modules() if getattr(m, "fused_attn", False)]  # of timm
    speech = not fused and is_speech(model) and model.plan.merging is not None
    before = model.config._attn_implementation if speech else None
    for layer in layers:
        layer.fused_attn = False
    if speech:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True
        if speech:
            model.set_attn_implementation(before)


def check_exportable(model: Any) -> None:
    """Raise unless one graph can serve every input of this model.

    Raises:
        AcmizeError: a method without operators of its own, a model that is not on the CPU.
    """
    if not isinstance(model.plan.config, AcmConfig):
        name = method_for(model.plan.config).name
        raise AcmizeError(f"export: found method {name}, expected acm; other methods run in Python alone so far")
    device = next(model.parameters()).device.type
    if device != "cpu":
        raise AcmizeError(f"export: found a model on {device}, expected cpu; move it there with model.cpu()")
