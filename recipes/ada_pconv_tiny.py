"""TinyModel on CIFAR-10 with Ada-PConv, trained from scratch: hard routing beside soft, and beside one branch for all.

Command:   python recipes/ada_pconv_tiny.py --output runs/ada --data FOLDER --epochs 30 --seeds 0 1 2 --device cuda
                                            the published protocol (FOLDER as written by tools/cifar10_full.py)
           python recipes/ada_pconv_tiny.py --output runs/ada-small --data FOLDER --limit 20000 --epochs 12
               --mixed-precision bf16       reduced, for a CPU: an hour on 2 cores
           python recipes/ada_pconv_tiny.py --output runs/ada-time --time --threads 2      no training, a quiet machine
           python recipes/ada_pconv_tiny.py --smoke                                               digits, under a minute
Shows:     for each seed, all from the same start, with the same batches:
           baseline          static partial convolutions, r = 1/4: always 1/4
           always 1/8, 1/2   the same with another r
           soft              as published: all three branches, weighed
           hard              one branch a sample, grouped; hinge on the cost above r = 1/4, balance term
           random            `hard` with branches drawn from each router's own histogram
           With --time: milliseconds of baseline, soft and hard, random weights, each branch drawn for a third of the
           samples, in turns on the same images.
Protocol:  AdamW 1e-3, cosine, batch 128, no augmentation, as published; which part of the data and how many epochs: in
           results.json. 10 % of the training images are held out (histograms of `random`); nothing is chosen on the
           test split, which each row reads once.
Seed:      --seeds.
Versions:  in results.json.

Result:    docs/results.md, "CNN backbones"; the published protocol: not yet run.
"""

from __future__ import annotations

import copy
from statistics import fmean, stdev
from typing import Any

import _common as common
import _training as training
import timm
import torch
from torch import nn

import acmize.cifar_models  # noqa: F401 - registers TinyModel
from acmize.bench import same_products
from acmize.controls import histograms, random_choice
from acmize.cost import count_macs
from acmize.evaluate import evaluate_at, reference
from acmize.gates import choosing, set_dial
from acmize.hosts import example_input, make_plan
from acmize.init import init_
from acmize.insert import convert_
from acmize.methods.ada_pconv import AdaPConvConfig
from acmize.recipe import resolve
from acmize.timing import WARMUP, Call, draws, interleaved, percentiles, threads

NAME = "acmize_fasternet_tiny_cifar"
DIVISORS = {"baseline": 4, "always 1/8": 8, "always 1/2": 2}
TRAINED = 0.5  # position of the dial at which a router's price is zero


def tiny(args: Any, divisor: int = 4) -> nn.Module:
    """TinyModel with random weights, partial convolutions on 1 / divisor of the channels."""
    return timm.create_model(NAME, n_div=divisor).to(args.device)


def trained(args: Any, bench: common.Bench, recipe: Any, name: str, model: nn.Module, seed: int) -> nn.Module:
    """The model after training under the protocol above."""
    path = args.output / "models" / f"{name.replace(' ', '-').replace('/', '')}-{seed}.safetensors"
    return training.from_scratch_(path, bench, recipe, model, seed=seed, augment=False)


def main() -> None:
    """Train what is missing, print every row and the means over seeds."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--data", help="folder of CIFAR-10 (default: that of ACMIZE_ASSETS, 10,000 training images)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--time", action="store_true", help="only that: nothing is trained")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    options = common.start(args, __file__)
    options.pop("acm", None)  # --smoke: options of another method
    more: dict[str, Any] = {"method": "ada-pconv", "holdout": 0.1, "batch_size": 32 if args.smoke else 128}
    recipe = resolve(options, more, {"train": {"epochs": 1 if args.smoke else args.epochs}})
    data = common.photographs(True) if args.smoke else args.data or str(common.assets() / "data" / "cifar10")
    rows = common.Rows(args, __file__)
    found = timed(args, common.Bench(tiny(args), data, recipe)) if args.time or args.smoke else []
    if args.time:
        for row in found:
            rows.measure(f"{row['model']}, batch of {row['batch_size']}", lambda row=row: row)
        return rows.show(
            {
                "model": lambda key, _: key,
                "ms": lambda _, r: f"{r['ms']:.2f}",
                "over soft": lambda _, r: f"{r['over_soft']:.2f}",
                "over the baseline": lambda _, r: f"{r['over_baseline']:.2f}",
            }
        )
    for seed in args.seeds:
        measure(args, rows, recipe, data, seed)
    for name in (*DIVISORS, "soft", "hard", "random"):
        found = [rows.found["rows"][f"{name}, seed {seed}"] for seed in args.seeds]
        rows.measure(f"{name}, mean of {len(found)}", lambda found=found: mean(found))
    rows.show(
        {
            "method": lambda key, _: key,
            "executed MMACs": lambda _, r: f"{r['macs'] / 1e6:.1f}",
            "share of the baseline's": lambda _, r: f"{r['macs_ratio']:.3f}",
            "top-1 %": lambda _, r: common.percent(r["accuracy"]),
            "spread": lambda _, r: common.percent(r.get("spread")),
        }
    )


def mean(found: list[common.Row]) -> common.Row:
    """Mean over seeds, and the spread of their accuracies."""
    accuracies = [r["accuracy"] for r in found]
    spread = stdev(accuracies) if len(found) > 1 else None
    sizes = {key: fmean(r[key] for r in found) for key in ("macs", "macs_ratio")}
    return {**sizes, "accuracy": fmean(accuracies), "spread": spread}


def routed_model(dense: nn.Module, mode: Any) -> tuple[nn.Module, Any]:
    """The model with routers, which weigh nothing by price; and its plan."""
    plan = make_plan(dense, AdaPConvConfig(mode=mode))
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, {})
    set_dial(model, TRAINED)
    return model.eval(), plan


def timed(args: Any, bench: common.Bench) -> list[common.Row]:
    """Median milliseconds of the untrained models, for one image and for 64."""
    generator, rounds = torch.Generator().manual_seed(0), 2 if args.smoke else 60
    start = same_products(bench.model).eval()
    models = {"baseline": start, **{mode: routed_model(bench.model, mode)[0] for mode in ("soft", "hard")}}
    images, rows = next(iter(bench.test))[0], []

    def evenly(gate: Any, x: Any) -> Any:
        return torch.randint(1, gate.num_learners + 1, (*x.shape[:-1], gate.groups), generator=generator)

    with threads(args.threads), torch.inference_mode(), choosing(models["hard"], evenly):
        for size in (1, min(64, len(images))):
            batches = [images[index] for index in draws(len(images), size, WARMUP + rounds, generator)]
            spent = interleaved({name: Call(model) for name, model in models.items()}, batches)
            ms = {name: percentiles(seconds)["p50"] for name, seconds in spent.items()}
            over = {name: {"over_soft": ms["soft"] / t, "over_baseline": ms["baseline"] / t} for name, t in ms.items()}
            rows += [{"model": name, "batch_size": size, "ms": t, **over[name]} for name, t in ms.items()]
    return rows


def measure(args: Any, rows: common.Rows, recipe: Any, data: Any, seed: int) -> None:
    """All rows of one seed."""
    torch.manual_seed(seed)
    start = tiny(args)
    bench, example = common.Bench(start, data, recipe), example_input(start)
    whole = count_macs(start, example)

    def static(name: str) -> common.Row:
        torch.manual_seed(seed)
        model = start if name == "baseline" else tiny(args, DIVISORS[name])
        macs = count_macs(model, example)
        made = trained(args, bench, recipe, name, copy.deepcopy(model), seed)
        accuracy = reference(made, bench.test).accuracy
        return {"macs": macs, "macs_dense": whole, "macs_ratio": macs / whole, "accuracy": accuracy}

    def routed(mode: Any, at_random: bool = False) -> common.Row:
        model, plan = routed_model(start, mode)
        model = trained(args, bench, recipe, mode, model, seed)
        chosen = histograms(model, bench.held)
        choose = random_choice(model, chosen, torch.Generator().manual_seed(seed)) if at_random else None
        found = evaluate_at(model, plan, bench.test, reference(model, bench.test), choose)
        use = {name: (counts[1:] / counts.sum()).tolist() for name, counts in chosen.items()}
        return {**found, "macs_dense": whole, "branches": use}

    for name in DIVISORS:
        rows.measure(f"{name}, seed {seed}", lambda n=name: static(n))
    for mode in ("soft", "hard"):
        rows.measure(f"{mode}, seed {seed}", lambda m=mode: routed(m))
    rows.measure(f"random, seed {seed}", lambda: routed("hard", at_random=True))


if __name__ == "__main__":
    main()
