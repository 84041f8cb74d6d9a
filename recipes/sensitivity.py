"""Sensitivity to the number of learners N and to the label threshold tau.

Command:   python recipes/sensitivity.py --output runs/sensitivity
           python recipes/sensitivity.py --smoke            the digits model, under a minute
Shows:     N    label-free conversions with N = 2, 4, 8, 16, 32 learners a site: accuracy at two budgets, share of the
                gates in the MACs, and the local error left at half of the learners, relative to running none (mean
                over sites of a kind; every site and every k in results.json).
           tau  published threshold gates at tau = 1.05, 1.1, 1.2, 1.5 on the default's learners without merging:
                MACs and accuracy of the gates as trained, then moved by a price to the two budgets.
           Calibrations use the held-out photographs only.
Data:      imagenet_mini of ACMIZE_ASSETS: 900 photographs to fit on (135 of them held out for calibration), 600 to
           test on.
Seed:      0.
Hardware:  one core of a shared x86-64 machine, no GPU.
Time:      70 minutes with --limit 450, beside other work.
Versions:  in results.json (torch 2.14.1, timm 1.0.31).

Result:    docs/results.md, "Sensitivity" (--limit 450).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import _common as common
import torch

from acmize.gates import set_dial
from acmize.phases.pretrain_gates import collect_errors
from acmize.recipe import resolve
from acmize.recording import AdaptiveModule

LEARNERS = (2, 4, 8, 16, 32)
TAUS = (1.05, 1.1, 1.2, 1.5)
BUDGETS = (0.75, 0.5)
KINDS = {"q, k": (".q", ".k"), "v": (".v",), "out": (".proj",), "mlp": (".mlp",)}


def errors(model: Any, bench: common.Bench, seed: int) -> dict[str, list[float]]:
    """Entry -> E d(k)^2 / E d(0)^2 for k = 0..N, on held-out images, inputs as at full width."""
    generator = torch.Generator().manual_seed(seed)
    data = collect_errors(model, model, bench.held[:1], generator=generator)
    names = {m.gate: m.names for m in model.modules() if isinstance(m, AdaptiveModule) and m.names}
    out = {}
    for gate, rows in data.items():
        for name, d in zip(names[gate], rows.damage.square().double().mean(0), strict=True):
            out[name] = (d / d[0].clamp_min(1e-30)).tolist()
    return out


def at_half(row: common.Row, ends: tuple[str, ...]) -> str:
    """Mean over the sites of a kind of the error left at half of the learners."""
    found = [e[len(e) // 2] for name, e in row.get("errors", {}).items() if name.endswith(ends)]
    return f"{sum(found) / len(found):.3f}" if found else "-"


def main() -> None:
    """Measure what is missing, print the table."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--learners", type=int, nargs="+", default=list(LEARNERS))
    parser.add_argument("--taus", type=float, nargs="+", default=list(TAUS))
    args = parser.parse_args()
    if args.smoke:
        args.learners, args.taus = [2, 8], [1.2]
    options = {**common.start(args, __file__), "phases": (), "budgets": tuple(args.budgets)}
    dense, data = common.deit_tiny(args), common.photographs(args.smoke)
    bench, rows = common.Bench(dense, data, resolve(options)), common.Rows(args, __file__)

    @cache
    def made(num_learners: int, tau: float | None) -> Any:
        more: dict[str, Any] = {"acm": {"num_learners": num_learners}}
        name = f"learners-{num_learners}"
        if tau is not None:
            more |= {"gates": {"labels": "threshold", "tau": tau}, "merge": "none"}
            name = f"tau-{tau:g}"
        return common.converted(args.output / "models" / name, dense, data, resolve(options, more))

    def by_learners(num_learners: int, budget: float) -> common.Row:
        model = made(num_learners, None)
        share = sum(e.tokens * e.gate_macs for e in model.plan.entries) / model.plan.macs_dense
        found = {**bench.gated(model, budget), "gates_share": share}
        if budget == args.budgets[0]:
            found["errors"] = errors(model, bench, args.seed)
        return found

    def by_tau(tau: float, budget: float | None) -> common.Row:
        model = made(8, tau)
        if budget is not None:
            return bench.gated(model, budget)
        set_dial(model, 0.5)  # a price of nothing
        return bench.row(model, model.plan)

    def todo() -> Iterator[tuple[str, Any]]:
        for n in args.learners:
            for b in args.budgets:
                yield f"N = {n} @ {b:g}", lambda n=n, b=b: by_learners(n, b)
        for tau in args.taus:
            for b in (None, *args.budgets):
                name = "as trained" if b is None else f"{b:g}"
                yield f"tau = {tau:g} @ {name}", lambda t=tau, b=b: by_tau(t, b)

    rows.measure("dense", lambda: common.dense_row(bench))
    for key, run in todo():
        rows.measure(key, run)
    rows.show(
        {
            **common.columns("setting"),
            "gates, % of MACs": lambda _, r: common.percent(r.get("gates_share")),
            **{f"error at N/2, {kind}": lambda _, r, e=ends: at_half(r, e) for kind, ends in KINDS.items()},
        }
    )


if __name__ == "__main__":
    main()
