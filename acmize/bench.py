"""`acmize bench`: milliseconds of an adaptive model beside the dense one, and of the primitives alone.

Gates decide from data, so one tensor run again and again would time one set of choices: every call gets another batch
of real inputs. Dense and adaptive take turns on the same batch, so that whatever else the machine does falls on both,
and the fastest form of the dense model (eager, compiled, eager with the products of `ops` and the convolutions of
`fusion`) is the one to beat: a faster library is no merit of ours.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.api import dense_from
from acmize.cost import evaluating
from acmize.data import ImageSet, open_images
from acmize.environment import peak_bytes
from acmize.errors import AcmizeError
from acmize.fusion import fuse_
from acmize.gates import gates_of
from acmize.hub import build_base
from acmize.layers import fast_products_
from acmize.phases.calibrate import realised
from acmize.quickstart_model import digits

log = logging.getLogger("acmize")

BATCH_SIZES = (1, 8, 32)
REPEATS, WARMUP = 30, 8  # oneDNN compiles a kernel for each shape it meets first
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_DATA = "acmize_vit_digits"  # the one architecture whose inputs the package carries


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how often calls are timed.

    Attributes:
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16", of weights and inputs.
        threads: of PyTorch's operators; None leaves them as they are.
        repeats: timed calls of each cell of the table, after `WARMUP` others.
        seed: of the order of inputs, and of what is drawn.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    repeats: int = REPEATS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise AcmizeError(f"dtype: found {self.dtype!r}, expected float32 or bfloat16; choose one of them")
        check_device(self.device)
        for name, value in (("threads", self.threads), ("repeats", self.repeats)):
            if value is not None and value < 1:
                raise AcmizeError(f"{name}: found {value}, expected at least 1; leave it out for the default")

    def generator(self) -> torch.Generator:
        """A fresh generator of the seed."""
        return torch.Generator().manual_seed(self.seed)

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, in the dtype if it is of floats."""
        return tensor.to(self.device, DTYPES[self.dtype] if tensor.is_floating_point() else None)

    def described(self) -> dict[str, Any]:
        """What every result says of where it was measured."""
        return {"device": self.device, "threads": torch.get_num_threads(), "dtype": self.dtype}


def check_device(name: str) -> None:
    """Raise unless the device is there.

    Raises:
        AcmizeError: neither cpu nor cuda, or no GPU.
    """
    if name not in ("cpu", "cuda"):
        raise AcmizeError(f"device: found {name!r}, expected cpu or cuda; choose one of them")
    if name == "cuda" and not torch.cuda.is_available():
        raise AcmizeError("device: found no GPU that PyTorch can use, expected one for cuda; use --device cpu")


# --- timing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Something to time: `run` takes an input; `prepare` comes before it, untimed."""

    run: Callable[[Any], object]
    prepare: Callable[[], None] | None = None


def interleaved(
    calls: Mapping[str, Call], inputs: Iterable[Any], *, warmup: int = WARMUP, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every call on every input; an input goes through all calls before the next one comes.

    Args:
        calls: name -> call. Their order turns by one every second input and is reversed at every other one, so that
            none always follows the same.
        inputs: one a round.
        warmup: first rounds that are run and not counted.
        device: on "cuda" the clock waits for the device.

    Returns:
        Name -> seconds, in the order of the inputs.
    """
    names, seconds = list(calls), {name: [] for name in calls}
    for number, item in enumerate(inputs):
        first = number // 2 % len(names)
        turned = names[first:] + names[:first]
        for name in reversed(turned) if number % 2 else turned:
            call = calls[name]
            if call.prepare is not None:
                call.prepare()
            spent = _timed(call.run, item, device)
            if number >= warmup:
                seconds[name].append(spent)
    return seconds


def draws(count: int, size: int, rounds: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of `size` of `count` inputs, drawn anew for each round."""
    return [torch.randperm(count, generator=generator)[:size] for _ in range(rounds)]


def _timed(run: Callable[[Any], object], item: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(item)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p5, p50, p95 and p99 in milliseconds, linear between samples."""
    found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.05, 0.5, 0.95, 0.99]).double())
    return dict(zip(("p5", "p50", "p95", "p99"), (1e3 * found).tolist(), strict=True))


def linear_fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float] | None:
    """Least squares y = intercept + slope * x, and r2; None with fewer than three points or all at one x."""
    if len(xs) < 3 or len(set(xs)) < 2:
        return None
    slope, intercept = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((y - mean) ** 2 for y in ys)
    return {"intercept": intercept, "slope": slope, "r2": 1 - left / spread if spread else 1.0}


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch's operators use so many threads inside; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_mb(run: Callable[[], object], device: str) -> float:
    """Megabytes (1e6 bytes) that a call needs at its peak beyond what is held before it.

    On a GPU as PyTorch's allocator counts them. On Linux by resetting the kernel's record of the process's largest
    resident size; elsewhere by how far the call raises that record, which says 0 after a larger call.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = _fresh_peak()
    run()
    return max(peak_bytes() - before, 0) / 1e6


def _fresh_peak() -> int:
    """Bytes resident, after the record of their peak has been set back to it where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would hide what the call needs
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


# --- models ---------------------------------------------------------------------------------------------------


def bench_saved(
    model: Any,
    data: Any = None,
    *,
    weights: str | Path | None = None,
    budgets: Sequence[float] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    setting: Setting | None = None,
    limit: int = 256,
    compiled: bool = True,
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
        compiled: whether `torch.compile` of the dense model takes part.

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
    compiled: bool = True,
) -> dict[str, Any]:
    """Time an adaptive model at each budget and batch size beside its dense one; both are left as they were.

    Args:
        model: adaptive, see `hub.Adaptive`.
        dense: the model it was made from; its weights do not matter.
        images: (N, C, H, W) real inputs.
        budgets: by default those in the model's results, else the one it is set to.
        batch_sizes: images in a call.
        setting: device, dtype, threads, repeats, seed.
        compiled: whether `torch.compile` of the dense model takes part (it takes minutes on few cores).

    Returns:
        {"device", "threads", "dtype", "results", "fit"}. A result has model, batch_size, budget, macs_ratio (of the
        very inputs that were timed), latency_ms of a batch (p5, p50, p95, p99), dense_latency_ms (the same of the
        fastest form, and "form"), dense_forms_ms (the median of each form), speedup of the medians, throughput in
        images a second, peak_memory_mb and dense_peak_memory_mb. A fit has intercept and slope of latency = intercept +
        slope * macs_ratio in milliseconds, and r2, for each batch size.

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
    compiled: bool,
) -> list[dict[str, Any]]:
    """The rows of one batch size: all budgets and all dense forms take turns."""
    drawn = draws(len(images), size, WARMUP + setting.repeats, generator)
    calls = {"eager": Call(dense), "eager, same products": Call(same_products(dense))}
    if compiled and (fast := compiled_form(dense, images[drawn[0]])) is not None:
        calls["compiled"] = Call(fast)
    forms = tuple(calls)
    for budget in shares:
        calls[f"{budget}"] = Call(model, lambda budget=budget: model.set_budget(budget))
    log.info("batch of %d: %d rounds of %d calls", size, len(drawn), len(calls))
    seconds = interleaved(calls, (images[index] for index in drawn), device=setting.device)
    times = {name: percentiles(spent) for name, spent in seconds.items()}
    form = min(forms, key=lambda name: times[name]["p50"])
    timed, rows = torch.cat(drawn[WARMUP:]), []
    for budget, share in shares.items():
        model.set_budget(budget)
        batch, mine = images[drawn[0]], times[f"{budget}"]
        rows.append(
            {
                "model": model.base["architecture"],
                "batch_size": size,
                "budget": budget,
                "macs_ratio": share[timed].mean().item(),
                "latency_ms": mine,
                "dense_latency_ms": {**times[form], "form": form},
                "dense_forms_ms": {name: times[name]["p50"] for name in forms},
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


def compiled_form(dense: nn.Module, example: Tensor) -> Callable[[Tensor], object] | None:
    """The dense model compiled for this very shape, or None, with a note, where it cannot be."""
    log.info("compiling the dense model for a batch of %d; --no-compile leaves it out", len(example))
    try:
        made = torch.compile(dense, dynamic=False)
        made(example)
    except Exception as error:  # any kind: a compiler that is missing, an operator it does not know
        first = (str(error).strip().splitlines() or [""])[0]
        log.warning("dense is eager only: torch.compile failed (%s: %s)", type(error).__name__, first)
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


# --- the primitives -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpShape:
    """Sizes of the primitives; by default those of ViT-B.

    Attributes:
        dim: width of a token.
        hidden: units of the MLP.
        heads: of the attention.
    """

    dim: int = 768
    hidden: int = 3072
    heads: int = 12


@dataclass(frozen=True)
class _Op:
    """A primitive: dense and sparse call of an item (x, choices (groups, M)), and the bounds of its learners."""

    dense: Callable[[Any], object]
    sparse: Callable[[Any], object]
    bounds: tuple[int, ...]
    groups: int


def bench_ops(
    setting: Setting | None = None,
    *,
    shape: OpShape | None = None,
    tokens: Sequence[int] = (197, 1576),
    learners: Sequence[int] = (4, 8, 16),
) -> dict[str, Any]:
    """Time the primitives of `ops` alone: random widths, one half on average, new ones each call.

    The MLP (`ops.mlp`) is set beside fc1, GELU and fc2; the projections (`ops.expand` for q, k and v, each with a width
    of its own, and `ops.contract`) beside a fused qkv and an output projection; on the backend that is the default
    there, and with what it takes to sort.

    Returns:
        {"device", "threads", "dtype", "ops"}. An op has op, tokens, learners, macs_ratio, latency_ms, dense_latency_ms
        (with "form": "linear" layers, or the primitive at "full" width where that is faster), efficiency: dense
        median * macs_ratio / sparse median, 1 where every MAC left out is time saved, and efficiency_linear: the same
        with the median of PyTorch's linear layers.
    """
    setting, shape = setting or Setting(), shape or OpShape()
    generator, rows = setting.generator(), []
    with threads(setting.threads), torch.inference_mode():
        for count in tokens:
            for number in learners:
                for name, make in (("mlp", _mlp_op), ("projections", _projections_op)):
                    log.info("%s: %d tokens, %d learners", name, count, number)
                    op = make(shape, number, setting, generator)
                    row = {"op": name, "tokens": count, "learners": number}
                    rows.append({**row, **_bench_op(op, count, shape.dim, setting, generator)})
        told = setting.described()
    return {**told, "ops": rows}


def _bench_op(op: _Op, tokens: int, dim: int, setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    bounds, shares = torch.tensor(op.bounds, dtype=torch.float64), []

    def item() -> tuple[Tensor, Tensor]:
        choice = torch.randint(0, len(op.bounds), (op.groups, tokens), generator=generator)
        shares.append((bounds[choice] / bounds[-1]).mean().item())
        return setting.place(torch.randn(tokens, dim, generator=generator)), setting.place(choice)

    rounds = (item() for _ in range(WARMUP + setting.repeats))
    everything = setting.place(torch.full((op.groups, tokens), len(op.bounds) - 1))
    full = Call(lambda item: op.sparse((item[0], everything)))  # its products may be faster than those of `F.linear`
    calls = {"linear": Call(op.dense), "full": full, "sparse": Call(op.sparse)}
    seconds = interleaved(calls, rounds, device=setting.device)
    times = {name: percentiles(spent) for name, spent in seconds.items()}
    form = min(("linear", "full"), key=lambda name: times[name]["p50"])
    ratio, dense, sparse = statistics.fmean(shares[WARMUP:]), times[form], times["sparse"]
    over = {name: times[name]["p50"] * ratio / sparse["p50"] for name in (form, "linear")}
    told = {"macs_ratio": ratio, "latency_ms": sparse, "dense_latency_ms": {**dense, "form": form}}
    return {**told, "efficiency": over[form], "efficiency_linear": over["linear"]}


def _mlp_op(shape: OpShape, learners: int, setting: Setting, generator: torch.Generator) -> _Op:
    draw, act = _drawing(setting, generator), nn.GELU()
    up, bias = draw(shape.hidden, shape.dim), draw(shape.hidden)
    down, table = draw(shape.dim, shape.hidden), draw(learners + 1, shape.dim)
    columns = down.T.contiguous().T  # as `layers.Contract` keeps it
    bounds = ops.even_bounds(shape.hidden, learners)

    def dense(item: tuple[Tensor, Tensor]) -> Tensor:
        return F.linear(act(F.linear(item[0], up, bias)), down, table[-1])

    def sparse(item: tuple[Tensor, Tensor]) -> Tensor:
        x, (choice,) = item
        return ops.mlp(x, [(up, bias)], act, columns, table, choice, bounds)

    return _Op(dense, sparse, bounds, 1)


def _projections_op(shape: OpShape, learners: int, setting: Setting, generator: torch.Generator) -> _Op:
    draw, heads = _drawing(setting, generator), shape.heads
    qkv, bias, out = draw(3 * shape.dim, shape.dim), draw(3 * shape.dim), draw(shape.dim, shape.dim)
    table, columns = draw(learners + 1, shape.dim), out.T.contiguous().T
    parts = list(zip(qkv.chunk(3), bias.chunk(3), strict=True))
    bounds = ops.even_bounds(shape.dim // heads, learners)

    def dense(item: tuple[Tensor, Tensor]) -> Tensor:
        v = F.linear(item[0], qkv, bias)[:, -shape.dim :]
        return F.linear(v, out, table[-1])

    def sparse(item: tuple[Tensor, Tensor]) -> Tensor:
        x, choices = item
        _, _, v = (ops.expand(x, w, b, c, bounds, heads) for c, (w, b) in zip(choices[:3], parts, strict=True))
        return ops.contract(v, columns, table, choices[3], bounds, heads)

    return _Op(dense, sparse, bounds, 4)


def _drawing(setting: Setting, generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *size: setting.place(0.02 * torch.randn(*size, generator=generator))


__all__ = ["Call", "OpShape", "Setting", "bench_model", "bench_ops", "bench_saved", "interleaved", "linear_fit"]
