"""A conversion that is killed in any phase goes on with --resume and ends with the same weights and numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from short import Killed, converted, kill, same_state, timeless

from acmize.errors import AcmizeError

OPTIONS = {"train": {"epochs": 2}, "distill": {"epochs": 2}, "gates": {"rounds": 2}}


@pytest.fixture(scope="module")
def unbroken() -> Any:
    return converted(OPTIONS)


@pytest.mark.parametrize(
    ("phase", "after"),
    [("distill", 0), ("distill", 2), ("distill", 4), ("gates-1", 5), ("gates-2", 7), ("finetune", 1), ("finetune", 4)],
)
def test_killed_within_a_phase(
    unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, after: int
) -> None:
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        kill(patch, phase, after)
        with pytest.raises(Killed):
            converted(OPTIONS, work=work)
    assert work.is_dir()
    made = converted(OPTIONS, work=work, resume=True)
    assert same_state(made, unbroken)
    assert timeless(made.results) == timeless(unbroken.results)
    assert made.calibration == unbroken.calibration
    assert set(made.recipe["seconds"]) == {"init", "distill", "gates", "finetune"}
    assert not work.exists()


def test_killed_between_phases(unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: Any, **_options: Any) -> None:
        raise Killed

    for name in ("_gates", "_finetune", "_evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(f"acmize.stages.{name}", killed)
            with pytest.raises(Killed):
                converted(OPTIONS, work=tmp_path / "work", resume=True)
    made = converted(OPTIONS, work=tmp_path / "work", resume=True)
    assert same_state(made, unbroken)
    assert timeless(made.results) == timeless(unbroken.results)


def test_killed_while_its_checkpoints_are_removed(
    unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, remove = tmp_path / "work", shutil.rmtree

    def killed_half_way(path: Path, **options: Any) -> None:
        if options.get("ignore_errors") or not (files := sorted(Path(path).rglob("*.safetensors"))):
            return remove(path, **options)
        files[0].unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_half_way)
        with pytest.raises(Killed):
            converted(OPTIONS, work=work)
    assert any(tmp_path.rglob("*.safetensors")), "it was to be killed before all was removed"
    made = converted(OPTIONS, work=work, resume=True)
    assert same_state(made, unbroken)
    assert not list(tmp_path.iterdir()), "what was left over is gone too"


def test_what_phases_found_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: Any, **_options: Any) -> None:
        raise Killed

    low = {"max_error": 1e-9, "phases": ["distill"]}
    whole = converted(low)
    assert [f for f in whole.results["findings"] if f["kind"] == "distillation"]
    with monkeypatch.context() as patch:
        patch.setattr("acmize.stages._evaluate", killed)
        with pytest.raises(Killed):
            converted(low, work=tmp_path / "work")
    made = converted(low, work=tmp_path / "work", resume=True)
    assert made.results["findings"] == whole.results["findings"]


def killed_at_the_end(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a conversion without phases that was killed before its evaluation."""

    def killed(*_args: Any, **_options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("acmize.stages._evaluate", killed)
        with pytest.raises(Killed):
            converted({"phases": []}, work=work)
    return work


def test_other_options_model_or_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from acmize.api import convert
    from acmize.models import load_model
    from acmize.quickstart_model import digits_dataset

    work = killed_at_the_end(tmp_path / "work", monkeypatch)
    before = {p.name: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    with pytest.raises(AcmizeError, match=r"other recipe .*leave --resume out"):
        converted({"phases": [], "seed": 1}, work=work, resume=True)
    with pytest.raises(AcmizeError, match=r"other (recipe and )?plan"):
        converted({"phases": [], "exclude": ["blocks.0.*"]}, work=work, resume=True)
    other = load_model("acmize_vit_digits")
    with torch.no_grad():
        other.head.bias.add_(1)
    from short import recipe

    with pytest.raises(AcmizeError, match="other weights"):
        convert(other, data=digits_dataset(), recipe=recipe({"phases": []}), work=work, resume=True)
    assert {p.name: p.read_bytes() for p in work.rglob("*") if p.is_file()} == before
    converted({"phases": [], "seed": 1}, work=work)  # without resume it starts anew
    assert not work.exists()


def test_a_damaged_stage_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = killed_at_the_end(tmp_path / "work", monkeypatch)
    (work / "init.safetensors").write_bytes(b"damaged")
    again, whole = converted({"phases": []}, work=work, resume=True), converted({"phases": []})
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_stopped_by_the_system(tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, of the command itself in the middle of distill; --resume ends as an unbroken run does."""
    from short import config_file

    config = config_file(tmp_path / "recipe.yaml", OPTIONS)
    script = (
        "import os, signal, sys, acmize.cli\n"
        "from acmize.phases import _loop\n"
        "save = _loop.save_training_state\n"
        "def kill(folder, **state):\n"
        "    save(folder, **state)\n"
        "    if name := os.environ.get('KILL'): os.kill(os.getpid(), getattr(signal, name))\n"
        "_loop.save_training_state = kill\n"
        "acmize.cli.main()\n"
    )
    from short import image_folder

    data = image_folder(tmp_path / "data", {"train": 64, "test": 24})
    words = ["convert", "acmize_vit_digits", "--data", str(data), "--config", str(config), "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    env["HF_DATASETS_CACHE"] = str(tmp_path / "hf")

    def run(out: str, *more: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *words, "-o", str(tmp_path / out), *more],
            capture_output=True, text=True, env={**env, **extra}, timeout=300,
        )  # fmt: skip

    stopped = run("a", KILL="SIGTERM")
    assert stopped.returncode == 143
    assert "--resume goes on" in stopped.stderr
    assert run("a", "--resume", KILL="SIGKILL").returncode == -signal.SIGKILL
    assert (tmp_path / "a.work").is_dir()
    assert not (tmp_path / "a").exists()
    resumed, whole = run("a", "--resume"), run("b")
    assert resumed.returncode in (0, 1), resumed.stderr
    assert timeless(json.loads(resumed.stdout)) == timeless(json.loads(whole.stdout))
    assert "resumed" in resumed.stderr
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "data", "hf", "recipe.yaml"]
