"""What goes wrong while training: steps that are no numbers, full disks, files cut in half, workers that die."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from short import OPTIONS, converted, same_state, timeless
from test_loop import BATCHES, EPOCHS, Killed, assert_same, batches, make_model, train
from torch import nn

import acmize.checkpoint as checkpoint
from acmize.batches import loader
from acmize.errors import AcmizeError
from acmize.faults import FACTOR, IN_ROW, ROLLBACKS
from acmize.models import load_model
from acmize.phases import _loop
from acmize.phases._loop import FitConfig, History, fit

STEPS = BATCHES * EPOCHS


def faulty(wrong: Any, model: nn.Module, where: Path | None = None, kill: int | None = None, **options: Any) -> Any:
    """Train; `wrong(batch number, rate)` says where the loss is NaN. Returns the history and the weights by batch."""
    seen: list[tuple[int, float, dict[str, torch.Tensor]]] = []
    make = torch.optim.AdamW

    class Told(make):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    optimizers: list[Any] = []
    outer = {k: options.pop(k) for k in ("resume",) if k in options}

    def loss(batch: Any, number: int) -> dict[str, torch.Tensor]:
        if number == kill:
            raise KeyboardInterrupt
        rate = optimizers[-1].param_groups[0]["lr"]
        seen.append((number, rate, {k: v.detach().clone() for k, v in model.named_parameters()}))
        return {"loss": model(batch["x"]).square().mean() * (math.nan if wrong(number, rate) else 1)}

    config = FitConfig(epochs=EPOCHS, **{"lr": 0.05, "min_lr": 0.05, "checkpoint_every": 4, "log_every": 1, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loop.torch.optim, "AdamW", Told)
        history = fit(
            name="toy", model=model, loss=loss, batches=batches, steps_per_epoch=BATCHES, config=config,
            checkpoint=where, **outer,
        )  # fmt: skip
    return history, seen


def weights_at(seen: Any, place: int) -> dict[str, torch.Tensor]:
    return seen[place][2]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_that_is_no_number_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    with caplog.at_level("WARNING", logger="acmize"):
        history, seen = faulty(lambda number, _: number == 5, model)
    assert [number for number, _, _ in seen] == list(range(STEPS))
    assert not equal(weights_at(seen, 4), weights_at(seen, 5))
    assert equal(weights_at(seen, 5), weights_at(seen, 6))
    assert not equal(weights_at(seen, 6), weights_at(seen, 7))
    assert (history.faults.skipped, history.faults.rollbacks, history.steps) == (1, 0, STEPS)
    assert len(history.logs) == STEPS - 1
    assert "toy: step 5: found loss nan; the step is skipped" in caplog.text


def test_accumulated_gradients_go_with_the_step() -> None:
    """A window of two batches whose second is no number leaves nothing of its first behind."""
    model = make_model()
    history, seen = faulty(lambda number, _: number == 3, model, accumulate=2)
    assert equal(weights_at(seen, 2), weights_at(seen, 4))  # batches 2 and 3 are one step
    assert history.faults.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_no_number() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    seen: list[float] = []

    def loss(x: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
        seen.append(model.weight.item())
        return {"loss": model(x).sqrt().sum() if number == 0 else (model(x) - 1).square().sum()}

    history = fit(name="toy", model=model, loss=loss, batches=lambda _: [torch.ones(1, 1)] * 3, steps_per_epoch=3,
                  config=FitConfig(epochs=1, lr=0.1))  # fmt: skip
    assert seen[:2] == [0, 0]
    assert model.weight.item() > 0
    assert history.faults.skipped == 1


def diverging(number: int, rate: float) -> bool:
    """Whatever comes behind batch 4 is no number at the full rate."""
    return number > 4 and rate > 0.04


def test_after_some_in_a_row_it_goes_back_at_a_lower_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    with caplog.at_level("WARNING", logger="acmize"):
        history, seen = faulty(diverging, model, tmp_path, checkpoint_every=3)
    numbers = [number for number, _, _ in seen]
    assert numbers[:8] == list(range(8))
    back = next(i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1])
    start = numbers[back]
    first = numbers.index(start)
    assert equal(weights_at(seen, back), weights_at(seen, first))
    assert seen[back][1] == pytest.approx(FACTOR * 0.05)
    assert (history.faults.skipped, history.faults.rollbacks) == (IN_ROW, 1)
    assert numbers[-1] == STEPS - 1
    assert "with 0.5 of the learning rate" in caplog.text
    assert not equal(weights_at(seen, back), weights_at(seen, -1))


@pytest.mark.parametrize("kill", [5, 7, 9])
def test_a_kill_around_going_back(tmp_path: Path, kill: int) -> None:
    """The lowered rate is part of what a resume goes on with."""
    whole, broken = make_model(), make_model()
    faulty(diverging, whole, tmp_path / "whole", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        faulty(diverging, broken, tmp_path / "broken", kill=kill, checkpoint_every=1)
    resumed = make_model()
    history, _ = faulty(diverging, resumed, tmp_path / "broken", resume=True, checkpoint_every=1)
    assert history.faults.rollbacks == 1
    assert_same(whole, resumed)


@pytest.mark.parametrize("stored", [True, False])
def test_at_last_it_gives_up(tmp_path: Path, stored: bool) -> None:
    model = make_model()
    start = {k: v.detach().clone() for k, v in model.named_parameters()}
    with pytest.raises(AcmizeError, match=rf"toy: step \d+: found loss nan.* lowered {ROLLBACKS} times; lower lr"):
        faulty(lambda *_: True, model, tmp_path if stored else None)
    assert equal(start, dict(model.named_parameters()))


def test_a_phase_of_few_steps_without_a_good_one() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(AcmizeError, match="found 2 steps of 2 whose loss or gradient is not finite"):
        fit(
            name="toy", model=model, loss=lambda x, _: {"loss": model(x).sum() * math.inf},
            batches=lambda _: [torch.ones(1, 1)] * 2, steps_per_epoch=2, config=FitConfig(epochs=1, lr=0.1),
        )  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_a_checkpoint_cut_in_half(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    """The one before it is loaded, with a word about it, and training ends alike."""
    whole, model = make_model(), make_model()
    train(whole)
    with pytest.raises(Killed):
        train(model, where=tmp_path, kill=7)
    cut = tmp_path / "toy" / file
    os.truncate(cut, cut.stat().st_size // 2)
    resumed = make_model()
    with caplog.at_level("WARNING", logger="acmize"):
        train(resumed, where=tmp_path, resume=True)
    assert "going on from the checkpoint before it, step 5" in caplog.text
    assert_same(whole, resumed)


def test_both_checkpoints_damaged(tmp_path: Path) -> None:
    train(make_model(), where=tmp_path, epochs=1)
    for folder in ("toy", ".toy.old"):
        (tmp_path / folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(AcmizeError, match=r"toy/model\.safetensors: found .*; copy or save it again"):
        train(make_model(), where=tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The run ends with one sentence; once there is room, it goes on from the last whole checkpoint."""
    whole, stopped, resumed = make_model(), make_model(), make_model()
    train(whole)
    calls, real = [], getattr(os, call)

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 17:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, full)
        with pytest.raises(AcmizeError, match=r"No space left.*free some space"):
            train(stopped, where=tmp_path)
    history = train(resumed, where=tmp_path, resume=True)
    assert history.steps == STEPS
    assert_same(whole, resumed)


def test_a_stage_cut_in_half_runs_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a conversion: every stage comes to the same end, so that a lost one costs time alone."""
    whole, work = converted(), tmp_path / "work"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acmize.stages.finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            converted(work=work)
    for name in ("gates.safetensors", "init.json"):
        os.truncate(work / name, (work / name).stat().st_size // 2)
    with caplog.at_level("INFO", logger="acmize"):
        made = converted(work=work, resume=True)
    assert caplog.text.count("running it again") == 2
    assert "distill: resumed" in caplog.text
    assert same_state(made, whole)
    assert timeless(made.results) == timeless(whole.results)


def test_weights_that_are_no_numbers() -> None:
    model = load_model("acmize_vit_digits")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    from acmize.api import convert
    from acmize.quickstart_model import digits_dataset
    from acmize.recipe import resolve

    with pytest.raises(AcmizeError, match="activations that are not finite"):
        convert(model, data=digits_dataset(), recipe=resolve(OPTIONS))


class Fragile(torch.utils.data.Dataset):
    """Its fourth item ends the process that reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 3 and torch.utils.data.get_worker_info() is not None:
            os._exit(9)
        return torch.zeros(1), index


def test_a_worker_process_that_dies() -> None:
    with pytest.raises(AcmizeError, match="a process that decodes samples ended"):
        list(loader(Fragile(), 2, workers=1))
    assert len(list(loader(Fragile(), 2))) == 4


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No decision hangs on the time."""
    whole, jumped = make_model(), make_model()
    train(whole)
    times = iter([1e9 * (-1) ** n for n in range(1000)])
    monkeypatch.setattr(time, "time", lambda: next(times))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    history: History = train(jumped, where=tmp_path)
    assert history.steps == STEPS
    assert_same(whole, jumped)
