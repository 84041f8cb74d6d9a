"""Does a conversion on two processes end as it does on one: losses of every phase, budgets, results.

Command:   python recipes/two_processes.py --output runs/two --limit 60
           python recipes/two_processes.py --output runs/two --limit 60 --by-site --shard
           python recipes/two_processes.py --output runs/two_fsdd --limit 120 --speech runs/fsdd_wav2vec2/dense-0
           python recipes/two_processes.py --output runs/two_each --limit 60 --each
           python recipes/two_processes.py --smoke            the packaged digits model
Shows:     DeiT-Tiny, or a small wav2vec2 that fsdd_wav2vec2.py trained, all three phases, one epoch: for each phase the
           largest difference of a logged loss between one process and two (absolute, and relative to the loss), of a
           realised budget, and of the KL to the dense model.
           AdamW makes steps of rounding where a gradient is next to zero, so these grow with the steps, and from
           phase to phase; with --each, two processes begin every phase where one process began it.
Data:      `imagenet_mini`, or FSDD with --speech; --limit a split.
Seed:      0.
Hardware:  CPU, processes of one thread (gloo).
Time:      4 minutes for 60 photographs, 1 to 2 for 60 recordings.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import _common as common
import torch

from acmize import parallel
from acmize.api import convert
from acmize.checkpoint import load_tensors, read_json, save_tensors, write_json
from acmize.conversion import Conversion
from acmize.models import load_model
from acmize.phases import distill, finetune, pretrain_gates
from acmize.recipe import resolve

PHASES: Any = (distill, pretrain_gates, finetune)


def worker(args: Any, options: dict[str, Any], out: Path) -> None:
    """Convert in this process; the main one writes what was logged and measured."""
    torch.set_num_threads(1)
    logs: dict[str, list[float]] = {}

    def logging(fit: Any) -> Any:
        def call(**given: Any) -> Any:
            history = fit(**{**given, "config": replace(given["config"], log_every=1)})
            logs[given["name"].split("-0-of")[0]] = [terms["loss"] for terms in history.logs]
            return history

        return call

    for phase in PHASES:
        phase.fit = logging(phase.fit)
    if args.each:
        begin_alike(args.output / "stages")
    own = {"distill": {"epochs": 1, "by_site": args.by_site}, "train": {"epochs": 1, "shard": args.shard}}
    recipe = resolve(options, {"batch_size": 16, "budget": 0.5, "budgets": (0.75, 0.5)}, own)
    if args.speech is None:
        dense, data = common.deit_tiny(args), common.photographs(args.smoke)
    else:
        dense, data = load_model(str(args.speech)), str(common.assets() / "data" / "fsdd")
    made = convert(dense, data=data, recipe=recipe)
    if parallel.is_main():
        rows = [{k: r[k] for k in ("budget", "macs_ratio", "kl")} for r in made.results["results"]]
        write_json(out, {"logs": logs, "rows": rows, "seconds": made.recipe["seconds"]})


def begin_alike(folder: Path) -> None:
    """One process keeps what each stage leaves; several go on from that in place of their own."""
    plain = Conversion.stage

    def stage(job: Conversion, name: str, run: Any) -> None:
        plain(job, name, run)
        if parallel.processes() > 1:
            job.model.load_state_dict(load_tensors(folder / f"{name}.safetensors"))
        else:
            save_tensors(folder / f"{name}.safetensors", job.model.state_dict())

    Conversion.stage = stage


def main() -> None:
    """Run both and print the differences."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--by-site", action="store_true", help="phase 1 with sites divided")
    parser.add_argument("--shard", action="store_true", help="phase 3 with weights divided")
    parser.add_argument("--each", action="store_true", help="both begin each phase from the same weights")
    parser.add_argument("--speech", type=Path, help="folder of a speech model of 8 kHz")
    parser.add_argument("--worker", type=Path, help=common.argparse.SUPPRESS)
    args = parser.parse_args()
    options = common.start(args, __file__)
    if args.worker is not None:
        worker(args, options, args.worker)
        return
    found = {}
    for count in (1, 2):
        out = args.output / f"{count}.json"
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        words = [sys.executable, *launch, __file__, *sys.argv[1:], "--worker", str(out.absolute())]
        subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        found[count] = read_json(out)
    one, two = found[1], found[2]
    for name, losses in one["logs"].items():
        pairs = list(zip(losses, two["logs"][name], strict=True))
        worst = max(abs(a - b) for a, b in pairs)
        share = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
        print(f"{name}: {len(pairs)} logged losses, largest difference {worst:.1e} ({share:.1e} of the loss)")
    for a, b in zip(one["rows"], two["rows"], strict=True):
        told = ", ".join(f"{k} {a[k]:.5f} and {b[k]:.5f}" for k in ("macs_ratio", "kl"))
        print(f"budget {a['budget']:g}: {told}; difference {abs(a['macs_ratio'] - b['macs_ratio']):.1e}")


if __name__ == "__main__":
    main()
