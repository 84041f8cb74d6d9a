"""`acmize compare`: an adaptive model beside its rivals, in one run on one machine and the same images.

    adaptive          the model at each budget
    masks alone       the same choices by the reference: all the work, then masks, as most published code does it
    token merging     the dense model with as many tokens merged as the budget asks for; it pays for no gates
    static width      the model's own learners, the same share for every token; it is charged for no gates
    dense             the model it was made from, in its fastest form
    smaller models    of timm, whose weights are given

Early exit is not among them: it needs exits that are trained, which no pretrained model has.

Milliseconds come from calls that take turns on the same images (see timing.py). Static width runs the adaptive model's
kernels, which sort tokens that need no sorting: a network really cut to these widths could be somewhat faster.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize.api import answers_of, dense_from
from acmize.bench import compiled_form, same_products
from acmize.controls import gates_share, merge_to, static_width
from acmize.cost import count_macs, evaluating
from acmize.errors import AcmizeError
from acmize.evaluate import Reference, evaluate_at, reference, top1
from acmize.gates import gates_of
from acmize.hosts import example_input
from acmize.images import Batches, images_to_test
from acmize.inputs import logits_of
from acmize.methods.token_merging import install_merging, set_schedule, why_not
from acmize.models import load_model
from acmize.ops import use_backend
from acmize.timing import WARMUP, Call, Setting, draws, interleaved, percentiles, threads

log = logging.getLogger("acmize")

BATCH_SIZES = (1, 8)
LEVEL = 0.01  # share of the dense MACs within which two models cost the same
BATCH = 32
TIMED = 256  # images that timed calls draw from: time needs fewer of them than accuracy


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row: a model as it is set, and what was measured of it.

    Attributes:
        name: of the method, or of the model.
        module: takes a batch of images.
        guess: (N,) predicted classes.
        row: model, budget, macs_ratio, accuracy, agreement; latency as it is measured.
        images: those of `compare_saved`, through the preprocessing of this model.
    """

    name: str
    module: nn.Module
    guess: Tensor
    row: dict[str, Any]
    images: Any = field(repr=False)


def compare_saved(
    model: Any,
    data: Any,
    *,
    weights: str | Path | None = None,
    against: Mapping[str, str | Path] | None = None,
    budgets: Sequence[float] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    setting: Setting | None = None,
    limit: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure an adaptive model and its rivals on the test images of `data`; the model is left as it was.

    Args:
        model: adaptive, of images.
        data: anything `datasets.load_dataset` opens.
        weights: safetensors file of the dense model.
        against: timm name -> safetensors file of a smaller model with the same classes.
        budgets: by default those the model was evaluated at.
        batch_sizes: images in a timed call.
        setting: device, dtype, threads, repeats, seed.
        limit: images at most.
        compiled: whether the dense model is timed compiled as well (minutes on few cores).

    Returns:
        {"samples", "split", device, threads, dtype, "rows", "verdicts", "left_out"}. A row has model, budget (None for
        models without), macs_ratio (of the dense MACs), accuracy (None without labels), agreement with the dense
        model, and latency, a list of {"batch_size", "p5", "p50", "p95", "p99"} in milliseconds of a batch.

    Raises:
        AcmizeError: weights that are missing, another number of classes, a budget out of reach, too large a batch.
    """
    setting = setting or Setting()
    if setting.dtype != "float32":
        raise AcmizeError(f"dtype: found {setting.dtype}, expected float32: accuracy is measured on the timed models")
    model = copy.deepcopy(model).to(setting.device)
    budgets = list(budgets or [row["budget"] for row in model.results.get("results", [])] or (0.5,))
    for budget in budgets:
        model.plan.check_budget(budget)
    dense = dense_from(model, weights)
    if dense is None:
        raise AcmizeError("weights: found none, expected those of the dense model, a rival itself; give --weights FILE")
    images, which, _ = images_to_test(data, model, limit=limit, seed=setting.seed)
    for size in batch_sizes:
        if not 1 <= size <= len(images):
            raise AcmizeError(f"batch_size: found {size}, expected 1 to {len(images)}, the images there are; change it")
    batches = Batches(images, BATCH, torch.device(setting.device))
    dense = dense.to(setting.device).eval()
    known = answers_of(model, dense, batches)
    with threads(setting.threads):
        found = [_plain("dense", dense, images, known, known, 1.0)]
        left_out = ["early exit: needs trained exits, which the pretrained model does not have"]
        for budget in sorted(budgets, reverse=True):
            found += _at_budget(model, dense, images, batches, known, budget)
        if not model.plan.entries:
            left_out.append("static width: this conversion merges tokens and has no sites to cut")
        if model.plan.merging is None:
            left_out.append(why_not(dense) or "token merging: this conversion merges none")
        for name, file in (against or {}).items():
            found.append(_other(name, file, model, data, known, setting, limit))
        for size in batch_sizes:
            _time(found, size, setting, compiled)
        told = setting.described()
    rows = [c.row for c in found]
    verdicts = verdicts_of(found, known.labels)
    return {"samples": len(known), "split": which, **told, "rows": rows, "verdicts": verdicts, "left_out": left_out}


# --- contestants ----------------------------------------------------------------------------------------------


def _at_budget(
    model: Any, dense: nn.Module, images: Any, batches: Batches, known: Reference, budget: float
) -> Iterator[Contestant]:
    """The adaptive model at a budget, and its rivals at the MACs that it really took."""
    log.info("budget %g", budget)
    plan = model.plan
    adaptive = _twin(model)
    adaptive.set_budget(budget)
    mine = _gated("adaptive", adaptive, plan, images, batches, known, budget)
    yield mine
    ratio = mine.row["macs_ratio"]
    if plan.merging is not None:
        merged = _twin(dense)
        install_merging(merged)
        reached = merge_to(merged, plan.merging, ratio, plan.macs_dense)
        found = _plain("token merging", merged, images, known, reference(merged, batches), reached)
        found.row["budget"] = budget
        yield found
    if not plan.entries:
        return
    masked = _Masked(adaptive)
    worked = count_macs(masked, example_input(dense)) / plan.macs_dense
    yield replace(
        mine,
        name="masks alone",
        module=masked,
        row={**mine.row, "model": "masks alone", "macs_ratio": worked, "latency": []},
    )
    static = _twin(model)
    set_schedule(static, ())
    spare = gates_share(static, plan)
    choose = static_width(static, plan, ratio + spare)
    for gate in gates_of(static):
        gate.choose = choose
    found = _gated("static width", static, plan, images, batches, known, budget)
    found.row["macs_ratio"] -= spare  # a width that is always the same needs no gate
    yield found


class _Masked(nn.Module):
    """An adaptive model by the masked reference."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        with use_backend("masked"):
            return self.model(x)


def _twin(model: Any) -> Any:
    """A copy that shares the parameters, with gates, hooks and buffers of its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _gated(
    name: str, module: Any, plan: Any, images: Any, batches: Batches, known: Reference, budget: float
) -> Contestant:
    with _guesses(module) as guesses:
        row = evaluate_at(module, plan, batches, known)
    kept = {key: row[key] for key in ("macs_ratio", "accuracy", "agreement")}
    told = {"model": name, "budget": budget, **kept, "latency": []}
    return Contestant(name=name, module=module, guess=torch.cat(guesses), row=told, images=images)


def _plain(
    name: str, module: nn.Module, images: Any, known: Reference, found: Reference, macs_ratio: float
) -> Contestant:
    """A model without gates, whose answers and MACs are known."""
    guess = found.logits.argmax(-1)
    row = {
        "model": name,
        "budget": None,
        "macs_ratio": macs_ratio,
        "accuracy": top1(found.logits, known.labels),
        "agreement": (guess == known.logits.argmax(-1)).double().mean().item(),
        "latency": [],
    }
    return Contestant(name=name, module=module, guess=guess, row=row, images=images)


def _other(
    name: str, file: str | Path, model: Any, data: Any, known: Reference, setting: Setting, limit: int | None
) -> Contestant:
    """Another model of timm on the same images, through its own preprocessing."""
    other = load_model(name, file).to(setting.device)
    classes = known.logits.shape[1]
    if getattr(other, "num_classes", classes) != classes:
        raise AcmizeError(f"--against {name}: found {other.num_classes} classes, expected {classes}; give another one")
    images, _, _ = images_to_test(data, other, limit=limit, seed=setting.seed)
    found = reference(other, Batches(images, BATCH, torch.device(setting.device)))
    ratio = count_macs(other, example_input(other)) / model.plan.macs_dense
    return _plain(name, other, images, known, found, ratio)


@contextmanager
def _guesses(module: nn.Module) -> Iterator[list[Tensor]]:
    """Predicted classes of every batch that a model is run on inside the context."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _x, out: kept.append(logits_of(out).argmax(-1).cpu()))
    try:
        yield kept
    finally:
        handle.remove()


# --- time -----------------------------------------------------------------------------------------------------


def _time(found: Sequence[Contestant], size: int, setting: Setting, compiled: bool) -> None:
    """Give every row its milliseconds of a batch; the dense model's are those of its fastest form."""
    drawn = draws(min(len(found[0].images), TIMED), size, WARMUP + setting.repeats, setting.generator())
    stacks: dict[int, Tensor] = {}
    for contestant in found:
        stacks.setdefault(id(contestant.images), setting.place(_stack(contestant.images)))
    calls = {f"{number}": _call(c.module, stacks[id(c.images)]) for number, c in enumerate(found)}
    dense, x = found[0].module, stacks[id(found[0].images)]
    forms = {"0": "eager", "same": "eager, same products"}
    calls["same"] = _call(same_products(dense), x)
    if compiled and (fast := compiled_form(dense, x[drawn[0]])) is not None:
        forms["compiled"], calls["compiled"] = "compiled", _call(fast, x)
    log.info("batch of %d: %d rounds of %d calls", size, len(drawn), len(calls))
    with evaluating(*(c.module for c in found)), torch.inference_mode():
        seconds = interleaved(calls, drawn, device=setting.device)
    times = {key: percentiles(spent) for key, spent in seconds.items()}
    best = min(forms, key=lambda key: times[key]["p50"])
    for number, contestant in enumerate(found):
        mine = {**times[best], "form": forms[best]} if number == 0 else times[f"{number}"]
        contestant.row["latency"].append({"batch_size": size, **mine})


def _call(module: Any, stack: Tensor) -> Call:
    return Call(lambda index: module(stack[index]))


def _stack(images: Any) -> Tensor:
    return torch.stack([images[i][0] for i in range(min(len(images), TIMED))])


# --- verdicts -------------------------------------------------------------------------------------------------


def verdicts_of(found: Sequence[Contestant], labels: Tensor) -> list[str]:
    """Where the adaptive model loses, in words; one line that says so where it does not.

    It loses to a rival that is more accurate at no more MACs (within `LEVEL`), and to one that is at least as accurate
    in less time. Without labels, agreement with the dense model stands for accuracy.
    """
    metric = "accuracy" if found[0].row["accuracy"] is not None else "agreement"
    said = []
    for mine in (c for c in found if c.name == "adaptive"):
        budget = f"budget {mine.row['budget']:g}"
        for rival in (c for c in found if c.name != "adaptive"):
            if rival.row["budget"] not in (None, mine.row["budget"]):
                continue
            ours, theirs = mine.row[metric], rival.row[metric]
            if theirs > ours and rival.row["macs_ratio"] <= mine.row["macs_ratio"] + LEVEL:
                chance = _chance(mine.guess, rival.guess, labels) if metric == "accuracy" else None
                told = "" if chance is None else f" (exact McNemar p = {chance:.2f})"
                said.append(
                    f"{budget}: loses to {rival.name} at {rival.row['macs_ratio']:.3f} of the MACs: "
                    f"{100 * ours:.1f} against {100 * theirs:.1f} % {metric}{told}"
                )
            for a, b in zip(mine.row["latency"], rival.row["latency"], strict=True):
                if theirs >= ours and b["p50"] <= a["p50"]:
                    said.append(
                        f"{budget}: slower than {rival.name}, which is no less accurate: {a['p50']:.1f} against "
                        f"{b['p50']:.1f} ms a batch of {a['batch_size']}"
                    )
    return said or ["no rival here wins at any budget: none is more accurate at equal MACs, or as accurate and faster"]


def _chance(a: Tensor, b: Tensor, labels: Tensor) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the images that one model alone has right."""
    only_a = int(((a == labels) & (b != labels)).sum())
    only_b = int(((b == labels) & (a != labels)).sum())
    trials, least = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(trials, k) for k in range(least + 1)) / 2**trials)


__all__ = ["Contestant", "compare_saved", "verdicts_of"]
