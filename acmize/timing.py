"""How calls are timed, and what memory they need: in turns on the same inputs, with percentiles in milliseconds."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acmize.environment import fresh_peak_bytes, keep_memory, peak_bytes
from acmize.errors import AcmizeError

REPEATS, WARMUP = 30, 8  # oneDNN compiles a kernel for each shape it meets first
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


@dataclass(frozen=True)
class Call:
    """Something to time: `run` takes an input; `prepare` comes before its turn, untimed."""

    run: Callable[[Any], object]
    prepare: Callable[[], None] | None = None


def interleaved(
    calls: Mapping[str, Call], inputs: Iterable[Any], *, warmup: int = WARMUP, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every call on every input; an input goes through all calls before the next one comes.

    Each timed call comes right after one of the same, run untimed on the input before where there are several: in
    service a model follows itself. After another one a small model is half as slow again, in caches full of the other's
    weights and code; and the first call after a budget was set makes anew what is kept of it. Freed memory is kept for
    the next tensors from here on (`keep_memory`), for all calls alike.

    Args:
        calls: name -> call. Their order turns by one every second input and is reversed at every other one, so that
            none always follows the same.
        inputs: one a round.
        warmup: first rounds that are run and not counted.
        device: on "cuda" the clock waits for the device.

    Returns:
        Name -> seconds, in the order of the inputs.
    """
    keep_memory()
    names, seconds, last = list(calls), {name: [] for name in calls}, None
    for number, item in enumerate(inputs):
        first = number // 2 % len(names)
        turned = names[first:] + names[:first]
        for name in reversed(turned) if number % 2 else turned:
            call = calls[name]
            if call.prepare is not None:
                call.prepare()
            if len(names) > 1:
                call.run(item if number == 0 else last)
            spent = _timed(call.run, item, device)
            if number >= warmup:
                seconds[name].append(spent)
        last = item
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

    On a GPU as PyTorch's allocator counts them. Else in a fresh thread, so that what a thread keeps from call to call
    counts too. On Linux by resetting the kernel's record of the process's largest resident size; elsewhere by how far
    the call raises that record, which says 0 after a larger call.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    inference = torch.is_inference_mode_enabled()

    def measured() -> float:
        with torch.inference_mode(inference):
            before = fresh_peak_bytes()
            run()
            return max(peak_bytes() - before, 0) / 1e6

    keep_memory(False)  # a tensor that is gone is gone: what is left counts
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(measured).result()
    finally:
        keep_memory()
