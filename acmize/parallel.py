"""Several processes as one: whose rows are whose, sums and means over all of them, one that writes.

Every process computes the same loss, that of the whole batch, from its own rows and from what the others tell it
(`gather`, `mean`, `total`). Its gradient is then the part that its own rows have in the loss, so gradients are summed
over processes, and no loss need be a mean over samples. With one process every function here is what its name says, on
the tensors themselves.

Processes come from a launcher (`torchrun`, `accelerate launch`); accelerate joins them. docs/scale.md has the rest.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acmize.errors import AcmizeError
from acmize.launched import MPI


class _State:
    idle = False  # this process runs rows of another one, for company, and adds nothing
    apart = False  # what is computed now is this process's own affair


_state = _State()


def join(device: torch.device) -> int:
    """Meet the processes that a launcher started, if any; returns how many there are.

    Raises:
        AcmizeError: the launcher was asked for several processes and started one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(name in os.environ for name in MPI):
        from accelerate import PartialState  # late: it takes a second

        met = dist.is_initialized()
        if device.type == "cuda" and not met:  # statistics lie on the CPU
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl")
        PartialState(cpu=device.type == "cpu")
        if not met:  # whoever met the others parts from them
            atexit.register(_leave)
    elif "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise AcmizeError(
            "accelerate launch --cpu: found one process, expected the several that were asked for (it starts them on "
            "a CPU only through mpirun, --mpirun_hostfile); use torchrun --nproc-per-node N -m acmize ..."
        )
    return processes()


def _leave() -> None:
    """Part from the other processes, while Python still runs.

    gloo's threads let go of tensors after the last call has returned; one that does so while the interpreter ends
    aborts the process ("terminate called without an active exception", pytorch/pytorch#179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def placed(device: str) -> torch.device:
    """A device by name; of several GPUs, the one of this process.

    Raises:
        AcmizeError: there is no GPU.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise AcmizeError(f"--device {device}: found no GPU that torch can use, expected one; use --device cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)


def processes() -> int:
    """How many processes work on this together."""
    return 1 if _state.apart or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if processes() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """A picklable value of this program, as the main process has it."""
    return from_owner(value, 0)


def from_owner(value: Any, owner: int) -> Any:
    """The same, as its owner has it."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=owner)
    return box[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if processes() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process counts as the only one: sums and means are its own."""
    before, _state.apart = _state.apart, True
    try:
        yield
    finally:
        _state.apart = before


# --- whose rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that this process runs; `idle` where it has none and runs one for company.

    Modules, and what waits for all processes inside them, run in step on every process, whatever it has to do.
    """

    batch: Any
    idle: bool = False

    def to(self, device: Any, **_: Any) -> Rows:
        """The same on a device."""
        return replace(self, batch=_each(self.batch, lambda part: part.to(device)))

    @contextmanager
    def counted(self) -> Iterator[Any]:
        """The batch; inside, an idle process adds nothing to any sum."""
        before, _state.idle = _state.idle, self.idle
        try:
            yield self.batch
        finally:
            _state.idle = before


def part(count: int) -> slice:
    """This process's share of `count` rows: contiguous, sizes that differ by one at most; perhaps none."""
    return slice(count * rank() // processes(), count * (rank() + 1) // processes())


def rows_of(batch: Any) -> Rows:
    """This process's rows of a batch that all have: a tensor, `Inputs`, or several of them with equal rows."""
    if processes() == 1:
        return Rows(batch)
    mine = part(len(batch[0] if isinstance(batch, list | tuple) else batch))
    idle = mine.start == mine.stop
    return Rows(_each(batch, lambda part: part[slice(0, 1) if idle else mine]), idle)


@dataclass(frozen=True)
class InStep:
    """This process's rows of each batch, from any batch on; see `in_step`."""

    batches: Any

    def __iter__(self) -> Iterator[Rows]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[Rows]:
        """Without reading those before it, where the batches can be begun anywhere."""
        if hasattr(self.batches, "starting_at"):
            return map(rows_of, self.batches.starting_at(number))
        stream = map(Rows, self.batches.own()) if hasattr(self.batches, "own") else map(rows_of, self.batches)
        for _ in islice(stream, number):
            pass
        return stream


def in_step(batches: Any) -> InStep:
    """This process's rows of each batch; a `Loader` reads no others."""
    return InStep(batches)


def spread(batches: Iterable[Any]) -> Iterator[Any]:
    """This process's batches: whole ones, in turns.

    For what is added up at the end, in any order. A batch is not divided: products of another shape are rounded
    otherwise, and an order that is found greedily among hundreds of units takes another course for 1e-7.
    """
    return islice(batches, rank(), None, processes())


def in_turns(batches: Iterable[Any]) -> Iterator[Any]:
    """As `spread`, where processes wait for each other in every turn: None where the last has none for this one."""
    number = -1
    for number, batch in enumerate(batches):
        if number % processes() == rank():
            yield batch
    if number % processes() < rank():
        yield None


def subset(data: Any) -> Any:
    """This process's contiguous share of a set that is indexed; what it yields, `gather` puts together in order."""
    if processes() == 1:
        return data
    if len(data) < processes():
        raise AcmizeError(f"data: found {len(data)} samples for {processes()} processes; give more, or start fewer")
    return torch.utils.data.Subset(data, range(len(data))[part(len(data))])


def _each(batch: Any, change: Any) -> Any:
    if isinstance(batch, list | tuple):
        return type(batch)(None if part is None else change(part) for part in batch)
    return change(batch)


# --- over all rows --------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows, ctx.own = len(x), 0 if _state.idle else len(x)
        counts = _counts([ctx.own], x.device)[:, 0].tolist()
        ctx.before = sum(counts[: rank()])
        sent = x.new_zeros(max(counts), *x.shape[1:])
        sent[: ctx.own] = x[: ctx.own]
        raw = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
        parts = [torch.empty_like(raw) for _ in counts]
        dist.all_gather(parts, raw.contiguous())
        return torch.cat([p.view(sent.dtype)[:n] for p, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        own = grad.new_zeros(ctx.rows, *grad.shape[1:])
        own[: ctx.own] = grad[ctx.before : ctx.before + ctx.own]
        return own


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.idle = _state.idle
        summed = torch.zeros_like(x) if ctx.idle else x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros_like(grads[0]) if ctx.idle else grads[0]


def _counts(own: Sequence[int], device: torch.device) -> Tensor:
    """(processes, len(own)) whole numbers of every process."""
    mine = torch.tensor(own, device=device)
    parts = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(parts, mine)
    return torch.stack(parts).cpu()


def gather(x: Tensor) -> Tensor:
    """The rows (first axis) of all processes, in their order; the gradient is that of one's own."""
    return x if processes() == 1 else _Gather.apply(x)  # pyright: ignore[reportReturnType]


def gather_objects(values: Sequence[Any]) -> list[Any]:
    """The values of all processes in their order: text and numbers of this program's own."""
    if processes() == 1:
        return list(values)
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def in_order(own: Any, draw: Callable[[Any], Any]) -> Any:
    """What `draw` makes of this process's value, called with all that are not None, in the order of the processes.

    So that one generator gives each the same numbers, whoever has it.
    """
    made = [None if value is None else draw(value) for value in gather_objects([own])]
    return made[0 if processes() == 1 else rank()]


def exchanged(values: Sequence[Any]) -> list[Any]:
    """Of `values`, one for each process, every process gets its own: what came, in the order of the senders."""
    if processes() == 1:
        return list(values)
    came: list[Any] = [None] * processes()
    for owner, value in enumerate(values):
        dist.gather_object(value, came if owner == rank() else None, dst=owner)
    return came


def total(x: Tensor) -> Tensor:
    """The sum of every process's tensor; the gradient is that of one's own."""
    return x if processes() == 1 else _Total.apply(x)  # pyright: ignore[reportReturnType]


def total_(tensors: Iterable[Tensor]) -> None:
    """Sum statistics over processes, in place."""
    if processes() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def mean(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The mean over axes, the first among them, of the rows of all processes."""
    if processes() == 1:
        return x.mean() if dim is None else x.mean(dim)
    summed = total(x.sum() if dim is None else x.sum(dim))
    others = [x.shape[d] for d in (range(1, x.dim()) if dim is None else dim) if d != 0]
    return summed / (offsets([len(x)], x.device)[0][1] * torch.Size(others).numel())


def variance(x: Tensor) -> Tensor:
    """The variance of all elements of all processes."""
    if processes() == 1:
        return x.var()
    count = offsets([len(x)], x.device)[0][1] * x.shape[1:].numel()
    return total((x - mean(x)).square().sum()) / (count - 1)


def offsets(lengths: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
    """For each of this process's row counts: how many rows the processes before it have, and how many all have."""
    if processes() == 1:
        return [(0, n) for n in lengths]
    counts = _counts([0 if _state.idle else n for n in lengths], device)
    return list(zip(counts[: rank()].sum(0).tolist(), counts.sum(0).tolist(), strict=True))


def places(pick: Tensor, before: int, length: int) -> tuple[Tensor, Tensor]:
    """Of picked rows of all processes, those of this one: where they lie in its own rows, and a mask of the pick."""
    if processes() == 1:
        return pick, torch.ones_like(pick, dtype=torch.bool)
    mine = (pick >= before) & (pick < before + (0 if _state.idle else length))
    return pick[mine] - before, mine


# --- whose parameters -----------------------------------------------------------------------------------------


def owners(costs: Sequence[float]) -> list[int]:
    """The process that owns each of several things, so that the largest load is small: dearest first, to the least."""
    loads, found = [0.0] * processes(), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(len(loads)), key=lambda r: (loads[r], r))
        loads[found[i]] += costs[i]
    return found


def to_owner(x: Tensor, owner: int) -> Tensor | None:
    """The rows of all processes at their owner; None elsewhere."""
    if processes() == 1:
        return x
    counts = _counts([len(x)], x.device)[:, 0].tolist()
    sent = x.new_zeros(max(counts), *x.shape[1:])
    sent[: len(x)] = x
    parts = [torch.empty_like(sent) for _ in counts] if rank() == owner else None
    dist.gather(sent, parts, dst=owner)
    return None if parts is None else torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])


def from_owner_(module: nn.Module, owner: int) -> None:
    """Parameters and buffers of a module as their owner has them."""
    if processes() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=owner)
            tensor.data.copy_(sent)


__all__ = [
    "Rows", "any_of", "apart", "exchanged", "from_main", "from_owner", "from_owner_", "gather", "gather_objects",
    "in_order", "in_step", "in_turns", "is_main", "join", "mean", "offsets", "owners", "part", "placed",
    "places", "processes", "rank", "rows_of", "spread", "subset", "to_owner", "total", "total_", "variance", "wait",
]  # fmt: skip
