"""Phase 1 on two processes: sites divided among them, beside samples divided among them.

Command:   python recipes/by_site.py --output runs/by_site
           python recipes/by_site.py --smoke            a tiny ViT, a minute
Shows:     of each way, for each process: seconds of the training steps, and by how much its largest resident memory
           rose over what it was before phase 1 (gradients, AdamW's moments, captured tokens); and the ratios.
           The learners are random weights of the plan, the images noise: neither time nor memory depends on them.
Data:      none.
Seed:      0.
Hardware:  CPU, two processes of one thread each (gloo).
Time:      see docs/scale.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import _common as common
import torch

from acmize import parallel
from acmize.environment import fresh_peak_bytes, peak_bytes
from acmize.hosts import make_plan
from acmize.insert import converted
from acmize.methods.acm import AcmConfig
from acmize.models import architecture
from acmize.phases._loop import FitConfig
from acmize.phases.distill import distill

WAYS = ("rows", "sites")


def worker(args: Any, by_site: bool) -> None:
    """Train in this process; print its seconds and how far its memory rose."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    parallel.join(torch.device("cpu"))
    dense = architecture("vit_tiny_patch16_224" if args.smoke else args.model)
    model = converted(dense, make_plan(dense, AcmConfig()))
    source = converted(dense, make_plan(dense, AcmConfig()))
    size = dense.pretrained_cfg["input_size"]

    def batches(epoch: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(epoch)
        return (torch.randn(args.batch_size, *size, generator=generator) for _ in range(args.steps))

    before = fresh_peak_bytes()
    parallel.wait()
    start = time.perf_counter()
    config = FitConfig(epochs=1, lr=1e-4, seed=args.seed)
    distill(model, source, batches, steps_per_epoch=args.steps, config=config, tokens=args.tokens, by_site=by_site)
    told = {"seconds": time.perf_counter() - start, "mb": (peak_bytes() - before) / 1e6, "before_mb": before / 1e6}
    told = {k: [each] for k, each in told.items()}
    merged = {k: parallel.gather_objects(v) for k, v in told.items()}
    if parallel.is_main():
        print(json.dumps(merged))


def main() -> None:
    """Launch both ways, one after the other, and print their ratios."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", choices=WAYS, help=common.argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch_size = 2, 4
    if args.worker:
        worker(args, args.worker == "sites")
        return
    common.start(args, __file__)
    rows = common.Rows(args, __file__)

    def measure(way: str) -> common.Row:
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            args.processes,
            "--master-port",
            29617,
        ]
        own = ["--worker", way, *sys.argv[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, [*words, __file__, *own])), env=env, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1])

    found = {way: rows.measure(way, lambda way=way: measure(way)) for way in WAYS}
    rows.show(
        {
            "divided by": lambda key, _: key,
            "seconds": lambda _, r: f"{max(r['seconds']):.1f}",
            "memory of phase 1, each process": lambda _, r: ", ".join(f"{mb:.0f} MB" for mb in r["mb"]),
            "before it": lambda _, r: ", ".join(f"{mb:.0f} MB" for mb in r["before_mb"]),
        }
    )
    if all(found.values()):
        by = {k: max(found["sites"][k]) / max(found["rows"][k]) for k in ("seconds", "mb")}
        print(f"sites over rows: time {by['seconds']:.2f}, memory of phase 1 {by['mb']:.2f}")


if __name__ == "__main__":
    main()
