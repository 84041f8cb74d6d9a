"""Token merging: against plain loops, what it counts, how the schedule moves with the budget, what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from acmize import AcmizeError, Plan
from acmize.cost import count_macs
from acmize.hosts import make_plan
from acmize.methods.token_merging import install_merging, merge, schedule_of, set_schedule, why_not
from acmize.plan import Merging
from tests.tiny import CONFIG, HOSTS, eva02, noisy, vit

MERGING = Merging(
    tokens=197, prefix=1, blocks=12, dim=192, attention_dim=192, macs=1_250_000_000,
    linear_macs=(442_368,) * 12, dense_macs=(0,) * 12,
)  # fmt: skip
IMAGE = torch.zeros(1, 3, 16, 16)
BUDGETS = [b / 100 for b in range(95, 35, -5)]


def plainly_merged(x: torch.Tensor, sizes: list[float], r: int, prefix: int) -> tuple[list[torch.Tensor], list[float]]:
    """Bipartite matching of one sample by loops: tokens (T, D), and their sizes."""
    even, odd = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)

    def cost(a: int, b: int) -> float:
        return sizes[a] * sizes[b] / (sizes[a] + sizes[b]) * (x[a] - x[b]).square().sum().item()

    best = {a: min(odd, key=lambda b: cost(a, b)) for a in even}
    gone = sorted(even, key=lambda a: cost(a, best[a]))[:r]
    total, weight = {b: x[b] * sizes[b] for b in odd}, {b: sizes[b] for b in odd}
    for a in gone:
        total[best[a]] = total[best[a]] + x[a] * sizes[a]
        weight[best[a]] += sizes[a]
    kept = [*range(prefix), *(a for a in even if a not in gone)]
    tokens = [x[a] for a in kept] + [total[b] / weight[b] for b in odd]
    return tokens, [sizes[a] for a in kept] + [weight[b] for b in odd]


@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_pairs_become_their_weighted_mean(r: int, prefix: int) -> None:
    torch.manual_seed(r)
    x, sizes = torch.randn(3, prefix + 11, 6), torch.randint(1, 4, (3, prefix + 11)).float()
    found, found_sizes = merge(x, sizes, r, prefix)
    assert found.shape == (3, prefix + 11 - r, 6)
    for i in range(3):
        tokens, weights = plainly_merged(x[i], sizes[i].tolist(), r, prefix)
        torch.testing.assert_close(found[i], torch.stack(tokens))
        assert found_sizes[i].tolist() == weights
    torch.testing.assert_close((found * found_sizes[..., None]).sum(1), (x * sizes[..., None]).sum(1))


def test_a_merged_token_counts_in_attention_as_the_patches_it_stands_for() -> None:
    """Where merged patches are equal, merging changes nothing: the attention knows how many there were."""
    model: Any = vit(depth=1, pos_embed="none").eval()
    patch = torch.randn(2, 3, 4, 4)
    other = torch.randn(2, 3, 4, 4)
    images = torch.cat([patch.repeat(1, 1, 4, 2), other.repeat(1, 1, 4, 2)], -1)  # eight equal patches, twice
    with torch.no_grad():
        dense = model(images)
        install_merging(model)
        set_schedule(model, (6,))
        torch.testing.assert_close(model(images), dense, rtol=1e-4, atol=1e-5)

        seen: list[int] = []

        def forget_sizes(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen.append(args[0].shape[1])
            return args, {**kwargs, "attn_mask": None}

        model.blocks[0].register_forward_pre_hook(forget_sizes, with_kwargs=True)
        assert (model(images) - dense).abs().max() > 1e-3
        assert seen == [17 - 6]


@pytest.mark.parametrize("name", ["vit", "deit distilled", "dinov2 with registers", "swiglu"])
@pytest.mark.parametrize("budget", [0.7, 0.5])
def test_what_the_plan_says_is_saved_is_what_is_counted(name: str, budget: float) -> None:
    model: Any = HOSTS[name]()
    plan: Plan = make_plan(model, CONFIG, merge="auto", example=(IMAGE,))
    assert plan.merging is not None
    # nothing adaptive: all linear layers count as dense
    alone = dataclasses.replace(plan.merging, dense_macs=plan.merging.linear_macs)
    schedule = alone.schedule(budget)
    assert any(schedule)
    install_merging(model)
    set_schedule(model, schedule)
    assert schedule_of(model) == schedule
    assert count_macs(model, IMAGE) == plan.macs_dense - alone.saved(schedule)


def test_merging_alone_saves_its_share_of_every_budget() -> None:
    for budget in BUDGETS:
        schedule = MERGING.schedule(budget)
        share = MERGING._saved(schedule, MERGING.linear_macs) / MERGING.macs
        assert share == pytest.approx(MERGING.slope * max(MERGING.start - budget, 0), abs=0.01), budget


def test_merging_begins_late_at_large_budgets_and_moves_to_the_front() -> None:
    begins = {b: next((i for i, r in enumerate(MERGING.schedule(b)) if r), None) for b in BUDGETS}
    assert begins[0.95] is None
    assert begins[0.75] == 3
    assert begins[0.4] == 1
    moved = [begin for begin in begins.values() if begin is not None]
    assert moved == sorted(moved, reverse=True)
    merged = [sum(MERGING.schedule(b)) for b in BUDGETS]
    assert merged == sorted(merged)
    assert merged[0] == 0 < merged[-1]


def test_fewer_merges_save_as_much() -> None:
    sparse = dataclasses.replace(MERGING, every=2)
    for budget in (0.75, 0.6, 0.45):
        schedule = sparse.schedule(budget)
        assert not any(schedule[::2])
        assert sum(r > 0 for r in schedule) <= 6
        share = MERGING._saved(schedule, MERGING.linear_macs) / MERGING.macs
        assert share == pytest.approx(MERGING.slope * (MERGING.start - budget), abs=0.01)


def test_never_more_than_half_of_what_is_left() -> None:
    greedy = dataclasses.replace(MERGING, slope=3.0, start=1.0)
    for schedule in (greedy.schedule(0.05), dataclasses.replace(MERGING, fixed=60).schedule(0.9)):
        left = MERGING.tokens - MERGING.prefix
        for r in schedule:
            assert 0 <= r <= left // 2
            left -= r
        assert left < 30


def test_batch_mates_do_not_matter() -> None:
    model: Any = vit()
    install_merging(model)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        whole = model(images)
        set_schedule(model, (0, 5))
        together = model(images)
        assert (together - whole).abs().max() > 1e-3
        for i in range(5):
            torch.testing.assert_close(model(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (HOSTS["swin"], "no sequence of blocks"),
        (eva02, "rotary"),
        (lambda: noisy(vit(global_pool="avg", class_token=False)), "pooling 'avg'"),
    ],
)
def test_refused_with_the_reason(build: Any, reason: str) -> None:
    model = build()
    assert reason in str(why_not(model))
    plan = make_plan(model, CONFIG, merge="auto", example=(IMAGE,))
    assert plan.merging is None
    assert any(reason in r.reason for r in plan.refused)
    with pytest.raises(AcmizeError, match="leave it out"):
        make_plan(model, CONFIG, merge=4, example=(IMAGE,))
