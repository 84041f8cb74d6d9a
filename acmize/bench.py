"""`acmize bench`: milliseconds of an adaptive model beside the dense one.

Gates decide from data, so one tensor run again and again would time one set of choices: every call gets another batch
of real inputs. Dense and adaptive take turns on the same batch, so that whatever else the machine does falls on both,
and the fastest form of the dense model (eager, compiled, eager with the products of `ops` and the convolutions of
`fusion`) is the one to beat: a faster library is no merit of ours.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize.api import dense_from
from acmize.cost import evaluating
from acmize.data import ImageSet, open_images
from acmize.errors import AcmizeError
from acmize.fusion import fuse_
from acmize.gates import gates_of
from acmize.hub import build_base
from acmize.layers import fast_products_
from acmize.phases.calibrate import realised
from acmize.quickstart_model import digits
from acmize.timing import DTYPES, WARMUP, Call, Setting, draws, interleaved, linear_fit, peak_mb, percentiles, threads

log = logging.getLogger("acmize")

BATCH_SIZES = (1, 8, 32)
OWN_DATA = "acmize_vit_digits"  # the one architecture whose inputs the package carries


def bench_saved(
    model: Any,
    data: Any = None,
    *,
    weights: str | Path | None = None,
    budgets: Sequence[float] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    setting: Setting | None = None,
    limit: int = 256,
    compiled: Collection[str] = ("dense",),
) -> dict[str, Any]:
    """Time a loaded adaptive model beside its dense one.

    Args:
        model: from `from_pretrained`.
        data: images, anything `datasets.load_dataset` opens; not needed by the digits model of the package.
        weights: safetensors file of the dense model; without it random weights, which are as fast.
        budgets: by default those it was saved with.
        batch_sizes: images in a call.
        setting: device, dtype, threads, repeats, seed.
        limit: images read.
        compiled: which of "dense" and "adaptive" are run by `torch.compile` as well.

    Returns:
        As of `bench_model`.

    Raises:
        AcmizeError: no data, no such budget, more images in a batch than there are.
    """
    setting = setting or Setting()
    images = real_images(model, data, limit=limit, seed=setting.seed)
    dense = dense_of(model, weights)
    return bench_model(model, dense, images, budgets, batch_sizes, setting, compiled)


def real_images(model: Any, data: Any, *, limit: int, seed: int = 0) -> Tensor:
    """(N, C, H, W) test images, else train images, through the model's own preprocessing; at most `limit`, at random.

    Raises:
        AcmizeError: none were given, and the package has none for this model; or they cannot be opened.
    """
    if data is None:
        architecture = model.base.get("architecture")
        if architecture != OWN_DATA:
            raise AcmizeError(
                f"data: found none, expected images like those {architecture} will see, since its gates decide from "
                "them; give --data DATA"
            )
        if limit < 1:
            raise AcmizeError(f"limit: found {limit}, expected at least 1; leave it out for the default")
        images, _ = digits("test")
        return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]]
    splits = dataclasses.replace(open_images(data, limit=limit, seed=seed), label_column=None)
    found = ImageSet.of(splits, "test" if splits.test is not None else "train", model)
    return torch.stack([found[i][0] for i in range(len(found))])


def dense_of(model: Any, weights: str | Path | None = None) -> nn.Module:
    """The dense model of an adaptive one.

    Args:
        model: adaptive.
        weights: a safetensors file, for transformers a folder; None: random ones from no global generator.
    """
    found = dense_from(model, weights)
    if found is not None:
        return found
    with torch.random.fork_rng(devices=[]):
        return build_base(model.base).eval()


def bench_model(
    model: Any,
    dense: nn.Module,
    images: Tensor,
    budgets: Sequence[float] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    setting: Setting | None = None,
    compiled: Collection[str] = ("dense",),
) -> dict[str, Any]:
    """Time an adaptive model at each budget and batch size beside its dense one; both are left as they were.

    Args:
        model: adaptive, see `hub.Adaptive`.
        dense: the model it was made from; its weights do not matter.
        images: (N, C, H, W) real inputs.
        budgets: by default those in the model's results, else the one it is set to.
        batch_sizes: images in a call.
        setting: device, dtype, threads, repeats, seed.
        compiled: which of "dense" and "adaptive" are run by `torch.compile` as well (it takes minutes on few cores, for
            the adaptive model minutes for each budget); the faster counts.

    Returns:
        {"device", "threads", "dtype", "results", "fit"}. A result has model, batch_size, budget, macs_ratio (of the
        very inputs that were timed), latency_ms of a batch (p5, p50, p95, p99), dense_latency_ms (the same of the
        fastest form, and "form"), forms_ms and dense_forms_ms (the median of each form), speedup of the medians,
        throughput in images a second, peak_memory_mb and dense_peak_memory_mb. A fit has intercept and slope of
        latency = intercept + slope * macs_ratio in milliseconds, and r2, for each batch size.

    Raises:
        AcmizeError: a budget out of reach, or more images in a batch than there are.
    """
    setting = setting or Setting()
    budgets = _budgets(model, budgets)
    for size in batch_sizes:
        if not 1 <= size <= len(images):
            raise AcmizeError(
                f"batch_size: found {size} for {len(images)} images, expected 1 to {len(images)}; make it smaller, or "
                "read more with --limit"
            )
    model, dense, images = placed(model, setting), placed(dense, setting), setting.place(images)
    generator, rows = setting.generator(), []
    with threads(setting.threads), evaluating(model, dense), torch.inference_mode():
        shares = {budget: _shares(model, images, budget) for budget in budgets}
        for size in batch_sizes:
            rows += _bench_batch(model, dense, images, shares, size, setting, generator, compiled)
        told = setting.described()
    return {**told, "results": rows, "fit": _fits(rows)}


def placed(model: Any, setting: Setting) -> Any:
    """A copy on the device and in the dtype; what gates weigh (price, costs, MACs) keeps its precision."""
    made = copy.deepcopy(model).to(setting.device)
    kept = [(gate, dict(gate.named_buffers(recurse=False))) for gate in gates_of(made)]
    made.to(DTYPES[setting.dtype])
    for gate, buffers in kept:
        for name, tensor in buffers.items():
            setattr(gate, name, tensor)
    return made


def _budgets(model: Any, asked: Sequence[float] | None) -> list[float]:
    saved = [row["budget"] for row in model.results.get("results", [])]
    budgets = list(asked or saved or ([] if model.budget is None else [model.budget]))
    if not budgets:
        raise AcmizeError("budget: found none saved with the model, expected at least one; give --budget B")
    for budget in budgets:
        model.plan.check_budget(budget)
    return budgets


def _shares(model: Any, images: Tensor, budget: float) -> Tensor:
    """(N,) executed MACs of each image over the dense model's; an image's never depend on its batch."""
    model.set_budget(budget)
    return realised(model, model.plan, images.split(32))


def _bench_batch(
    model: Any,
    dense: nn.Module,
    images: Tensor,
    shares: Mapping[float, Tensor],
    size: int,
    setting: Setting,
    generator: torch.Generator,
    compiled: Collection[str],
) -> list[dict[str, Any]]:
    """The rows of one batch size: all budgets and all dense forms take turns."""
    drawn = draws(len(images), size, WARMUP + setting.repeats, generator)
    calls = {"eager": Call(dense), "eager, same products": Call(same_products(dense))}
    if "dense" in compiled and (fast := compiled_form(dense, images[drawn[0]])) is not None:
        calls["compiled"] = Call(fast)
    dense_forms, own_forms = tuple(calls), {"eager": model}
    if "adaptive" in compiled and (fast := compiled_form(model, images[drawn[0]], "adaptive")) is not None:
        own_forms["compiled"] = fast  # once more for each budget, as warm-up
    for budget in shares:
        for form, run in own_forms.items():
            calls[f"{budget}, {form}"] = Call(run, lambda budget=budget: model.set_budget(budget))
    log.info("batch of %d: %d rounds of %d calls", size, len(drawn), len(calls))
    seconds = interleaved(calls, (images[index] for index in drawn), device=setting.device)
    times = {name: percentiles(spent) for name, spent in seconds.items()}
    form = min(dense_forms, key=lambda name: times[name]["p50"])
    timed, rows = torch.cat(drawn[WARMUP:]), []
    for budget, share in shares.items():
        model.set_budget(budget)
        batch, forms = images[drawn[0]], {name: times[f"{budget}, {name}"] for name in own_forms}
        mine = min(forms.values(), key=lambda spent: spent["p50"])
        rows.append(
            {
                "model": model.base["architecture"],
                "batch_size": size,
                "budget": budget,
                "macs_ratio": share[timed].mean().item(),
                "latency_ms": mine,
                "dense_latency_ms": {**times[form], "form": form},
                "forms_ms": {name: spent["p50"] for name, spent in forms.items()},
                "dense_forms_ms": {name: times[name]["p50"] for name in dense_forms},
                "speedup": times[form]["p50"] / mine["p50"],
                "throughput": 1e3 * size / mine["p50"],
                "peak_memory_mb": peak_mb(lambda batch=batch: model(batch), setting.device),
                "dense_peak_memory_mb": peak_mb(lambda batch=batch: dense(batch), setting.device),
            }
        )
    return rows


def same_products(dense: nn.Module) -> nn.Module:
    """A copy that shares the parameters, and multiplies and convolves as the adaptive model does."""
    shared = {id(t): t for t in (*dense.parameters(), *dense.buffers())}
    made = copy.deepcopy(dense, shared)
    fast_products_(made)
    fuse_(made)
    return made


def compiled_form(model: Any, example: Tensor, name: str = "dense") -> Callable[[Tensor], object] | None:
    """A model compiled for this very shape, or None, with a note, where it cannot be."""
    log.info("compiling the %s model for a batch of %d; --no-compile leaves it out", name, len(example))
    try:
        made: Any = torch.compile(model, dynamic=False)
        made(example)
    except Exception as error:  # any kind: a compiler that is missing, an operator it does not know
        first = (str(error).strip().splitlines() or [""])[0]
        log.warning("%s is eager only: torch.compile failed (%s: %s)", name, type(error).__name__, first)
        return None
    return made


def _fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    fits = []
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        mine = [row for row in rows if row["batch_size"] == size]
        fit = linear_fit([r["macs_ratio"] for r in mine], [r["latency_ms"]["p50"] for r in mine])
        if fit is not None:
            fits.append({"batch_size": size, **fit})
    return fits


__all__ = ["bench_model", "bench_saved"]
