"""ResNet-20 on CIFAR-10 with LAG: each sample runs a prefix of the channels of each block, beside controls.

Command:   python recipes/lag_resnet20.py --output runs/lag                          10,000 training images
           python recipes/lag_resnet20.py --output runs/lag-full --data FOLDER       all 50,000 (FOLDER as written by
                                                                     tools/cifar10_full.py of the assets)
           python recipes/lag_resnet20.py --smoke                    random weights, digits, under a minute
Shows:     rows at three budgets (.8, .7, .6 of 40.6 M MACs), all from the given weights:
           label-free        damage gates, no training
           damage            damage gates, then phase 3
           logistic          the published kind of gate, made to depend on the input, phase 3
           random            widths drawn from the histograms of `damage`
           static            the same share of channels for every sample and block, label-free and trained like phase 3
           removed           `damage` at the largest budget, what almost no sample runs cut off: parameters
Data:      CIFAR-10. 10 % of the training images are held out for calibration; nothing is chosen on the test split. The
           given weights were trained on all training images, the held-out ones too: their errors are no guide, so the
           weights are not interpolated with those before training.
Seed:      0.
Versions:  in results.json.

Result:    docs/results.md, "CNN backbones".
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import _common as common
import _training as training

from acmize.recipe import resolve

VARIANTS: dict[str, dict[str, Any]] = {
    "label-free": {"gate": "damage"},
    "damage": {"gate": "damage"},
    "logistic": {"gate": "logistic"},
}


def main() -> None:
    """Train what is missing, print the table."""
    parser = common.parser(__doc__ or "", __file__, (0.8, 0.7, 0.6))
    common.training_options(parser, epochs=4, lr=5e-4)
    parser.add_argument("--num-learners", type=int, default=4)
    rows_of = [*VARIANTS, "static"]
    parser.add_argument("--variants", nargs="+", default=rows_of, choices=rows_of)
    args = parser.parse_args()
    options, budgets = common.start(args, __file__), tuple(args.budgets)
    options.pop("acm", None)  # --smoke: options of another method
    data, more = common.cifar10_options(args, "lag")
    # Phase 3 stays near the budgets that are wanted: a network as small as this one pays for every other one.
    more["losses"]["budgets"] = (min(budgets) - 0.02, min(0.95, max(budgets) + 0.08))
    if not args.smoke:
        more |= {"gates": {"images": 4000, "steps": 800, "budgets": (0.5, 0.95)}, "moments": 2000}
    dense = common.resnet20(args)

    def recipe(name: str) -> Any:
        phases = () if name == "label-free" else ("gates", "finetune")
        config = {**VARIANTS[name], "num_learners": args.num_learners}
        return resolve(options, more, {"config": config, "phases": phases})

    bench = common.Bench(dense, data, recipe("damage"))

    @cache
    def adaptive(name: str) -> Any:
        return common.converted(args.output / "models" / name, dense, data, recipe(name))

    @cache
    def static() -> Any:
        path = args.output / "models" / "static.safetensors"
        return training.static_(path, bench, recipe("damage"), copy.deepcopy(adaptive("label-free")))

    rows = common.Rows(args, __file__)
    rows.measure("dense", lambda: common.dense_row(bench))
    for name in (v for v in args.variants if v in VARIANTS):
        for budget in budgets:
            rows.measure(f"{name} @ {budget:g}", lambda n=name, b=budget: bench.gated(adaptive(n), b))
    if "damage" in args.variants:
        for budget in budgets:
            rows.measure(f"random @ {budget:g}", lambda b=budget: bench.random(adaptive("damage"), b, args.seed))
        training.removed_rows(rows, "damage, removed", bench, copy.deepcopy(adaptive("damage")), budgets)
    if "static" in args.variants:
        plain = adaptive("label-free")
        for budget in budgets:
            rows.measure(f"static, label-free @ {budget:g}", lambda b=budget: bench.static(plain, plain.plan, b))
            rows.measure(f"static, trained @ {budget:g}", lambda b=budget: bench.static(static(), static().plan, b))
    rows.show({**common.columns(), "parameters": lambda _, r: f"{r['parameters']:,}" if "parameters" in r else "-"})


if __name__ == "__main__":
    main()
