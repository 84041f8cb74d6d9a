"""One order of tokens for a whole block: what it would cost in accuracy, and what it could gain in time.

Each site sorts its tokens by its own choices and puts them back. Were every site's width to fall along one order of its
block, tokens could stay in that order and be moved once a block. Each site here keeps how many tokens of a sample run
how many learners, and hands these widths out in one order; so MACs are equal, and only the order differs.

Command:   python recipes/sort_once.py --model out --output runs/sort_once
           python recipes/sort_once.py --model out --output runs/sort_time --time --threads 2     on a quiet machine
           python recipes/sort_once.py --smoke                 the digits model, under a minute
Shows:     top-1, agreement and KL of
           own            every site in the order of its own choices: the product
           first gate     one order a block, by the mean log damage that its first gate predicts
           attention, MLP one order for q, k, v and out (by that gate), the MLP in its own: which tokens matter to one
                          need not matter to the other
           random         any order: what is left when a gate says how much, but not for which token
           With --time: the share of the time of a forward that goes into sorting and moving tokens at all, which is
           what one order could save a part of.
Data:      imagenet_mini of ACMIZE_ASSETS: the 600 test photographs.
Seed:      0.
Hardware:  2 cores of a shared x86-64 machine, no GPU.
Versions:  in results.json.

Result:    docs/performance.md, "One order a block".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _common as common
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from acmize.cost import evaluating
from acmize.gates import Choose, Gate, gates_of
from acmize.hub import from_pretrained
from acmize.recipe import resolve
from acmize.recording import AdaptiveModule
from acmize.timing import threads

BUDGETS = (0.75, 0.5)
SIZES = (1, 8)
MOVES = ("aten::sort", "aten::index_select", "aten::scatter_", "aten::bincount", "aten::gather", "aten::index")


def own_choice(gate: Any, x: Tensor) -> Tensor:
    """What a gate decides for tokens (B, T, D): (B, T, G)."""
    return gate.energies(x)[..., gate.min_choice :].argmin(-1) + gate.min_choice


def handed_out(choice: Tensor, score: Tensor) -> Tensor:
    """The choices (B, T, G) of each sample, the largest to the tokens of the highest score (B, T)."""
    order = score.sort(dim=1, descending=True, stable=True).indices[..., None].expand_as(choice)
    return torch.empty_like(choice).scatter_(1, order, choice.sort(1, descending=True).values)


def ordered(model: Any, by: str, generator: torch.Generator) -> Choose:
    """A `Choose`: own numbers of learners, in the order that a row of the table is named for."""
    adaptive = [m for m in model.modules() if isinstance(m, AdaptiveModule) and m.names]
    blocks = {m.gate: ".".join(m.names[0].split(".")[:2]) for m in adaptive}
    first = {block: gate for gate, block in reversed(blocks.items())}
    scores: dict[str, Tensor] = {}

    def choose(gate: Gate, x: Tensor) -> Tensor:
        choice, block = own_choice(gate, x), blocks[gate]
        if gate is first[block]:
            damage: Any = gate
            scores[block] = damage.log_damage(x).mean((-2, -1))
        if by == "random":
            return handed_out(choice, torch.rand(choice.shape[:2], generator=generator))
        if by == "first gate" or gate is first[block]:
            return handed_out(choice, scores[block])
        return choice

    return choose


def moving(model: Any, images: Tensor, repeats: int) -> float:
    """Share of the time of forwards that sorting and moving tokens takes."""
    with evaluating(model):
        for _ in range(2):
            model(images)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(repeats):
                model(images)
    spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(spent.get(name, 0.0) for name in MOVES) / sum(spent.values())


def main() -> None:
    """Evaluate each order, print the table."""
    parser = common.parser(__doc__ or "", __file__, budgets=BUDGETS)
    parser.add_argument("--model", type=Path, help="folder of a converted model")
    parser.add_argument("--time", action="store_true", help="profile as well")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    options = common.start(args, __file__)
    dense, data = common.deit_tiny(args), common.photographs(args.smoke)
    recipe = resolve(options, {"phases": (), "budget": 0.5, "budgets": args.budgets})
    if args.model is None:
        model = common.converted(args.output / "models" / "label-free", dense, data, recipe)
    else:
        model = from_pretrained(args.model)
    assert gates_of(model), "a model that only merges tokens sorts nothing"
    bench, rows = common.Bench(dense, data, recipe), common.Rows(args, __file__)
    rows.measure("dense", lambda: common.dense_row(bench))
    images = torch.cat(list(bench.images.batches(bench.images.test, max(SIZES))))

    for budget in args.budgets:
        model.set_budget(budget)
        rows.measure(f"own @ {budget}", lambda b=budget: bench.gated(model, b))
        for by in ("attention, MLP", "first gate", "random"):
            choose = ordered(model, by, torch.Generator().manual_seed(args.seed))
            rows.measure(
                f"{by} @ {budget}", lambda b=budget, c=choose: {"budget": b, **bench.row(model, model.plan, c)}
            )
        for size in SIZES if args.time else ():
            with threads(args.threads):
                share = moving(model, images[:size], 10)
            print(f"budget {budget:g}, batch of {size}: {share:.1%} of the time goes into sorting and moving tokens")
    rows.show(common.columns("order"))


if __name__ == "__main__":
    main()
