"""kill -9 at random moments of a conversion: each is resumed, and ends with the numbers of the unbroken run.

    python bench/kills.py                    # 200 kills
    python bench/kills.py --smoke            # 6

A tiny ViT on tiny images goes through all three phases, with a checkpoint after every step so that many kills fall into
a write. Each conversion is killed at moments drawn evenly over the time that a whole one takes, resumed, killed again
(`--each` times in all) and then left to end. After every kill each file under its final name has to be readable; at the
end the weights have to be those of the unbroken run, bit for bit, and the results the same, and nothing may be left
over. Exit status 1 otherwise. One process, which never computes, forks all of them, to import torch once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
OPTIONS: dict[str, Any] = {
    "budget": 0.7,
    "budgets": [0.8],
    "batch_size": 8,
    "moments": 16,
    "acm": {"num_learners": 2, "gate_hidden": 2},
    "distill": {"epochs": 2, "tokens": 32},
    "gates": {"rounds": 2, "images": 16, "draws": 1, "steps": 20},
    "train": {"epochs": 3},
}
STAGES = ("init", "distill", "gates", "finetune")


class Conversion:
    """One conversion, the same every time, in a child process.

    Args:
        seed: of data, weights and options.
    """

    def __init__(self, seed: int) -> None:
        import datasets
        import numpy as np
        import timm
        import torch
        from PIL import Image

        from acmize.hub import base_of
        from acmize.phases import _loop

        draw = np.random.default_rng(seed)

        def split(count: int) -> Any:
            pixels = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
            rows = {"image": [Image.fromarray(p) for p in pixels], "label": draw.integers(0, 5, count).tolist()}
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            return datasets.Dataset.from_dict(rows, features=features)

        self.data = datasets.DatasetDict(train=split(40), test=split(12))
        torch.manual_seed(seed)
        self.model = timm.create_model("vit_tiny_patch16_224", **SIZES)
        self.base, self.seed = base_of(self.model, dict(SIZES)), seed
        begin = _loop.FitConfig.__init__
        often: Any = lambda config, **options: begin(config, **{**options, "checkpoint_every": 1})  # noqa: E731
        _loop.FitConfig.__init__ = often

    def start(self, output: Path) -> int:
        """Convert or resume in a child; returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            from acmize.api import convert
            from acmize.recipe import resolve

            recipe, work = resolve(OPTIONS, {"seed": self.seed}), work_of(output)
            convert(self.model, data=self.data, recipe=recipe, base=self.base, work=work, resume=True, output=output)
            status = 0
        except Exception:  # the process ends below, so nothing else would tell
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


def work_of(output: Path) -> Path:
    """Where a conversion keeps its checkpoints."""
    return output.with_name(output.name + ".work")


def unreadable(folder: Path) -> list[str]:
    """Files under their final names that cannot be read."""
    from acmize.checkpoint import load_tensors, read_json
    from acmize.errors import AcmizeError

    wrong = []
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
            continue
        try:
            {".json": read_json, ".safetensors": load_tensors}.get(file.suffix, Path.read_text)(file)
        except AcmizeError as error:
            wrong.append(str(error))
    return wrong


def stage_of(work: Path) -> str:
    """The stage that a kill fell into."""
    if not work.is_dir():
        return "before or after"
    return next((name for name in STAGES if not (work / f"{name}.safetensors").exists()), "calibration")


def figures(output: Path) -> tuple[bytes, Any]:
    """Weights and results of a conversion, without what a clock measured."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    files = [json.loads((output / name).read_text()) for name in ("results.json", "plan.json")]
    return (output / "model.safetensors").read_bytes(), timeless(files)


def run(kills: int, each: int, seed: int, folder: Path) -> dict[str, Any]:
    """Conversions until so many kills have fallen.

    Returns:
        Counts, seconds of the unbroken run and of all, and "wrong": whatever was not as it should be.
    """
    draw, begun = random.Random(seed), time.perf_counter()
    conversion = Conversion(seed)
    start = time.perf_counter()
    _, status = os.waitpid(conversion.start(folder / "whole"), 0)
    whole = time.perf_counter() - start
    if status:
        raise SystemExit(f"the unbroken run ended with status {status}")
    expected, fallen, wrong, finished = figures(folder / "whole"), Counter[str](), [], 0
    while fallen.total() < kills or work_of(folder / "broken").exists():
        output, left = folder / "broken", min(each, kills - fallen.total())
        shutil.rmtree(output, ignore_errors=True)
        while True:
            start = time.perf_counter()
            again = left < min(each, kills)  # less is to be done after a kill
            pid, delay = conversion.start(output), draw.uniform(0, whole / 2 if again else whole)
            while left and delay > 0 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(min(delay, 0.01))
                delay -= 0.01
            if left:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                left -= 1
                fallen[stage_of(work_of(output))] += 1
                wrong += [f"kill {fallen.total()}: {text}" for text in unreadable(folder)]
                continue
            whole = whole if again else min(whole, time.perf_counter() - start)
            break
        finished += 1
        if status:
            wrong.append(f"conversion {finished}: a resumed run ended with status {os.waitstatus_to_exitcode(status)}")
            shutil.rmtree(work_of(output), ignore_errors=True)
        elif figures(output) != expected:
            wrong.append(f"conversion {finished}: the result differs from that of the unbroken run")
        if (left_over := sorted(p.name for p in folder.iterdir())) != ["broken", "whole"] and not status:
            wrong.append(f"conversion {finished}: left over: {left_over}")
        print(f"{fallen.total()} kills, {finished} conversions, {time.perf_counter() - begun:.0f} s", flush=True)
    return {
        "kills": fallen.total(),
        "resumes": fallen.total(),
        "by_stage": dict(fallen),
        "conversions": finished,
        "seconds_unbroken": round(whole, 2),
        "seconds": round(time.perf_counter() - begun, 1),
        "wrong": wrong,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="kills of one conversion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="6 kills of two conversions")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    kills, each = (6, 3) if args.smoke else (args.kills, args.each)
    with tempfile.TemporaryDirectory() as name:
        found = run(kills, each, args.seed, Path(name))
    print(json.dumps(found, indent=2))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
