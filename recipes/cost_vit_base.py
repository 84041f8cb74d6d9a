"""What a conversion costs: time and peak memory for ViT-B/16, label-free, on 256 photographs.

Command:   python recipes/cost_vit_base.py --output runs/cost
           python recipes/cost_vit_base.py --output runs/cost --bench     and what it gains in time
           python recipes/cost_vit_base.py --smoke            the digits model, under a minute
Shows:     seconds of each stage and the largest resident memory of the process (Python, torch, the
           photographs and both models included) for `vit_base_patch16_224` with `--phases none`. The weights are
           random: time and memory do not depend on them, accuracy means nothing here and is not printed.
           With --bench: as `acmize bench --compile-adaptive`, for batches of 1 and 8, both models in their faster
           form, eager or compiled: over dense so, and over its fastest form, which may be eager with our products.
Data:      generated photographs (smooth colour noise, seed 0), 256 a split or --limit of them; nothing is read.
Seed:      0.
Hardware:  2 cores of a shared x86-64 machine (AVX-512, bf16), nothing beside it.
Time:      11 to 13 minutes (--mixed-precision bf16), 10 more with --bench.
Versions:  in results.json.

Result:    docs/results.md, "Cost of converting ViT-B". The aim: under 8 GB and under 15 minutes on 2 cores.
"""

from __future__ import annotations

import time
from typing import Any

import _common as common
import numpy as np
import torch

from acmize.api import convert
from acmize.bench import bench_model
from acmize.environment import peak_bytes
from acmize.images import Images
from acmize.models import architecture
from acmize.recipe import resolve
from acmize.timing import Setting

BUDGETS = (1.0, 0.5, 0.25)
REPEATS = 10  # a batch of 8 takes seconds


def generated(count: int, size: int, channels: int, seed: int) -> Any:
    """Smooth noise as (count) images of `size` pixels a split, with labels 0."""
    from datasets import Dataset, DatasetDict, Features, Image, Value
    from PIL import Image as PILImage

    generator = np.random.default_rng(seed)
    features = Features({"image": Image(), "label": Value("int64")})

    def photograph() -> Any:
        small = generator.integers(0, 256, (8, 8, channels), dtype=np.uint8)
        return PILImage.fromarray(small.squeeze()).resize((size, size), PILImage.Resampling.BICUBIC)

    def split() -> Any:
        columns = {"image": [photograph() for _ in range(count)], "label": [0] * count}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(train=split(), test=split())


def cell(row: dict[str, Any]) -> str:
    """A row of `bench_model` in a few characters: against the faster of eager and compiled, and against all forms."""
    plain = min(row["dense_forms_ms"].get(form, float("inf")) for form in ("eager", "compiled"))
    batch = f"batch {row['batch_size']} at {row['budget']:g}"
    return f"{plain / row['latency_ms']['p50']:.2f}, {row['speedup']:.2f} ({batch})"


def main() -> None:
    """Convert, print what it cost."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--bench", action="store_true", help="time the result beside the dense model")
    args = parser.parse_args()
    options = common.start(args, __file__)
    rows = common.Rows(args, __file__)

    torch.manual_seed(args.seed)
    model = architecture("acmize_vit_digits" if args.smoke else args.model).to(args.device)
    channels, _, size = model.pretrained_cfg["input_size"]
    count = options.get("limit") or 256
    data, loaded = generated(count, size, channels, args.seed), peak_bytes() / 1e9
    recipe = resolve(options, {"phases": (), "budget": 0.5, "budgets": BUDGETS})

    def measure() -> common.Row:
        start = time.perf_counter()
        made = convert(model, data=data, recipe=recipe)
        found = {
            "seconds": time.perf_counter() - start,
            "stages": made.recipe["seconds"],
            "images": count,
            "parameters": sum(p.numel() for p in model.parameters()),
            "before_gb": loaded,
            "peak_gb": peak_bytes() / 1e9,
            "peaks_gb": made.recipe["peak_gb"],
        }
        return {**found, "bench": timed(made)} if args.bench else found

    def timed(made: Any) -> Any:
        images = Images(data, model, recipe)
        inputs = torch.cat(list(images.batches(images.test)))
        setting = Setting(device=args.device, seed=args.seed, repeats=REPEATS)
        return bench_model(made, model, inputs, None, (1, 8), setting, ("dense", "adaptive"))

    rows.measure("acmize_vit_digits" if args.smoke else args.model, measure)
    gained = lambda _, r: ", ".join(map(cell, r.get("bench", {}).get("results", [])))  # noqa: E731
    rows.show(
        {
            "model": lambda key, _: key,
            "parameters": lambda _, r: f"{r['parameters'] / 1e6:.1f} M",
            "photographs": lambda _, r: f"{r['images']}",
            "seconds": lambda _, r: f"{r['seconds']:.0f}",
            "of these": lambda _, r: ", ".join(f"{k} {v:.0f}" for k, v in r["stages"].items()),
            "peak memory": lambda _, r: f"{r['peak_gb']:.2f} GB ({r['before_gb']:.2f} before)",
            "after": lambda _, r: ", ".join(f"{k} {v:.2f}" for k, v in r["peaks_gb"].items()),
            "speedup over PyTorch, over the fastest dense form": gained,
        }
    )


if __name__ == "__main__":
    main()
