"""ResNet-20 on CIFAR-10 with CosineGate: samples skip residual blocks, beside every control at about equal MACs.

Command:   python recipes/cosine_gate_resnet20.py --output runs/cosine                       10,000 training images
           python recipes/cosine_gate_resnet20.py --output runs/cosine-full --data FOLDER    all 50,000 (FOLDER as
                                                                     written by tools/cifar10_full.py of the assets)
           python recipes/cosine_gate_resnet20.py --smoke            random weights, digits, under a minute
Shows:     rows at one budget (default .71: 29.0 M of 40.6 M MACs) and at .6, all from the given weights:
           label-free        damage gates, no training
           predict           the published gate with a predicted CIR, skips for real; three phases
           plain             the same without CIR (ConvNet-AIG)
           damage            damage gates, trained likewise
           oracle            as published, F(x) is always computed: its budget is what it would execute if it could skip
           random            the blocks' rates of `predict`, and of `damage`, drawn by chance
           static            the subset of blocks that is nearest to the dense model on held-out images, no gates;
                             label-free, and trained like phase 3
Data:      CIFAR-10. 10 % of the training images are held out for calibration and the static subset; nothing is chosen
           on the test split. The given weights were trained on all training images, the held-out ones too: their
           errors are no guide, so the weights are not interpolated with those before training.
Seed:      0.
Versions:  in results.json.

Result:    docs/results.md, "CNN backbones".
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import combinations
from typing import Any

import _common as common
import _training as training
from torch import nn

from acmize.controls import by_name, gates_share
from acmize.evaluate import evaluate_at, reference
from acmize.phases.calibrate import Calibration
from acmize.plan import Plan
from acmize.recipe import resolve

VARIANTS: dict[str, dict[str, Any]] = {
    "label-free": {"gate": "damage"},
    "predict": {"gate": "cosine"},
    "plain": {"gate": "plain"},
    "damage": {"gate": "damage"},
    "oracle": {"gate": "cosine", "mode": "oracle"},
}


def best_subset(bench: common.Bench, model: nn.Module, plan: Plan, dropped: int) -> dict[str, int]:
    """Entry -> 0 or 1: the blocks left out together that change the dense model's held-out answers least (KL)."""
    some = [batch for batch, _ in zip(bench.images.labelled(bench.images.held), range(8), strict=False)]
    dense, names = reference(bench.model, some), [e.fqn for e in plan.entries]
    choices = [{name: int(name not in out) for name in names} for out in combinations(names, dropped)]
    return min(choices, key=lambda c: evaluate_at(model, plan, some, dense, by_name(model, c))["kl"])


def main() -> None:
    """Train what is missing, print the table."""
    parser = common.parser(__doc__ or "", __file__, (0.71, 0.6))
    common.training_options(parser, epochs=2, lr=1e-3)
    rows_of = [*VARIANTS, "static"]
    parser.add_argument("--variants", nargs="+", default=rows_of, choices=rows_of)
    args = parser.parse_args()
    options, budgets = common.start(args, __file__), tuple(args.budgets)
    options.pop("acm", None)  # --smoke: options of another method
    data, more = common.cifar10_options(args, "cosine-gate")
    more["losses"]["budgets"] = (min(budgets) - 0.02, min(0.95, max(budgets) + 0.05))
    if not args.smoke:
        more |= {"gates": {"images": 8000, "budgets": (0.5, 0.95)}}  # one row an image: with 2,000 gates fit noise
    dense = common.resnet20(args)

    def recipe(name: str) -> Any:
        phases = () if name == "label-free" else ("gates", "finetune")
        return resolve(options, more, {"config": VARIANTS[name], "phases": phases})

    bench = common.Bench(dense, data, recipe("predict"))

    @cache
    def adaptive(name: str) -> Any:
        return common.converted(args.output / "models" / name, dense, data, recipe(name))

    @cache
    def subset(dropped: int) -> dict[str, int]:
        return best_subset(bench, adaptive("label-free"), adaptive("label-free").plan, dropped)

    def static_row(dropped: int, trained: bool) -> common.Row:
        """Metrics of the best subset; it pays for no gates."""
        model, choices = copy.deepcopy(adaptive("label-free")), subset(dropped)
        choose, plan = by_name(model, choices), model.plan
        if trained:
            path, whole = (
                args.output / "models" / f"static-{dropped}.safetensors",
                Calibration(budgets=(1.0,), dials=(0.0,)),
            )
            training.control_(path, bench, recipe("predict"), model, choose, whole)
        found = bench.row(model, plan, choose)
        ratio = found["macs_ratio"] - gates_share(model, plan)
        out = [name for name, kept in choices.items() if not kept]
        return {**found, "macs_ratio": ratio, "chosen_ratio": ratio, "macs": ratio * plan.macs_dense, "without": out}

    rows = common.Rows(args, __file__)
    rows.measure("dense", lambda: common.dense_row(bench))
    for name in (v for v in args.variants if v in VARIANTS):
        for budget in budgets:
            rows.measure(f"{name} @ {budget:g}", lambda n=name, b=budget: bench.gated(adaptive(n), b))
        for budget in budgets if name in ("predict", "damage") else ():
            rows.measure(
                f"random, as {name} @ {budget:g}", lambda n=name, b=budget: bench.random(adaptive(n), b, args.seed)
            )
    if "static" in args.variants:
        for trained in (False, True):
            for dropped in (2, 3):
                name = f"static, {'trained' if trained else 'label-free'}, {dropped} blocks out"
                rows.measure(name, lambda d=dropped, t=trained: static_row(d, t))
    columns = common.columns()
    columns["executed MMACs"] = lambda _, r: f"{r['macs_ratio'] * macs / 1e6:.1f}"
    columns["chosen"] = lambda _, r: f"{r.get('chosen_ratio', 1.0):.3f}"
    macs = adaptive("label-free").plan.macs_dense
    rows.show(columns)


if __name__ == "__main__":
    main()
