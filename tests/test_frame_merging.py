"""Merging of frames in speech encoders: against plain loops, what it counts, positions, what comes out again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_speech import CONFIG, HOSTS, inputs_for

from acmize.cost import count_macs
from acmize.gates import set_dial
from acmize.hosts import make_plan
from acmize.inputs import Inputs, forward
from acmize.insert import convert_
from acmize.merge_pairs import fold, held_together, neighbours
from acmize.methods.token_merging import hooks_of, install_merging, set_schedule, tracing
from acmize.plan import Merging, Plan
from acmize.recording import record

FAMILIES = ("moonshine", "whisper", "wav2vec2", "hubert pre-norm", "data2vec")
PADDED = ("wav2vec2", "wav2vec2 pre-norm", "hubert", "hubert pre-norm")
MERGING = Merging(
    tokens=500, prefix=0, blocks=6, dim=288, attention_dim=288, macs=5_373_000_000, linear_macs=(995_328,) * 6,
    dense_macs=(0,) * 6, slope=1.0, start=1.0, path="encoder.layers", neighbours=True,
    lengths=(2_724_768.0, 9_011_520.0, 3456.0),
)  # fmt: skip


def plainly_merged(x: torch.Tensor, sizes: list[float], r: int) -> tuple[list[torch.Tensor], list[float]]:
    """One recording by loops: an even frame goes into the odd neighbour that suits it, the cheapest ones first."""

    def cost(a: int, b: int) -> float:
        return sizes[a] * sizes[b] / (sizes[a] + sizes[b]) * (x[a] - x[b]).square().sum().item()

    best = {
        a: min((b for b in (a - 1, a + 1) if 0 <= b < len(x)), key=lambda b: cost(a, b)) for a in range(0, len(x), 2)
    }
    gone = sorted(best, key=lambda a: cost(a, best[a]))[:r]
    out, weights = [], []
    for i in (i for i in range(len(x)) if i not in gone):
        held = [i, *(a for a in gone if best[a] == i)]
        weight = sum(sizes[j] for j in held)
        out.append(sum((x[j] * sizes[j] for j in held), torch.zeros(x.shape[1])) / weight)
        weights.append(weight)
    return out, weights


@pytest.mark.parametrize("frames", [10, 11])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_neighbours_become_their_weighted_mean(frames: int, r: int) -> None:
    """Each of three recordings as if alone, whatever padding is behind it."""
    torch.manual_seed(r)
    x, sizes = torch.randn(3, frames + 3, 6), torch.randint(1, 4, (3, frames + 3)).float()
    lengths = [frames, frames + 3, frames + 1]
    sizes *= torch.arange(frames + 3) < torch.tensor(lengths)[:, None]
    holder = neighbours(x, sizes, torch.tensor([r, r, max(r - 2, 0)]))
    tokens = frames + 3 - r
    found, found_sizes = fold(x, sizes, holder, tokens)
    for i, (length, gone) in enumerate(zip(lengths, (r, r, max(r - 2, 0)), strict=True)):
        means, weights = plainly_merged(x[i, :length], sizes[i, :length].tolist(), gone)
        torch.testing.assert_close(found[i, : length - gone], torch.stack(means))
        assert found_sizes[i].tolist() == weights + [0.0] * (tokens - len(weights))
        assert holder[i, :length].max() == length - gone - 1
        real = holder[i, :length]
        assert (real.diff() >= 0).all()  # in the order of time
        assert held_together(real).max() <= 3


def merging(name: str) -> tuple[Any, Plan, Merging]:
    model: Any = HOSTS[name]()
    plan = make_plan(model, CONFIG, merge="budget")
    assert plan.merging is not None
    assert plan.merging.neighbours
    install_merging(model, plan.merging)
    return model, plan, plan.merging


@pytest.mark.parametrize("name", ["moonshine", "whisper", "wav2vec2", "hubert pre-norm"])
def test_auto_leaves_frames_apart_that_have_labels_of_their_own(name: str) -> None:
    model, labelled = HOSTS[name](), name in ("wav2vec2", "hubert pre-norm")
    plan, asked = (make_plan(model, CONFIG, merge=merge) for merge in ("auto", "budget"))
    assert type(model).__name__.endswith("ForCTC") == labelled
    assert (plan.merging is None) == labelled
    assert any("--merge budget" in r.reason for r in plan.refused) == labelled
    assert asked.merging is not None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_what_the_plan_says_is_saved_is_what_is_counted(name: str, budget: float) -> None:
    model, plan, rule = merging(name)
    nothing_adaptive = dataclasses.replace(rule, dense_macs=rule.linear_macs)
    schedule = nothing_adaptive.schedule(budget)
    assert any(schedule)
    plan = dataclasses.replace(plan, merging=nothing_adaptive, entries=())
    encoder = model.get_submodule(plan.scope)
    for samples in (4000, 11000) if plan.length_macs else (0,):
        inputs = inputs_for(model, (samples,) * 2).without("decoder_input_ids")
        set_schedule(model, ())
        whole = count_macs(encoder, inputs[:1])
        set_schedule(model, schedule)
        saved = whole - count_macs(encoder, inputs[:1])
        assert saved > 0.03 * whole
        with record(model, 2) as seen, torch.no_grad():
            forward(encoder, inputs)
        spent, dense = plan.account(torch.zeros(2, dtype=torch.float64), seen.tokens, schedule)
        assert (dense - spent).tolist() == pytest.approx([saved] * 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_frame_has_an_output_again(name: str) -> None:
    model, _, rule = merging(name)
    inputs = inputs_for(model)
    with torch.no_grad():
        dense = forward(model, inputs)
        set_schedule(model, rule.schedule(0.6))
        with tracing(model) as trace:
            merged = forward(model, inputs)
        states, before = (getattr(o, "encoder_last_hidden_state", o.logits) for o in (merged, dense))
        assert states.shape == before.shape
        assert (merged.logits - dense.logits).abs().max() > 1e-4
        together = trace[-1][:, 1:] == trace[-1][:, :-1]
        assert 0 < together.sum() < together.numel()
        assert torch.equal((states[:, 1:] == states[:, :-1]).all(-1), together)
        set_schedule(model, ())
        assert torch.equal(forward(model, inputs).logits, dense.logits)


def test_a_token_turns_as_the_mean_of_its_frames() -> None:
    """Moonshine's rotary positions, at every block."""
    model, _, rule = merging("moonshine")
    encoder, turns = model.model.encoder, []
    for layer in encoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: turns.append(kwargs["position_embeddings"]), with_kwargs=True
        )
    set_schedule(model, rule.schedule(0.6))
    with torch.no_grad(), tracing(model) as trace:
        forward(model, inputs_for(model, (11000, 11000)))
    assert trace[-1].max() + 1 < trace[-1].shape[1]
    for (cos, sin), holder in zip(turns, trace, strict=True):
        for i in range(2):
            frames = torch.arange(holder.shape[1], dtype=torch.float32)
            means = torch.stack([frames[holder[i] == token].mean() for token in range(int(holder[i].max()) + 1)])
            expected = encoder.rotary_emb(torch.zeros(1), position_ids=means[None])
            torch.testing.assert_close((cos[i], sin[i]), (expected[0][0], expected[1][0]), rtol=1e-4, atol=1e-5)


def test_equal_frames_merge_for_nothing() -> None:
    """The attention knows how many frames a token stands for (Whisper's encoder, its positions taken out)."""
    model, _, _ = merging("whisper")
    encoder = model.model.encoder
    encoder.embed_positions.weight.data.zero_()
    sound = torch.randn(2, 8, 1).repeat(1, 1, 40)
    other = torch.randn(2, 8, 1).repeat(1, 1, 40)
    features = torch.cat([sound[..., :20], other[..., 20:]], -1)
    with torch.no_grad():
        dense = encoder(features).last_hidden_state
        set_schedule(model, (4, 0))
        with tracing(model) as trace:
            merged = encoder(features).last_hidden_state
        assert int(trace[-1].max()) == 20 - 4 - 1
        torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recordings_are_merged_as_if_alone(name: str, attention: str) -> None:
    """A batch of unequal lengths gives what its recordings give one by one, gates and merging on."""
    model: Any = HOSTS[name]()
    model.set_attn_implementation(attention)
    plan = make_plan(model, CONFIG, merge="budget")
    assert plan.merging is not None
    model = convert_(model, plan).eval()
    set_dial(model, 0.5)
    lengths = (4000, 2600, 3300)
    batch = inputs_for(model, lengths)
    full = forward(model, batch).logits
    set_schedule(model, plan.schedule(0.6))
    with torch.no_grad(), record(model, 3) as seen:
        together = forward(model, batch).logits
    assert (together - full).abs().max() > 1e-4
    spent, dense = plan.account(seen.executed().double(), seen.tokens, plan.schedule(0.6))
    for i, length in enumerate(lengths):
        alone = Inputs({"input_values": batch.tensors["input_values"][i : i + 1, :length]})
        with torch.no_grad(), record(model, 1) as own:
            expected = forward(model, alone).logits[0]
        torch.testing.assert_close(together[i, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            padded = forward(model, batch[i : i + 1]).logits[0]  # as another process has it: padding behind all of it
        assert padded.shape == together[i].shape
        torch.testing.assert_close(padded[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        one, whole = plan.account(own.executed().double(), own.tokens, plan.schedule(0.6))
        assert (spent[i].item(), dense[i].item()) == pytest.approx((one.item(), whole.item()))


def test_the_schedule_follows_the_length_and_the_budget() -> None:
    a, b, c = MERGING.lengths
    for budget in (0.9, 0.75, 0.6, 0.5):
        for tokens in (100, 333, 1000):
            there, schedule = MERGING.at(tokens, MERGING.schedule(budget))
            assert schedule != MERGING.schedule(budget)
            saved = there._saved(schedule, there.linear_macs) / (a + b * tokens + c * tokens**2)
            assert 1 - saved == pytest.approx(budget, abs=0.006)  # half a pair of a hundred frames
    begins = [next(i for i, r in enumerate(MERGING.schedule(b)) if r) for b in (0.75, 0.6, 0.5, 0.42)]
    assert begins == sorted(begins, reverse=True)
    assert begins[0] > begins[-1] == 0


def test_hooks_survive_a_copy() -> None:
    import copy

    model, _, rule = merging("moonshine")
    twin = copy.deepcopy(model)
    set_schedule(twin, rule.schedule(0.6))
    assert not any(hook.r for hook in hooks_of(model))
    inputs = inputs_for(model)
    with torch.no_grad():
        dense, merged = forward(model, inputs), forward(twin, inputs)
    assert (dense.logits - merged.logits).abs().max() > 1e-4
    assert merged.encoder_last_hidden_state.shape == dense.encoder_last_hidden_state.shape
