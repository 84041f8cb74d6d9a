"""Ablation of the three auxiliary losses of phase 3: budget L_b, choice entropy L_e, diversity L_d.

Command:   python recipes/aux_losses.py --output runs/aux_losses
           python recipes/aux_losses.py --smoke            the digits model, under a minute
Shows:     short finetunes of one shared label-free conversion at one budget: with all three losses as published,
           without each of them, without any, and with each three times as strong. Columns: MACs realised as trained
           (the price as it came in: what L_b is for) and after calibration, top-1, KL; normalised entropy of a site's
           choices within a sample; spread of the samples' MACs; sites where every token makes the same choice
           (collapse).
Data:      imagenet_mini of ACMIZE_ASSETS: 900 photographs to fit on (135 of them held out for calibration), 600 to
           test on.
Seed:      0.
Hardware:  2 cores of a shared x86-64 machine, no GPU; one thread.
Time:      half an hour (--epochs 1 --mixed-precision bf16), beside other work.
Versions:  in results.json.

Result:    docs/results.md, "The three auxiliary losses".
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import _common as common
import torch
from torch import Tensor, nn

from acmize.cost import evaluating
from acmize.phases.calibrate import calibrate
from acmize.phases.finetune import FinetuneConfig, finetune
from acmize.recipe import resolve
from acmize.recording import record

TERMS = ("budget", "entropy", "diversity")


def variants() -> dict[str, dict[str, float]]:
    """Name of a row -> weights of the three losses; "all three" has the published ones."""
    full = {term: getattr(FinetuneConfig(), term) for term in TERMS}
    found = {"all three": full}
    found |= {f"without {term}": full | {term: 0.0} for term in TERMS}
    found["without any"] = dict.fromkeys(TERMS, 0.0)
    return found | {f"{term} x 3": full | {term: 3 * full[term]} for term in TERMS}


def choices(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """`choice_entropy`, mean over sites and samples in 0..1, and `collapsed` sites, with the gates as they are set."""
    entropies, seen_choices = [], {}
    with evaluating(model):
        for batch in batches:
            with record(model, len(batch)) as seen:
                model(batch)
            for name, choice in seen.per_token.items():
                sizes = len(seen.choices[name])
                share = nn.functional.one_hot(choice, sizes).double().mean(1)
                entropies.append(-(share * share.clamp_min(1e-12).log()).sum(-1).mean() / math.log(sizes))
                seen_choices.setdefault(name, set()).update(choice.unique().tolist())
    collapsed = sum(len(used) == 1 for used in seen_choices.values())
    return {"choice_entropy": torch.stack(entropies).mean().item(), "collapsed": collapsed}


def main() -> None:
    """Convert once, finetune each variant, print the table."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--epochs", type=int, default=3, help="of each finetune")
    args = parser.parse_args()
    args.epochs = 1 if args.smoke else args.epochs
    options = common.start(args, __file__)
    budget, around = args.budget, (args.budget + 0.1, args.budget, args.budget - 0.1)
    more: dict[str, Any] = {"budget": budget, "budgets": around, "phases": ()}
    recipe = resolve(options, more)
    dense, data = common.deit_tiny(args), common.photographs(args.smoke)
    shared = common.converted(args.output / "models" / "shared", dense, data, recipe)
    bench = common.Bench(dense, data, recipe)
    rows = common.Rows(args, __file__)

    def row(model: Any, trained: float) -> common.Row:
        model.calibration = calibrate(model, model.plan, bench.held, [budget])
        found = bench.gated(model, budget)
        return {**found, **choices(model, bench.held), "as_trained": trained}

    def measure(weights: dict[str, float]) -> common.Row:
        model = copy.deepcopy(shared)
        batches, steps = bench.images.epochs(bench.images.augmented, recipe.seed + 1)
        losses = dataclasses.replace(recipe.losses, budgets=(budget, budget), **weights)
        loop = recipe.loop(epochs=args.epochs, lr=recipe.train.lr, weight_decay=recipe.train.weight_decay)
        finetune(
            model, dense, model.plan, model.calibration, batches, steps_per_epoch=steps, losses=losses, config=loop
        )
        return row(model, bench.gated(model, budget)["macs_ratio"])

    rows.measure("before", lambda: row(copy.deepcopy(shared), bench.gated(shared, budget)["macs_ratio"]))
    for name, weights in variants().items():
        rows.measure(name, lambda w=weights: measure(w))
    rows.show(
        {
            **common.columns("losses"),
            "MACs as trained": lambda _, r: f"{r['as_trained']:.3f}",
            "choice entropy": lambda _, r: f"{r['choice_entropy']:.3f}",
            "spread of MACs": lambda _, r: f"{r['macs_ratio_std']:.4f}",
            "collapsed sites": lambda _, r: f"{r['collapsed']}",
        }
    )


if __name__ == "__main__":
    main()
