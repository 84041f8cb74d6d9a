"""Label-free frontier of DeiT-Tiny: gates, their rivals and their controls at equal realised MACs.

Command:   python recipes/frontier_deit_tiny.py --output runs/frontier            all rows
           python recipes/frontier_deit_tiny.py --output runs/frontier --from DIR  and a trained checkpoint's
           python recipes/frontier_deit_tiny.py --smoke                            the digits model, under a minute
Shows:     accuracy against executed MACs on one test split, without labels and without training the model:
           product            merging and damage gates, as `acmize convert --phases none` makes them
           damage gates       the same without merging
           local-error gates  the same learners; gates that regress the squared error of the site's own output, in
                              absolute terms or relative to the error of running nothing; one price
           threshold gates    the published classification gates on labels from tau = 1.2, moved by a price
           random gates       each token draws from the damage gates' own histograms (gates counted, as recorded)
           static width       every token alike; pays for no gates
           token merging      the dense model with merged tokens only; pays for no gates
Data:      imagenet_mini of ACMIZE_ASSETS: 900 photographs to fit on (135 of them held out, for every calibration),
           600 to test on. Budgets are realised on the held-out ones, so the column MACs tells what the test did.
Seed:      0.
Hardware:  2 cores of a shared x86-64 machine, no GPU.
Time:      about an hour, beside other work.
Versions:  in results.json (torch 2.14.1, timm 1.0.31).

Result:    docs/results.md, "Label-free frontier, beside its rivals".
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import _common as common
import torch

from acmize.controls import merge_to
from acmize.damage import GateData
from acmize.gates import Gate
from acmize.hub import from_pretrained
from acmize.methods.token_merging import install_merging
from acmize.phases.calibrate import calibrate
from acmize.phases.pretrain_gates import collect_errors, fit_damage_gates
from acmize.recipe import Recipe, resolve

BUDGETS = (0.9, 0.75, 0.6, 0.5)


class Frontier:
    """The models of the table, each made when its first row is wanted."""

    def __init__(self, args: Any, options: dict[str, Any]) -> None:
        self.args, self.options = args, {**options, "phases": (), "budgets": tuple(args.budgets)}
        self.dense = common.deit_tiny(args)
        self.recipe = resolve(self.options)
        self.bench = common.Bench(self.dense, common.photographs(args.smoke), self.recipe)
        self.converted, self.local = cache(self._converted), cache(self._local)

    def _converted(self, name: str, merge: str = "none", labels: str = "damage") -> Any:
        options = {"merge": merge, "gates": {**self.options.get("gates", {}), "labels": labels}}
        recipe: Recipe = resolve(self.options, options)
        return common.converted(self.args.output / "models" / name, self.dense, self.bench.data, recipe)

    def _local(self, relative: bool) -> Any:
        model = copy.deepcopy(self.converted("damage"))
        images, options = self.bench.images, self.recipe.gates
        batches = images.batches(images.fit, options.images)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        data = collect_errors(model, copy.deepcopy(model), batches, generator=generator, keep_tokens=0.25)
        fit_damage_gates(squared(data, relative), steps=2 * options.steps, seed=self.recipe.seed)
        model.calibration = calibrate(model, model.plan, self.bench.held, self.args.budgets)
        return model

    def random(self, budget: float) -> common.Row:
        """Each token draws from the histograms of the damage gates at this budget."""
        return self.bench.random(self.converted("damage"), budget, self.recipe.seed)

    def merging(self, budget: float) -> common.Row:
        """The dense model with as many tokens merged as the budget asks for."""
        plan = self.converted("product", "auto").plan
        merged = copy.deepcopy(self.dense)
        install_merging(merged)
        ratio = merge_to(merged, plan.merging, budget, plan.macs_dense)
        return {"budget": budget, **self.bench.plain(merged, ratio)}


def squared(data: dict[Gate, GateData], relative: bool) -> dict[Gate, GateData]:
    """Errors d(0..N) (M, G, N + 1) -> d(0..N-1)^2 in a unit that suits the dial: one of all sites, or each its own."""
    whole = torch.cat([d.damage[..., 0].square().flatten() for d in data.values()]).mean()
    out = {}
    for gate, d in data.items():
        unit = d.damage[..., :1].square().mean(0, keepdim=True) if relative else whole
        out[gate] = GateData(d.x, 1e-2 * d.damage[..., :-1].square() / unit, d.dial)
    return out


SHOWN = ("product, label-free", "token merging", "damage gates", "local-error gates, absolute", "static width")


def plot(rows: common.Rows, path: Path) -> None:
    """The rows of `SHOWN` as lines: top-1 against executed MACs."""
    plt = common.pyplot()
    if plt is None:
        return
    plt.rcParams["svg.hashsalt"] = path.name  # the same file from the same numbers
    plt.rcParams["svg.fonttype"] = "none"  # text, a fifth of the size of outlines
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    found = rows.found["rows"]
    for name in SHOWN:
        mine = [row for key, row in found.items() if key.startswith(f"{name} @")]
        x, y = [row["macs_ratio"] for row in mine], [100 * row["accuracy"] for row in mine]
        axes.plot(x, y, "o-", label=name, linewidth=3 if name == SHOWN[0] else 1.5)
    axes.axhline(100 * found["dense"]["accuracy"], color="gray", linestyle=":", label="dense")
    axes.set(
        xlabel="executed MACs, share of the dense model", ylabel="top-1, %", title="DeiT-Tiny, no labels, no training"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure what is missing; print the table, draw it."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--from", dest="trained", type=Path, metavar="DIR", help="a trained checkpoint to add")
    args = parser.parse_args()
    run = Frontier(args, common.start(args, __file__))
    bench, made = run.bench, run.converted
    methods = {
        "product, label-free": lambda b: bench.gated(made("product", "auto"), b),
        "token merging": run.merging,
        "damage gates": lambda b: bench.gated(made("damage"), b),
        "random gates": run.random,
        "static width": lambda b: bench.static(made("damage"), made("damage").plan, b),
        "local-error gates, relative": lambda b: bench.gated(run.local(True), b),
        "local-error gates, absolute": lambda b: bench.gated(run.local(False), b),
        "threshold gates": lambda b: bench.gated(made("threshold", "none", "threshold"), b),
    }
    if args.trained is not None:
        trained = cache(lambda: from_pretrained(args.trained).to(args.device))
        methods[f"trained ({args.trained.name})"] = lambda b: bench.gated(trained(), b)
    rows = common.Rows(args, __file__)
    rows.measure("dense", lambda: common.dense_row(bench))
    for name, measure in methods.items():
        for budget in args.budgets:
            rows.measure(f"{name} @ {budget:g}", lambda m=measure, b=budget: m(b))
    rows.show(common.columns())
    plot(rows, args.output / "frontier.svg")


if __name__ == "__main__":
    main()
