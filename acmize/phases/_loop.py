"""One training loop for every phase, on accelerate: mixed precision, accumulation, clipping, cosine, EMA, resume."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize.checkpoint import load_training_state, save_training_state
from acmize.errors import AcmizeError

log = logging.getLogger("acmize")
Terms = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Options of the loop.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate of AdamW; cosine to `min_lr` after a linear warm-up over the share `warmup` of the steps.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient, or None.
        accumulate: batches an optimiser step.
        mixed_precision: "no", "bf16" or "fp16".
        ema_decay: keep an exponential moving average of the weights and end with it; None: no.
        seed: of the torch generator at the start.
        checkpoint_every: optimiser steps between checkpoints; one is written at the end of every epoch too.
        log_every: optimiser steps between log points.
        trackers: names of accelerate trackers, such as ("tensorboard",).
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
        checks = {
            "epochs": self.epochs >= 1,
            "lr": self.lr > 0,
            "min_lr": 0 <= self.min_lr <= self.lr,
            "warmup": 0 <= self.warmup < 1,
            "accumulate": self.accumulate >= 1,
            "mixed_precision": self.mixed_precision in ("no", "bf16", "fp16"),
            "ema_decay": self.ema_decay is None or 0 < self.ema_decay < 1,
            "clip_norm": self.clip_norm is None or self.clip_norm > 0,
            "checkpoint_every": self.checkpoint_every >= 1,
            "log_every": self.log_every >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, which is out of range; see FitConfig")


@dataclass(frozen=True, kw_only=True)
class History:
    """What a fit did: its name, optimiser steps, seconds, and the terms at each log point."""

    name: str
    steps: int
    seconds: float
    logs: list[dict[str, float]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, float]:
        """Terms at the last log point."""
        return self.logs[-1] if self.logs else {}


def learning_rate(step: int, total: int, config: FitConfig) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`: linear warm-up, then cosine to `min_lr`."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    *,
    name: str,
    model: nn.Module,
    loss: Callable[[Any, int], Terms],
    batches: Callable[[int], Iterable[Any]],
    steps_per_epoch: int,
    config: FitConfig,
    params: Iterable[Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    watch: Callable[[int, dict[str, float]], None] | None = None,
) -> History:
    """Minimise a loss.

    Args:
        name: of the phase: names progress, checkpoints and errors.
        model: what is trained and checkpointed.
        loss: (batch, number of the batch) -> scalar terms; "loss" is the one that is differentiated.
        batches: epoch -> its batches, in an order that depends on the epoch alone.
        steps_per_epoch: batches in an epoch.
        config: options.
        params: parameters or groups; all that require a gradient by default.
        checkpoint: folder that holds this phase's checkpoint, as `NAME/`.
        resume: go on from it where there is one.
        watch: called with (step, terms) at every log point.

    Raises:
        AcmizeError: the loss stopped being finite, or the checkpoint cannot be used.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    cpu = next(model.parameters()).device.type == "cpu"
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=cpu, log_with=list(config.trackers) or None,
        project_dir=str(checkpoint or "."),
    )  # fmt: skip
    weights = list(params) if params is not None else [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = accelerator.prepare(torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay))
    if config.trackers:
        accelerator.init_trackers(f"acmize-{name}", config=dict(vars(config)))
    ema = None
    if config.ema_decay is not None:
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
        )
    folder = None if checkpoint is None else Path(checkpoint) / name
    total = math.ceil(steps_per_epoch / config.accumulate) * config.epochs
    start = time.perf_counter()
    progress: dict[str, Any] = {"batch": 0, "step": 0, "logs": [], "done": False}
    torch.manual_seed(config.seed)
    if resume and folder is not None and folder.exists():
        progress = load_training_state(folder, model=model, optimizer=optimizer.optimizer, ema=ema)
        log.info("%s: resumed at step %d of %d", name, progress["step"], total)

    def save(done: bool = False) -> None:
        if folder is not None:
            progress["done"] = done
            save_training_state(folder, model=model, optimizer=optimizer.optimizer, progress=progress, ema=ema)

    with _progress(name, total, progress["step"]) as show:
        for epoch in range(progress["batch"] // steps_per_epoch, config.epochs):
            first = progress["batch"] - epoch * steps_per_epoch
            if progress["done"] or first >= steps_per_epoch:
                continue
            for index, batch in enumerate(batches(epoch)):
                if index < first:
                    continue
                if index >= steps_per_epoch:
                    break
                last = index + 1 == steps_per_epoch
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(progress["step"], total, config)
                with accelerator.autocast():
                    terms = loss(send_to_device(batch, accelerator.device), progress["batch"])
                if not torch.isfinite(terms["loss"]).item():
                    where = f"; the last good checkpoint is {folder}" if folder is not None else ""
                    raise AcmizeError(
                        f"{name}: the loss is {terms['loss'].item()} at step {progress['step']}; lower the learning rate "
                        f"or use mixed_precision='no'{where}"
                    )
                accelerator.backward(terms["loss"] / config.accumulate)
                progress["batch"] += 1
                if not last and (index + 1) % config.accumulate:
                    continue
                if config.clip_norm is not None:
                    accelerator.clip_grad_norm_(
                        [p for g in optimizer.param_groups for p in g["params"]], config.clip_norm
                    )
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update_parameters(model)
                progress["step"] += 1
                if progress["step"] % config.log_every == 0 or progress["step"] == total:
                    values = {key: float(term.detach()) for key, term in terms.items()}
                    progress["logs"].append(values)
                    show(progress["step"], values)
                    if config.trackers:
                        accelerator.log(values, step=progress["step"])
                    if watch is not None:
                        watch(progress["step"], values)
                if progress["step"] % config.checkpoint_every == 0 and not last:
                    save()
            save(done=epoch + 1 == config.epochs)
    if config.trackers:
        accelerator.end_training()
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    return History(name=name, steps=progress["step"], seconds=time.perf_counter() - start, logs=progress["logs"])


@contextlib.contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar with the time left on a terminal; a line every tenth of the way in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(name, total=total, completed=done)
            yield lambda step, terms: bar.update(task, completed=step, description=f"{name} {terms['loss']:.4f}")
        return
    told = [done]

    def line(step: int, terms: dict[str, float]) -> None:
        if step - told[0] >= total / 10 or step == total:
            told[0] = step
            shown = ", ".join(f"{k} {v:.4g}" for k, v in terms.items() if "/" not in k)
            log.info("%s %d/%d: %s", name, step, total, shown)

    yield line
