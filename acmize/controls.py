"""Controls at equal executed MACs: what a gate has to beat to be worth having.

    static    every token alike: one share of the learners everywhere
    random    each token draws its choice from the histogram the gate itself has at this budget
    full      nothing is cut (with a merging schedule: token merging alone)

Each is a `Choose` for `choosing(model, ...)`, so the model, its learners and its evaluation are the same as the gate's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acmize.cost import count_macs, evaluating
from acmize.errors import AcmizeError
from acmize.gates import Choose, Gate
from acmize.hosts import example_input
from acmize.inputs import Batch, forward
from acmize.methods.token_merging import schedule_of, set_schedule
from acmize.plan import Merging, Plan
from acmize.recording import AdaptiveModule, record


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the samples of some data need in the mean, gates and choices aside.

    Attributes:
        tokens: entry -> tokens a sample.
        dense: MACs of the dense model a sample.
        rest: MACs a sample outside the adaptive sites and their gates.
    """

    tokens: Mapping[str, float]
    dense: float
    rest: float


def workload(model: nn.Module, plan: Plan, batches: Iterable[Batch] = ()) -> Workload:
    """The work of samples alike, from the plan and the merging schedule in force; of unequal lengths, from the samples.

    Args:
        model: the converted model.
        plan: its plan.
        batches: inputs; needed only where samples have unequal lengths (speech), where each of them is run.

    Raises:
        AcmizeError: unequal lengths and no inputs.
    """
    if plan.length_macs is None:
        left = _tokens_left(model, plan)
        tokens = {e.fqn: left[e.fqn] * e.tokens for e in plan.entries}
        return Workload(tokens=tokens, dense=plan.macs_dense, rest=plan.macs_rest(schedule_of(model)))
    samples, dense, rest, total = 0, 0.0, 0.0, dict.fromkeys((e.fqn for e in plan.entries), 0.0)
    schedule = schedule_of(model)
    with evaluating(model):
        for batch in batches:
            with record(model, len(batch)) as seen:
                forward(model, batch)
            zero = torch.zeros(len(batch), dtype=torch.float64)
            each = {name: zero + torch.as_tensor(count).cpu() for name, count in seen.tokens.items()}
            macs = plan.account(zero, each, schedule)
            rest, dense = rest + macs[0].sum().item(), dense + macs[1].sum().item()
            total = {name: count + each[name].sum().item() for name, count in total.items()}
            samples += len(batch)
    if not samples:
        raise AcmizeError("workload: found no inputs, expected those that will be run: their lengths are unequal")
    tokens = {name: count / samples for name, count in total.items()}
    return Workload(tokens=tokens, dense=dense / samples, rest=rest / samples)


def static_width(model: nn.Module, plan: Plan, budget: float, work: Workload | None = None) -> Choose:
    """Every token runs the same number of learners at a site, the same share at every site, at a budget.

    What is left over when the share is rounded down buys one learner more at as many sites as it can, spread over the
    depth, so that the budget is met within the cost of one learner.

    Args:
        model: the converted model.
        plan: its plan.
        budget: share of the dense MACs, gates included.
        work: of the data, from `workload`; needed where samples have unequal lengths.
    """
    work = work or workload(model, plan)
    free = (budget - gates_share(model, plan, work)) * work.dense - work.rest

    def rounded_down(share: float) -> dict[str, int]:
        return {e.fqn: max(int(share * e.num_learners), e.min_choice) for e in plan.entries}

    def spent(choices: dict[str, int]) -> float:
        return sum(work.tokens[e.fqn] * sum(e.learner_macs[: choices[e.fqn]]) for e in plan.entries)

    low, high = 0.0, 1.0 + 1e-9
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(rounded_down(middle)) <= free else (low, middle)
    choices = rounded_down(low)
    free -= spent(choices)
    golden = 0.6180339887498949  # its multiples modulo 1 are spread evenly, however many are taken
    for _, e in sorted(enumerate(plan.entries), key=lambda item: item[0] * golden % 1):
        if choices[e.fqn] < e.num_learners:
            more = work.tokens[e.fqn] * e.learner_macs[choices[e.fqn]]
            if more <= free:
                choices[e.fqn] += 1
                free -= more
    return by_name(model, choices)


def merge_to(model: nn.Module, merging: Merging, budget: float, macs_dense: int) -> float:
    """Merge tokens of a dense model until that alone meets a budget, by the product's rule of where.

    Args:
        model: dense, with merging hooks (`install_merging`).
        merging: of a plan; how much it leaves to the gates is left aside.
        budget: share of the dense MACs.
        macs_dense: MACs of the model without merging.

    Returns:
        The share that the schedule, now in force, realises.
    """
    set_schedule(model, dataclasses.replace(merging, slope=1.0, start=1.0, fixed=None).schedule(budget))
    return count_macs(model, example_input(model)) / macs_dense


def gates_share(model: nn.Module, plan: Plan, work: Workload | None = None) -> float:
    """MACs of the gates with the merging schedule in force, as a share of the dense model's.

    `evaluate_at` counts them for a control too, though a static width could do without.

    Args:
        model: the converted model.
        plan: its plan.
        work: as for `static_width`.
    """
    work = work or workload(model, plan)
    return sum(work.tokens[e.fqn] * e.gate_macs for e in plan.entries) / work.dense


def _tokens_left(model: nn.Module, plan: Plan) -> dict[str, float]:
    """Entry -> share of its tokens that the merging schedule in force leaves."""
    merging, schedule = plan.merging, schedule_of(model)
    if merging is None or not schedule:
        return {e.fqn: 1.0 for e in plan.entries}
    shares = {i: count / merging.tokens for i, count in enumerate(merging.counts(schedule))}
    return {e.fqn: shares.get(-1 if (i := merging.block_of(e.fqn)) is None else i, 1.0) for e in plan.entries}


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


def histograms(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """How often each entry ran 0..N learners over the batches, with the gates as they are set: (N + 1,) counts."""
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for batch in batches:
            with record(model, len(batch)) as seen:
                forward(model, batch)
            for name, counts in seen.choices.items():
                found[name] = found.get(name, 0) + counts.cpu()
    return found


def _names(model: nn.Module) -> dict[Gate, Sequence[str]]:
    return {m.gate: m.names for m in model.modules() if isinstance(m, AdaptiveModule) and m.names}
