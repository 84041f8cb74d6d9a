"""The published method beside this project's default, on the same photographs at the same budget.

Command:   python recipes/paper_preset_deit_tiny.py --output runs/paper
           python recipes/paper_preset_deit_tiny.py --smoke            the digits model, under a minute
Shows:     `--preset paper` (arXiv 2312.10193 without the defects of its code: 4 random learners, low-rank projections,
           classification gates on threshold labels, no teacher, one budget a run) and `--preset default`, all three
           phases, one budget each. The paper trains 2 + 1 + 97 epochs on 1.28 million images; here both get the same
           few epochs on a few hundred photographs, which random learners cannot be expected to recover from. This is
           a comparison of what little data gives, not of the published figures.
Data:      imagenet_mini of ACMIZE_ASSETS: 900 photographs to fit on (135 of them held out for calibration), 600 to
           test on.
Seed:      0.
Hardware:  one core of a shared x86-64 machine, no GPU.
Time:      40 minutes with --epochs 4 --mixed-precision bf16, beside other work.
Versions:  in results.json (torch 2.14.1, timm 1.0.31).

Result:    docs/results.md, "The published method beside the default" (--epochs 4).
"""

from __future__ import annotations

from typing import Any

import _common as common

from acmize.recipe import resolve

PRESETS = ("default", "paper")


def main() -> None:
    """Convert by each preset, print the table."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--epochs", type=int, help="of phase 3 (default: the preset's)")
    parser.add_argument("--distill-epochs", type=int, help="of phase 1 (default: the preset's)")
    args = parser.parse_args()
    options = common.start(args, __file__)
    dense, data = common.deit_tiny(args), common.photographs(args.smoke)
    more: dict[str, Any] = {"budget": args.budget, "budgets": (args.budget,)}
    if args.epochs is not None:
        more["train"] = {**options.get("train", {}), "epochs": args.epochs}
    if args.distill_epochs is not None:
        more["distill"] = {"epochs": args.distill_epochs}
    bench = common.Bench(dense, data, resolve(options))
    rows = common.Rows(args, __file__)

    def measure(preset: str) -> common.Row:
        recipe = resolve(options, more, preset_name=preset)
        model = common.converted(args.output / "models" / preset, dense, data, recipe)
        plan, acm = model.plan, model.plan.config
        return {
            **bench.gated(model, args.budget),
            "form": f"{acm.num_learners} {acm.init}, {acm.projections}",
            "gates": acm.gate,
            "gates_share": sum(e.tokens * e.gate_macs for e in plan.entries) / plan.macs_dense,
            "floor": plan.budget_range[0],
            "phases": model.recipe["seconds"],
            "findings": model.results["findings"],
        }

    rows.measure("dense", lambda: common.dense_row(bench))
    for preset in PRESETS:
        rows.measure(preset, lambda p=preset: measure(p))
    rows.show(
        {
            **common.columns("preset"),
            "learners": lambda _, r: r.get("form", "-"),
            "gates": lambda _, r: r.get("gates", "-"),
            "gates, % of MACs": lambda _, r: common.percent(r.get("gates_share")),
            "lowest budget": lambda _, r: f"{r['floor']:.2f}" if "floor" in r else "-",
            "minutes": lambda _, r: f"{sum(r['phases'].values()) / 60:.1f}" if "phases" in r else "-",
        }
    )


if __name__ == "__main__":
    main()
