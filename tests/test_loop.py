"""The training loop: exact resume, schedule, clipping, precision, and errors that name phase and step."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import acmize.checkpoint as checkpoint
from acmize.errors import AcmizeError
from acmize.interrupt import Stopped, asked, stopping_on_sigterm
from acmize.phases._loop import FitConfig, History, fit, learning_rate

BATCHES, EPOCHS = 5, 2


class Killed(Exception):
    pass


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def batches(epoch: int):
    """Draws from the global generators too, as augmentations do."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        yield {"x": torch.randn(4, 3, generator=generator) + 0.1 * torch.rand(()) + 0.1 * random.random()}


def train(
    model: nn.Module, *, kill: int | None = None, scale: float = 1.0, where: Path | None = None, **options: Any
) -> History:
    outer = {k: options.pop(k) for k in ("params", "resume", "watch", "batches") if k in options}
    options = {"epochs": EPOCHS, "lr": 0.05, "checkpoint_every": 2, "log_every": 1} | options

    def loss(batch: Any, step: int) -> dict[str, torch.Tensor]:
        if step == kill:
            raise Killed
        error = model(batch["x"]).square().mean() * scale
        return {"loss": error, "twice": 2 * error}

    return fit(
        name="toy", model=model, loss=loss, steps_per_epoch=BATCHES, config=FitConfig(**options), checkpoint=where,
        **{"batches": batches} | outer,
    )  # fmt: skip


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("batch", [3, 4, 9])  # within an epoch, at its end, at the end of all
def test_sigterm_saves_the_step_under_way(tmp_path: Path, batch: int) -> None:
    unbroken, stopped, resumed = make_model(), make_model(), make_model()
    whole, seen = train(unbroken), []

    def stopping(epoch: int) -> Any:
        for number, item in enumerate(batches(epoch)):
            if epoch * BATCHES + number == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(number)
            yield item

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stopping_on_sigterm():
        train(stopped, where=tmp_path, batches=stopping, checkpoint_every=100)
    assert len(seen) == batch + 1  # the step was finished, none was begun
    assert signal.getsignal(signal.SIGTERM) == before
    assert not asked()
    history = train(resumed, where=tmp_path, resume=True, kill=batch, checkpoint_every=100)
    assert_same(unbroken, resumed)
    assert history.logs == whole.logs


def test_sigterm_elsewhere_stops_at_once() -> None:
    with pytest.raises(Stopped), stopping_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "ema_decay": 0.9}, {"mixed_precision": "bf16"}], ids=str)
@pytest.mark.parametrize("kill", [0, 3, 5, 6, 9])
def test_resume_equals_the_unbroken_run(tmp_path, kill, options):
    unbroken = make_model()
    whole = train(unbroken, **options)
    broken = make_model()
    with pytest.raises(Killed):
        train(broken, kill=kill, where=tmp_path, **options)
    resumed = make_model()
    torch.manual_seed(123)
    random.seed(123)
    history = train(resumed, where=tmp_path, resume=True, **options)
    assert_same(unbroken, resumed)
    assert (history.logs, history.steps) == (whole.logs, whole.steps)
    assert whole.steps == EPOCHS * math.ceil(BATCHES / options.get("accumulate", 1))


def test_resume_after_sigkill(tmp_path):
    script = (
        "import os, sys, signal; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_loop as t\n"
        "t.torch.set_num_threads(1)\n"
        "watch = lambda step, terms: step == 7 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.train(t.make_model(), where=Path(sys.argv[2]), watch=watch)\n"
    )
    here = Path(__file__).resolve()
    command = [sys.executable, "-c", script, str(here.parent), str(tmp_path)]
    assert subprocess.run(command, cwd=here.parents[1]).returncode == -signal.SIGKILL
    unbroken, resumed = make_model(), make_model()
    assert train(unbroken).logs == train(resumed, where=tmp_path, resume=True).logs
    assert_same(unbroken, resumed)


def test_a_finished_phase_is_only_loaded(tmp_path):
    first, again = make_model(), make_model()
    done = train(first, where=tmp_path, ema_decay=0.5)
    loaded = train(again, where=tmp_path, ema_decay=0.5, resume=True, kill=0)
    assert (loaded.steps, loaded.logs) == (done.steps, done.logs)
    assert 0 < loaded.seconds <= done.seconds
    assert_same(first, again)
    assert done.last["twice"] == pytest.approx(2 * done.last["loss"])
    with pytest.raises(AcmizeError, match="found another lr, seed, expected this run's; remove"):
        train(again, where=tmp_path, ema_decay=0.5, resume=True, lr=0.01, seed=3)
    train(again, where=tmp_path, ema_decay=0.5, resume=True, kill=0, log_every=7)
    with pytest.raises(Killed):  # without resume the old checkpoint is gone at once
        train(again, where=tmp_path, kill=0)
    assert checkpoint.read_json(tmp_path / "toy" / "state.json")["step"] == 0


def test_the_schedule():
    config = FitConfig(epochs=1, lr=1.0, min_lr=0.2, warmup=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.6)
    assert rates[9] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(10, 10, config) == pytest.approx(0.2)
    assert learning_rate(6, 10, config, peak=0.1) == pytest.approx(0.1)
    assert learning_rate(9, 10, FitConfig(epochs=1, lr=1.0, warmup=1.0)) == 1.0


def test_groups_keep_their_own_rate_and_others_stay():
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, params=[{"params": model[0].parameters(), "lr": 1e-9}, {"params": model[3].parameters()}])
    moved = [(a - b).abs().max().item() for a, b in zip(before, model.parameters(), strict=True)]
    assert 0 < max(moved[:2]) < 1e-7
    assert moved[2:4] == [0, 0]
    assert min(moved[4:]) > 1e-2


def test_clipping(monkeypatch):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(make_model(), clip_norm=0.01, epochs=1)
    clipped = norms.copy()
    norms.clear()
    train(make_model(), clip_norm=None, epochs=1)
    assert clipped == pytest.approx([0.01] * BATCHES, rel=1e-3)
    assert min(norms) > 0.02


def test_accumulation_equals_the_large_batch():
    """Two batches of four at once, and the odd one at the end of the epoch alone."""
    small, large = make_model(), make_model()
    data = torch.randn(20, 3)
    for model, parts, accumulate in ((small, data.split(4), 2), (large, data.split(8), 1)):
        fit(
            name="toy", model=model.eval(), loss=lambda x, _, m=model: {"loss": m(x).square().mean()},
            batches=lambda _, p=parts: p, steps_per_epoch=len(parts),
            config=FitConfig(epochs=2, lr=0.01, accumulate=accumulate),
        )  # fmt: skip
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ema_is_the_average_of_the_steps():
    def run(decay: float | None) -> tuple[list[float], float]:
        """The weight before every step, and at the end."""
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        seen = []

        def loss(x: torch.Tensor, _: int) -> dict[str, torch.Tensor]:
            seen.append(model.weight.item())
            return {"loss": model(x).square().mean()}

        config = FitConfig(epochs=1, lr=0.1, ema_decay=decay)
        fit(name="e", model=model, loss=loss, batches=lambda _: [torch.ones(1, 1)] * 3, steps_per_epoch=3,
            config=config)  # fmt: skip
        return seen, model.weight.item()

    (average, *later), last = run(None)
    seen, end = run(0.15)
    assert seen == [average, *later]  # the average takes no part in the training
    for weight, keep in zip([*later, last], (1 / 10, 0.15, 0.15), strict=True):
        average = keep * average + (1 - keep) * weight
    assert end == pytest.approx(average, abs=1e-6)
    assert abs(end - last) > 1e-3


def test_mixed_precision_and_back():
    dtypes = []
    for precision in ("bf16", "no", "bf16"):
        model = nn.Linear(3, 2)

        def loss(batch: Any, _: int, model: nn.Module = model) -> dict[str, torch.Tensor]:
            y = model(batch[0])
            dtypes.append(y.dtype)
            return {"loss": y.float().square().mean()}

        config = FitConfig(epochs=1, lr=0.01, mixed_precision=precision)
        fit(name="p", model=model, loss=loss, batches=lambda _: [(torch.ones(2, 3), 1)], steps_per_epoch=1,
            config=config)  # fmt: skip
        assert model.weight.dtype == torch.float32
        assert model(torch.ones(1, 3)).dtype == torch.float32
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_half_precision_needs_a_gpu():
    with pytest.raises(AcmizeError, match="toy: found a model on the CPU, expected a GPU for fp16"):
        train(make_model(), mixed_precision="fp16")


def test_the_generators_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    model = nn.Identity()
    model.weight = nn.Parameter(torch.ones(3))
    fit(name="g", model=model, loss=lambda x, _: {"loss": (model.weight * torch.rand(3)).sum()},
        batches=lambda _: [torch.ones(1)], steps_per_epoch=1, config=FitConfig(epochs=1, lr=0.1))  # fmt: skip
    assert torch.equal(torch.rand(2), expected)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(AcmizeError, match="free some space"):
        train(make_model(), where=tmp_path, kill=0)


def test_too_few_batches_and_nothing_to_train():
    with pytest.raises(AcmizeError, match="toy: step 3: found 3 batches in epoch 0, expected 5; mend batches"):
        train(make_model(), batches=lambda epoch: list(batches(epoch))[:3])
    with pytest.raises(AcmizeError, match="0 parameters"):
        train(make_model().requires_grad_(False))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"lr": 0.0}, {"min_lr": 1.0}, {"warmup": 2.0}, {"clip_norm": 0.0}, {"ema_decay": 1.0},
     {"mixed_precision": "fp8"}, {"accumulate": 0}, {"weight_decay": -1.0}],
    ids=str,
)  # fmt: skip
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: found .*, expected"):
        FitConfig(**{"epochs": 1, "lr": 0.1} | wrong)


def test_trackers_and_quiet_lines(caplog):
    with pytest.raises(AcmizeError, match="found no no_such_tracker, expected each tracker installed"):
        train(make_model(), trackers=("no_such_tracker",))
    watched: list[int] = []
    with caplog.at_level(logging.INFO, logger="acmize"):
        train(make_model(), epochs=8, log_every=2, watch=lambda step, _: watched.append(step))
    assert watched == list(range(2, 41, 2))
    lines = [r.getMessage() for r in caplog.records if r.name == "acmize"]
    assert len(lines) == 10
    assert lines[0].startswith("toy 4/40: loss ")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(make_model(), epochs=1)
    assert "toy loss" in capsys.readouterr().err
