"""Controls at equal executed MACs: what a gate has to beat to be worth having.

    static    every token alike: one share of the learners everywhere
    random    each token draws its choice from the histogram the gate itself has at this budget
    full      nothing is cut (with a merging schedule: token merging alone)

Each is a `Choose` for `choosing(model, ...)`, so the model, its learners and its evaluation are the same as the gate's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from acmize.cost import evaluating
from acmize.gates import AdaptiveModule, Choose, Gate, record
from acmize.methods.token_merging import schedule_of
from acmize.plan import Plan


def static_width(model: nn.Module, plan: Plan, budget: float) -> Choose:
    """Every token runs the same number of learners at a site, the same share at every site, at a budget.

    Shares between two whole numbers of learners are met by rounding up at as many sites, evenly spread, as the budget
    allows.
    """
    rest, scale = plan.macs_rest(schedule_of(model)), _tokens_left(model, plan)
    free = (budget - gates_share(model, plan)) * plan.macs_dense - rest

    def spent(share: float) -> tuple[float, dict[str, int]]:
        total, choices, debt = 0.0, {}, 0.0
        for e in plan.entries:
            wanted = share * e.num_learners + debt
            k = min(max(round(wanted), e.min_choice), e.num_learners)
            debt = wanted - k if 0 < share < 1 else 0.0
            choices[e.fqn] = k
            total += scale * e.tokens * sum(e.learner_macs[:k])
        return total, choices

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle)[0] <= free else (low, middle)
    return by_name(model, spent(low)[1])


def gates_share(model: nn.Module, plan: Plan) -> float:
    """MACs of the gates with the merging schedule in force, as a share of the dense model's.

    `evaluate_at` counts them for a control too, though a static width could do without.
    """
    return _tokens_left(model, plan) * sum(e.tokens * e.gate_macs for e in plan.entries) / plan.macs_dense


def _tokens_left(model: nn.Module, plan: Plan) -> float:
    """Mean over blocks of the share of tokens that merging leaves."""
    schedule = schedule_of(model)
    if plan.merging is None or not schedule:
        return 1.0
    return sum(plan.merging.counts(schedule)) / (plan.merging.tokens * plan.merging.blocks)


def by_name(model: nn.Module, choices: Mapping[str, int]) -> Choose:
    """A fixed number of learners for each plan entry."""
    table = {g: [choices[n] for n in names] for g, names in _names(model).items()}

    def choose(gate: Gate, x: Tensor) -> Tensor:
        return torch.tensor(table[gate], device=x.device).expand(*x.shape[:-1], gate.groups)

    return choose


def random_choice(model: nn.Module, histograms: Mapping[str, Tensor], generator: torch.Generator) -> Choose:
    """Each token draws from its entry's histogram of choices, as recorded with the gates on."""
    table = {g: [histograms[n].double().cpu() for n in names] for g, names in _names(model).items()}

    def choose(gate: Gate, x: Tensor) -> Tensor:
        tokens = x[..., 0].numel()
        drawn = [torch.multinomial(p, tokens, replacement=True, generator=generator) for p in table[gate]]
        return torch.stack(drawn, -1).view(*x.shape[:-1], gate.groups).to(x.device)

    return choose


def histograms(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """How often each entry ran 0..N learners over the batches, with the gates as they are set: (N + 1,) counts."""
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for batch in batches:
            with record(model, len(batch)) as seen:
                model(batch)
            for name, counts in seen.choices.items():
                found[name] = found.get(name, 0) + counts.cpu()
    return found


def _names(model: nn.Module) -> dict[Gate, Sequence[str]]:
    return {m.gate: m.names for m in model.modules() if isinstance(m, AdaptiveModule) and m.names}
