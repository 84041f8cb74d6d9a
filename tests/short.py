"""What the tests of the pipeline share: short options on the packaged digits, saved data, the command in-process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from acmize import cli
from acmize.api import convert
from acmize.models import load_model
from acmize.phases import _loop
from acmize.quickstart_model import digits_dataset
from acmize.recipe import Recipe, resolve

MODEL = "acmize_vit_digits"
OPTIONS: dict[str, Any] = {
    "budget": 0.6,
    "budgets": [0.75],
    "limit": 64,
    "moments": 32,
    "batch_size": 16,
    "acm": {"num_learners": 3, "gate_hidden": 4},
    "distill": {"epochs": 1, "tokens": 64},
    "gates": {"rounds": 1, "images": 20, "draws": 1, "steps": 60},
    "train": {"epochs": 1, "hflip": 0.0, "crop_scale": [0.8, 1.0]},
}


def recipe(*layers: dict[str, Any], preset: str = "default") -> Recipe:
    """A recipe that runs in two seconds on the digits."""
    return resolve(OPTIONS, *layers, preset_name=preset)


def converted(*layers: dict[str, Any], preset: str = "default", data: Any = None, **options: Any) -> Any:
    """The packaged digits model, converted with short options."""
    made = recipe(*layers, preset=preset)
    return convert(load_model(MODEL), data=digits_dataset() if data is None else data, recipe=made, **options)


def image_folder(root: Path, counts: dict[str, int] | None = None, labels: bool = True) -> Path:
    """The first digits as PNG files: root/train/0/0.png and so on, or root/train/0.png without labels."""
    for split, count in (counts or {"train": 40, "test": 20}).items():
        rows = digits_dataset()[split].select(range(count))
        for number, row in enumerate(rows):
            folder = root / split
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{number}.png")
        if labels:
            lines = ["file_name,label", *(f"{number}.png,{row['label']}" for number, row in enumerate(rows))]
            (root / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def picture(size: int = 8, level: int = 128) -> Image.Image:
    """A grey square."""
    return Image.new("L", (size, size), level)


def config_file(path: Path, *layers: dict[str, Any]) -> Path:
    """The short options as a YAML file (JSON is YAML)."""
    merged = json.loads(json.dumps(OPTIONS))
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    path.write_text(json.dumps(merged))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `acmize WORDS` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["acmize", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def refused(captured: Any) -> str:
    """The one line that the command wrote to stderr for what the user can mend."""
    lines = [line for line in captured.err.splitlines() if line.startswith("acmize: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.err.rstrip().endswith(lines[0])
    return lines[0]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have bitwise the same state."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def timeless(results: Any) -> Any:
    """Results without what a clock measured."""
    if isinstance(results, dict):
        return {k: timeless(v) for k, v in results.items() if k not in ("seconds", "latency_ms")}
    return [timeless(v) for v in results] if isinstance(results, list) else results


class Killed(BaseException):
    """Stands for a kill: no handler for errors catches it."""


def kill(monkeypatch: pytest.MonkeyPatch, phase: str, after: int) -> list[Path]:
    """Let the `after`-th checkpoint of a phase be written, then stop at the next one; a checkpoint every step.

    Returns:
        The folders that this phase's checkpoints were to go to, one for each, as they come.
    """
    save, seen, configs = _loop.save_training_state, [], _loop.FitConfig.__init__

    def counting(folder: Path, **state: Any) -> None:
        if Path(folder).name == phase:
            seen.append(folder)
            if len(seen) > after:
                raise Killed
        save(folder, **state)

    def often(self: Any, **options: Any) -> None:
        configs(self, **{**options, "checkpoint_every": 1})

    monkeypatch.setattr(_loop, "save_training_state", counting)
    monkeypatch.setattr(_loop.FitConfig, "__init__", often)
    return seen
