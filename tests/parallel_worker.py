"""Runs the cases of tests/test_parallel.py in each of several processes: `parallel_worker.py FOLDER` under torchrun.

The main process writes FOLDER/CASE.json (what was logged, calibrated and measured) and CASE.safetensors (the weights).
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from short import OPTIONS
from tiny import vit
from torch import nn

from acmize import parallel
from acmize.api import convert
from acmize.checkpoint import save_tensors
from acmize.phases import _shard, distill, finetune, pretrain_gates
from acmize.recipe import resolve

IMAGES: dict[str, Any] = {
    "limit": None, "batch_size": 15, "distill": {"epochs": 1, "tokens": 100, "lr": 1e-3},
    "gates": {"rounds": 2, "steps": 20, "images": 33, "compensate": True},
    "train": {"epochs": 1, "accumulate": 2, "mixup": 0.5},
    "losses": {"task": 0.3, "entropy": 0.1, "diversity": 0.1},
}  # fmt: skip
HELD: dict[str, float] = {}  # parameters that phase 1 trains here; the share of all that phase 3 holds here
SPEECH: dict[str, Any] = {
    "budget": 0.9, "budgets": [0.95], "moments": 8, "batch_size": 3, "holdout": 0.3,
    "acm": {"num_learners": 4, "gate_hidden": 2}, "gates": {"rounds": 2, "draws": 1, "steps": 10},
    "distill": {"tokens": 64}, "train": {"epochs": 1}, "losses": {"task": 0.5, "teacher": 1.0},
}  # fmt: skip


def noise(count: int, seed: int) -> Any:
    """Pictures without redundant pixels: where moments are singular, the order of a sum decides on a basis."""
    from datasets import Dataset
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Dataset.from_dict(
        {"image": [Image.fromarray(each) for each in pixels], "label": [i % 5 for i in range(count)]}
    )


def converted(*layers: dict[str, Any], preset: str = "default") -> Any:
    """A tiny ViT, converted."""
    from datasets import DatasetDict

    dense: Any = vit(depth=3)
    dense.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.3,) * 3, "crop_pct": 1.0}
    recipe = resolve(OPTIONS, *layers, preset_name=preset)
    data = DatasetDict({"train": noise(60, 0), "test": noise(21, 1)})
    return convert(dense, data=data, recipe=recipe, base={"architecture": "tiny"})


def images(_: Path) -> Any:
    """All phases on pictures: an odd batch, mixed samples, two batches a step, biases refitted."""
    return converted(IMAGES)


def divided(_: Path) -> Any:
    """Phase 1 with the sites divided among processes, phase 3 with the weights."""
    inside: Any = _shard.sharded

    @contextmanager
    def watched(model: nn.Module) -> Iterator[nn.Module]:
        with inside(model) as twin:
            assert not any(p.numel() for p in model.parameters())
            parts: Any = list(twin.parameters())
            HELD["finetune"] = sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts)
            yield twin

    finetune.sharded = watched
    own = {"distill": {"by_site": True}, "train": {"shard": True}, "gates": {"rounds": 1}}
    return converted(IMAGES, own)


def gates(_: Path) -> Any:
    """Gates alone, with the optimizer that they are trained with."""
    return converted({**IMAGES, "phases": [], "gates": {**IMAGES["gates"], "images": 36, "compensate": False}})


def one_gate(_: Path) -> Any:
    """The same with fewer gates than there are processes."""
    own = {"phases": [], "gates": {"rounds": 2, "steps": 20, "images": 33}, "budget": 0.95, "budgets": []}
    return converted({**IMAGES, **own, "target_modules": ["blocks.1.mlp*"]})


def published(_: Path) -> Any:
    """The paper's gates: threshold labels, no damages."""
    return converted({**IMAGES, "phases": ["gates"], "gates": {"steps": 20, "images": 33}}, preset="paper")


def speech(folder: Path) -> Any:
    """All phases on noise of unequal lengths; the last batch has fewer recordings than there are processes."""
    from tiny_speech import SIZES, _ctc

    off = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    dense = _ctc("Wav2Vec2", **{**SIZES, "do_stable_layer_norm": True, "final_dropout": 0.0, "layerdrop": 0.0, **off})()
    recordings = folder / "recordings"
    listened(dense, recordings)
    return convert(dense, data=str(recordings), **SPEECH)


def listened(dense: Any, folder: Path) -> None:
    """Give a model its processor."""
    import transformers as tf
    from test_speech import _tokenizer

    from acmize.hf_models import Processor

    features = tf.Wav2Vec2FeatureExtractor(sampling_rate=8_000, return_attention_mask=True, do_normalize=False)
    own = folder / f"tokenizer-{os.environ.get('RANK', '0')}"  # both write its vocabulary
    own.mkdir(exist_ok=True)
    dense.processor = Processor(features, _tokenizer(own, "ctc"))


def record_noise(folder: Path) -> None:
    """Noise of unequal lengths with transcripts, one of them unknown."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 5)):
        (folder / split).mkdir(parents=True)
        rows = ["file_name,transcription"]
        for i in range(count):
            wave = 0.2 * rng.normal(size=1500 + 300 * i).clip(-4, 4)
            soundfile.write(folder / split / f"{i}.flac", wave, 8000)
            rows.append(f"{i}.flac," + ("" if i == 3 else "A BAD CAB"))
        (folder / split / "metadata.csv").write_text("\n".join(rows) + "\n")


CASES: dict[str, Callable[[Path], nn.Module]] = {
    "images": images, "divided": divided, "gates": gates, "one_gate": one_gate, "published": published, "speech": speech
}  # fmt: skip
EXACT = ("gates", "one_gate")  # bit for bit those of one process


def plain(params: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """In place of AdamW, which divides a gradient by its size: that hides a factor, and makes rounding a step."""
    return torch.optim.SGD(params, lr=10 * lr, momentum=0.9, weight_decay=weight_decay)


def run(case: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a case logged, calibrated and measured, and its weights."""
    logs: dict[str, Any] = {}
    modules: Any = (distill, finetune, pretrain_gates)
    before, adam = {module: module.fit for module in modules}, torch.optim.AdamW

    def logging(fit: Any) -> Any:
        def call(**options: Any) -> Any:
            options["config"] = type(options["config"])(**{**vars(options["config"]), "log_every": 1})
            if options["name"].startswith("distill"):
                HELD["distill"] = sum(p.numel() for p in options["params"])
            history = fit(**options)
            logs[options["name"].split("-0-of")[0]] = history.logs
            return history

        return call

    for module, fit in before.items():
        module.fit = logging(fit)
    torch.optim.AdamW = adam if case in EXACT else plain  # pyright: ignore[reportAttributeAccessIssue]
    try:
        torch.manual_seed(0)
        made: Any = CASES[case](folder)
    finally:
        torch.optim.AdamW = adam
        for module, fit in before.items():
            module.fit = fit
    rows = [{k: v for k, v in row.items() if k not in ("seconds",)} for row in made.results["results"]]
    told = {"held": dict(HELD), "logs": logs, "calibration": made.calibration.to_dict(), "results": rows}
    return told, {k: v.detach().clone() for k, v in made.state_dict().items()}


def main() -> None:
    """Run every case in this process; the main one writes."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # Registered before anything joins, so it runs after all that joining registers.
    atexit.register(lambda: (folder / f"met.{os.environ['RANK']}").write_text(str(torch.distributed.is_initialized())))
    for case in sys.argv[2:] or CASES:
        told, weights = run(case, folder)
        if parallel.is_main():
            (folder / f"{case}.json").write_text(json.dumps({"processes": parallel.processes(), **told}))
            save_tensors(folder / f"{case}.safetensors", weights)


if __name__ == "__main__":
    main()
