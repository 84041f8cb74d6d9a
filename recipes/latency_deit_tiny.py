"""Time of an adaptive DeiT-Tiny against the dense one, interleaved, on real photographs.

Command:   python recipes/latency_deit_tiny.py --from DIR --output runs/latency      a saved conversion
           python recipes/latency_deit_tiny.py --smoke                               the digits model, under a minute
Shows:     median milliseconds a batch of both models, run in turns on the same photographs in shuffled order (choices
           depend on data), and their ratio. The dense model is eager PyTorch; against a compiled one the ratio differs.
Data:      test photographs of imagenet_mini in ACMIZE_ASSETS.
Seed:      0.
Hardware:  not yet run.
Versions:  in results.json.

Result:    not yet run.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import _common as common
import torch

from acmize.cost import evaluating
from acmize.hub import from_pretrained
from acmize.recipe import resolve

BUDGETS = (0.9, 0.75, 0.6, 0.5)


def timed(model: Any, batch: torch.Tensor) -> float:
    """Seconds of one forward."""
    start = time.perf_counter()
    model(batch)
    return time.perf_counter() - start


def compare(dense: Any, adaptive: Any, images: torch.Tensor, size: int, rounds: int, seed: int) -> common.Row:
    """Medians over rounds; each round runs both models on the same batch, in alternating order."""
    generator, times = torch.Generator().manual_seed(seed), ([], [])
    with evaluating(dense, adaptive), torch.inference_mode():
        for number in range(rounds + 3):
            batch = images[torch.randperm(len(images), generator=generator)[:size]]
            pair = [(0, dense), (1, adaptive)]
            for side, model in pair if number % 2 else reversed(pair):
                seconds = timed(model, batch)
                if number >= 3:
                    times[side].append(seconds)
    ratio = statistics.median(d / a for d, a in zip(*times, strict=True))
    return {"dense_ms": 1e3 * statistics.median(times[0]), "ms": 1e3 * statistics.median(times[1]), "speedup": ratio}


def main() -> None:
    """Measure every budget at every batch size."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--from", dest="trained", type=Path, help="folder of a saved conversion")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    options = common.start(args, __file__)
    if args.smoke:
        args.rounds, args.batch_sizes = 5, [8]
    rows = common.Rows(args, __file__)
    dense = common.deit_tiny(args)
    recipe = resolve(options, {"phases": (), "budgets": tuple(args.budgets)})
    bench = common.Bench(dense, common.photographs(args.smoke), recipe)
    if args.trained is not None:
        adaptive = from_pretrained(args.trained)
    else:
        adaptive = common.converted(args.output / "model", dense, bench.data, recipe)
    images = torch.cat([inputs for inputs, _ in bench.test])[:256].to(args.device)
    for budget in args.budgets:
        for size in args.batch_sizes:

            def measure(budget: float = budget, size: int = size) -> common.Row:
                adaptive.set_budget(budget)
                found = compare(dense, adaptive, images, size, args.rounds, args.seed)
                return {"budget": budget, "batch_size": size, **found}

            rows.measure(f"{budget:g} x {size}", measure)
    rows.show(
        {
            "budget": lambda _, r: f"{r['budget']:g}",
            "batch": lambda _, r: f"{r['batch_size']}",
            "dense ms": lambda _, r: f"{r['dense_ms']:.1f}",
            "adaptive ms": lambda _, r: f"{r['ms']:.1f}",
            "speedup": lambda _, r: f"{r['speedup']:.2f}",
        }
    )


if __name__ == "__main__":
    main()
