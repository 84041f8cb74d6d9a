"""One training loop for every phase, on accelerate: precision, accumulation, clipping, cosine, EMA, exact resume."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.checkpoint import (
    AGAIN,
    load_training_state,
    recover_dir,
    rng_state,
    save_training_state,
    set_rng_state,
)
from acmize.errors import AcmizeError
from acmize.faults import Diverged, Faults
from acmize.interrupt import Stopped, asked, deferred

log = logging.getLogger("acmize")
FREE = {"checkpoint_every", "log_every", "trackers"}  # options that may change between a run and its resume


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Options of the loop.

    Args:
        epochs: Passes over the data.
        lr: Peak learning rate of AdamW; a parameter group may bring its own.
        min_lr: Where the cosine would end one step after the last.
        weight_decay: Of AdamW; a parameter group may bring its own.
        warmup: Fraction of the optimizer steps over which the learning rate first rises linearly.
        clip_norm: Largest gradient norm; None leaves gradients as they are.
        accumulate: Batches per optimizer step; the last step of an epoch takes what is left.
        mixed_precision: "no", "bf16" or "fp16".
        ema_decay: Of an average of the trained parameters that replaces them at the end; None for no average.
        seed: Of the global generators while the loop runs; the caller's are put back afterwards.
        checkpoint_every: Optimizer steps between checkpoints; the start and every epoch's end have one too.
        log_every: Optimizer steps between log points; the last step is one too.
        trackers: Names that accelerate knows, such as "tensorboard".

    Raises:
        ValueError: An option is out of its range.
    """

    epochs: int
    lr: float
    min_lr: float = 1e-6
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip_norm: float | None = 1.0
    accumulate: int = 1
    mixed_precision: str = "no"
    ema_decay: float | None = None
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "accumulate", "checkpoint_every", "log_every")
        checks = {name: (getattr(self, name) >= 1, "at least 1") for name in at_least_one} | {
            "lr": (0 < self.lr < math.inf, "a positive number"),
            "min_lr": (0 <= self.min_lr <= self.lr, f"0 to lr={self.lr}"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup": (0 <= self.warmup <= 1, "a fraction of the steps, 0 to 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "a positive number or None"),
            "mixed_precision": (self.mixed_precision in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1, or None"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected}; mend FitConfig")


@dataclass(frozen=True, kw_only=True)
class History:
    """What a fit did: optimizer steps, seconds of all its runs, what it logged, oldest first, and what went wrong."""

    name: str
    steps: int
    seconds: float
    logs: list[dict[str, float]]
    faults: Faults

    @property
    def last(self) -> dict[str, float]:
        """The terms at the last log point."""
        return self.logs[-1] if self.logs else {}


def learning_rate(step: int, steps: int, config: FitConfig, peak: float | None = None) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear to `peak` (default lr), cosine to min_lr."""
    peak = config.lr if peak is None else peak
    low, warm = min(config.min_lr, peak), round(config.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def fit(
    *,
    name: str,
    model: nn.Module,
    loss: Callable[[Any, int], dict[str, Tensor]],
    batches: Callable[[int], Iterable[Any]],
    steps_per_epoch: int,
    config: FitConfig,
    params: Iterable[Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    watch: Callable[[int, dict[str, float]], None] | None = None,
    apart: bool = False,
) -> History:
    """Trains `model` on its device and in its mode; on the CPU a resumed run ends bit for bit alike.

    With several processes, the loss is the same on each, and the gradients that it has there are summed
    (`acmize.parallel`).

    Args:
        name: Of the phase: in progress, errors and the checkpoint's folder.
        model: Its whole state is checkpointed.
        loss: Called under autocast with a batch and the number of batches before it. Returns scalar terms, of
            which "loss", the total, is differentiated.
        batches: Epoch -> its batches, in an order that depends on the epoch alone; with a method `starting_at(n)`,
            a resumed run does not read those before the n-th again.
        steps_per_epoch: Batches in an epoch.
        config: Options.
        params: Parameters of `model`, or groups of them; default all that require a gradient.
        checkpoint: Folder in which the folder `name` is written; None writes nothing.
        resume: Go on from the checkpoint if there is one; a finished phase is only loaded.
        watch: Called with the optimizer steps done and the terms, at each log point.
        apart: Each process trains a model of its own, and only the gradient norm is that of all together.

    Raises:
        Stopped: SIGTERM came, where `stopping_on_sigterm` listens; the state after the last step is saved.
        AcmizeError: Loss or gradient is not finite again and again (see `faults`), an epoch is too short, the
            checkpoint does not fit this run, or the machine or disk cannot do what is asked.
    """
    from accelerate.utils import send_to_device, set_seed  # late: it takes a second

    params = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    if not params or steps_per_epoch < 1:
        found = f"{steps_per_epoch} batches an epoch and {len(params)} parameters or groups to train"
        raise AcmizeError(f"{name}: found {found}, expected at least one of each; give data, unfreeze something")
    raw = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    raw.zero_grad()
    trained = [p for group in raw.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in raw.param_groups]
    device, count = trained[0].device, parallel.processes()
    accelerator = _accelerator(name, config, device, checkpoint)
    optimizer: Any = accelerator.prepare(raw)
    together, divided = count > 1 and not apart, count > 1 and _divided(model)
    run: Any = accelerator.prepare(_Loss(model, loss)) if together and not divided else loss
    writes = apart or parallel.is_main()
    scaler: Any = accelerator.scaler
    ema = {str(i): p.detach().clone() for i, p in enumerate(trained)} if config.ema_decay else None
    folder = None if checkpoint is None else Path(checkpoint) / name
    begun, caller_rng, resumed_rng = time.perf_counter(), rng_state(), None
    steps = math.ceil(steps_per_epoch / config.accumulate) * config.epochs
    options = {k: v for k, v in asdict(config).items() if k not in FREE} | {"batches": steps_per_epoch}
    step, batch, logs, before, faults = 0, 0, [], 0.0, Faults(name)

    def save(done: bool = False) -> None:
        if folder is not None and writes:
            extra = {"options": options, "batch": batch, "logs": logs, "done": done, "seconds": seconds()}
            extra["faults"] = faults.to_dict()
            extra["scaler"] = scaler.state_dict() if scaler else None
            position: dict[str, Any] = {"step": step, "epoch": batch // steps_per_epoch, "extra": extra}
            save_training_state(folder, model=model, optimizer=raw, ema=ema, **position)

    def seconds() -> float:
        return before + time.perf_counter() - begun

    def optimize(stream: Iterator[Any], size: int) -> dict[str, Any]:
        """One optimizer step over the next `size` batches; the mean of each term, none if the step was skipped."""
        accelerator.gradient_accumulation_steps, accelerator.step = size, 0
        if count > 1:  # what is drawn for other samples is drawn otherwise
            set_seed(zlib.crc32(f"{config.seed} {name} {batch} {parallel.rank()}".encode()))
        for group, peak in zip(raw.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, steps, config, peak) * faults.rate
        sums: dict[str, Any] = {}
        limit, wrong = config.clip_norm or math.inf, ""
        for number in range(batch, batch + size):
            inputs = next(stream, stream)
            if inputs is stream:
                few = f"{number % steps_per_epoch} batches in epoch {number // steps_per_epoch}"
                told = f"found {few}, expected {steps_per_epoch}; mend batches or steps_per_epoch"
                raise AcmizeError(f"{name}: step {step}: {told}")
            if wrong:
                continue
            with accelerator.accumulate(model if run is loss else run):
                with accelerator.autocast():
                    terms = run(send_to_device(inputs, device), number)
                if parallel.any_of(not terms["loss"].isfinite(), device):
                    wrong = f"loss {terms['loss'].item()}"
                    continue
                accelerator.backward(terms["loss"] * count if together else terms["loss"])  # the mean is taken
                if accelerator.sync_gradients:  # an infinite limit only measures
                    found = accelerator.clip_grad_norm_(trained, math.inf if apart else limit)
                    norm = float(found.full_tensor() if divided else found)
                    if apart and count > 1:
                        norm = float(parallel.total(torch.tensor(norm, device=device).square()).sqrt())
                        torch.nn.utils.clip_grads_with_norm_(trained, limit, torch.tensor(norm))
                    if not scaler and not math.isfinite(norm):  # the scaler skips such a step
                        wrong = f"gradient norm {norm}"
                        continue
                optimizer.step()
                optimizer.zero_grad()
            sums = {k: sums.get(k, 0) + term.detach() / size for k, term in terms.items()}
        if wrong:
            raw.zero_grad()
            faults.bad(step, wrong)
            return {}
        faults.good()
        return sums

    def load() -> dict[str, Any]:
        """The last checkpoint, whether of an earlier run or of this one; returns what else it kept."""
        nonlocal step, batch, logs, before, begun, faults, resumed_rng
        assert folder is not None
        state = load_training_state(folder, model=model, optimizer=raw, ema=ema)
        step, found, resumed_rng = state["step"], state["extra"], rng_state()
        if found["options"] != options:
            wrong = sorted(k for k in options if found["options"].get(k) != options[k])
            raise AcmizeError(f"{folder}: found another {', '.join(wrong)}, expected this run's; {AGAIN}")
        batch, logs, before, begun = found["batch"], found["logs"], found["seconds"], time.perf_counter()
        faults = Faults(**found["faults"]) if "faults" in found else Faults(name)
        if scaler and found["scaler"]:
            scaler.load_state_dict(found["scaler"])
        return found

    def go_back() -> None:
        """After a divergence: to the last checkpoint, where there is one, at a lower rate."""
        nonlocal before, faults
        parallel.wait()  # until the main process has written what the others read
        if folder is not None:
            now, spent = faults, seconds()
            load()
            faults, before = now, spent
        faults.back(step)
        save()

    def run_epoch(show: Callable[[int, dict[str, float]], None]) -> None:
        """From where training stands to the end of the epoch."""
        nonlocal step, batch, resumed_rng
        epoch = batch // steps_per_epoch
        set_seed(zlib.crc32(f"{config.seed} {name} {epoch}".encode()))
        stream = _from(batches(epoch), batch - epoch * steps_per_epoch)
        if resumed_rng is not None and batch % steps_per_epoch:  # as it stood after those batches
            set_rng_state(resumed_rng)
        resumed_rng = None
        while batch < (epoch + 1) * steps_per_epoch:
            size = min(config.accumulate, (epoch + 1) * steps_per_epoch - batch)
            sums = optimize(stream, size)
            if ema is not None and sums:  # a young average forgets faster, else short runs end near their start
                decay = min(config.ema_decay or 0, (1 + step) / (10 + step))
                for average, parameter in zip(ema.values(), trained, strict=True):
                    average.lerp_(parameter.detach(), 1 - decay)
            step, batch = step + 1, batch + size
            if sums and (step % config.log_every == 0 or step == steps):
                values = {k: float(v) for k, v in sums.items() if math.isfinite(v)}
                logs.append(values)
                show(step, values)
                accelerator.log(values, step=step)
                if watch is not None:
                    watch(step, values)
            due = step % config.checkpoint_every == 0 or batch % steps_per_epoch == 0
            stopping = parallel.any_of(asked(), device)
            if step < steps and (due or stopping):
                save()
            if step < steps and stopping:
                raise Stopped(f"{name}: stopped by SIGTERM at step {step} of {steps}")

    try:
        there = parallel.gather_objects([resume and folder is not None and writes and recover_dir(folder)])
        if apart and len(set(there)) > 1:
            raise AcmizeError(f"{folder}: found a checkpoint of some processes alone, expected one of each; {AGAIN}")
        if folder is not None and any(there):
            done = load()["done"]
            if apart and len(set(parallel.gather_objects([(step, done)]))) > 1:
                raise AcmizeError(f"{folder}: found the processes at different steps, as a kill left them; {AGAIN}")
            if done:
                return History(name=name, steps=step, seconds=before, logs=logs, faults=faults)
        else:
            save()  # a full disk shows now, and nothing older can be taken for this run
        with _progress(name, steps, step, parallel.is_main()) as show, deferred():
            while batch < config.epochs * steps_per_epoch:
                try:
                    run_epoch(show)
                except Diverged:
                    go_back()
            faults.finish(steps)
            for i, average in (ema or {}).items():
                trained[int(i)].data.copy_(average)
            save(done=True)
        return History(name=name, steps=step, seconds=seconds(), logs=logs, faults=faults)
    finally:
        set_rng_state(caller_rng)
        for tracker in accelerator.trackers:
            tracker.finish()


def _from(batches: Any, number: int) -> Iterator[Any]:
    """Batches from one on: asked for where they can be begun anywhere, else gone through."""
    if hasattr(batches, "starting_at"):
        return batches.starting_at(number)
    stream = iter(batches)
    for _ in islice(stream, number):
        pass
    return stream


def _accelerator(name: str, config: FitConfig, device: torch.device, folder: Path | None) -> Any:
    """An Accelerator for this config on the model's device, whatever an earlier one in this process was."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.tracking import get_available_trackers

    missing = set(config.trackers) - {str(getattr(t, "value", t)) for t in get_available_trackers()}
    if missing:
        raise AcmizeError(f"{name}: found no {', '.join(sorted(missing))}, expected each tracker installed; install it")
    cpu, precision = device.type == "cpu", config.mixed_precision
    state = AcceleratorState() if AcceleratorState._shared_state else None
    if state is not None and (state.mixed_precision != precision or (state.device.type == "cpu") != cpu):
        # accelerate keeps the precision and device of the first Accelerator for the whole process and knows no
        # public way to change them; phases may differ in both.
        AcceleratorState._reset_state(reset_partial_state=True)
    if cpu and precision == "fp16":  # accelerate would train in float32 and say nothing
        raise AcmizeError(f"{name}: found a model on the CPU, expected a GPU for fp16; use mixed_precision='bf16'")
    trackers: Any = list(config.trackers) or None
    accelerator: Any = Accelerator(
        mixed_precision=precision, cpu=cpu, log_with=trackers, project_dir=str(folder or "."),
        # A learner or gate that no token reaches in a step has no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )  # fmt: skip
    engine = accelerator.distributed_type.value
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise AcmizeError(
            f"{name}: found {engine} in accelerate's settings, expected none; leave it out, set train.shard"
        )
    if config.trackers:
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers(f"acmize-{name}", config=plain)
    return accelerator


def _divided(model: nn.Module) -> bool:
    """Whether each process has a part of every parameter (FSDP2)."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


class _Loss(nn.Module):
    """A loss as a module, which is what DDP wants: the loss alone carries a gradient out of it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, int], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The terms of a batch."""
        return {k: term if k == "loss" else term.detach() for k, term in self.loss(batch, step).items()}


@contextmanager
def _progress(
    name: str, steps: int, done: int, shown: bool = True
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar with loss and time left on a terminal; elsewhere a log line for each tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not shown:
        yield lambda _step, _values: None
        return
    console, told = Console(stderr=True), done * 10 // steps
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(name, total=steps, completed=done)
            yield lambda step, v: bar.update(task, completed=step, description=f"{name} loss {v['loss']:.4g}")
        return

    def line(step: int, values: dict[str, float]) -> None:
        nonlocal told
        if step * 10 // steps > told:
            told = step * 10 // steps
            log.info("%s %d/%d: loss %.4g", name, step, steps, values["loss"])

    yield line
