"""The real classes of transformers: exact at full width, nothing skipped, padding free."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from test_hosts import kinds, unaccounted
from tiny import CONFIG, Random, half_width
from tiny_speech import ALONE, EXAMPLE, HOSTS, PADDED, adapted, inputs_for, logits
from torch import Tensor, nn

from acmize import AcmConfig, AcmizeError, products
from acmize.adaptive import AcmMlp
from acmize.bench import same_products
from acmize.controls import gates_share, static_width, workload
from acmize.cost import count_macs
from acmize.damage import collect_damage
from acmize.decision import Decision
from acmize.gates import DamageGate, choosing, full_width
from acmize.hosts import find_sites, make_plan
from acmize.hosts_speech import HANDLERS, alone_only, is_speech
from acmize.init import collect_moments
from acmize.inputs import Inputs, forward
from acmize.insert import convert_
from acmize.layers import Expand
from acmize.ops import use_backend
from acmize.padding import class_path, few_shapes
from acmize.plan import Plan, Site
from acmize.recording import AdaptiveModule, record
from acmize.site_times import site_times

ALL, MLPS = {"mlp": 2, "q": 2, "k": 2, "v": 2, "out": 2}, {"mlp": 2}
EXPECTED: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "wav2vec2": (ALL, ()),
    "wav2vec2 pre-norm": (ALL, ()),
    "wav2vec2 adapters": (ALL, ("Wav2Vec2AttnAdapterLayer",)),
    "wav2vec2 group norm": (ALL, ()),
    "hubert": (ALL, ()),
    "hubert pre-norm": (ALL, ()),
    "wavlm": (MLPS, ("multi_head_attention_forward",)),
    "wavlm pre-norm": (MLPS, ("multi_head_attention_forward",)),
    "data2vec": (ALL, ()),
    "whisper": (ALL, ("a decoder", "attention of a decoder")),
    "moonshine": ({**ALL, "conv": 2}, ("a decoder", "attention of a decoder")),
    "ast": (ALL, ()),
}


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_exact_at_full_width(name: str) -> None:
    dense = HOSTS[name]()
    assert is_speech(dense)
    model, plan = adapted(dense)
    expected, reasons = EXPECTED[name]
    assert kinds(plan) == expected
    said = " | ".join(r.reason for r in plan.refused)
    assert all(reason in said for reason in reasons), said
    assert unaccounted(dense, plan) == []
    assert Plan.from_dict(plan.to_dict()) == plan

    batch = inputs_for(dense, seed=2)
    wanted = logits(dense, batch)
    scale = wanted.std()
    with choosing(model, half_width):
        assert (logits(model, batch) - wanted).abs().max() / scale > 1e-2  # it cuts something
    for backend in ("masked", "sorted"):
        with choosing(model, full_width), use_backend(backend):
            torch.testing.assert_close(logits(model, batch) / scale, wanted / scale, rtol=0, atol=2e-4)
    with choosing(model, Random(0)), use_backend("masked"):
        masked = logits(model, batch)
    with choosing(model, Random(0)), use_backend("sorted"):
        torch.testing.assert_close(logits(model, batch) / scale, masked / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
@torch.no_grad()
def test_mlps_of_a_decoder_when_asked_for(name: str) -> None:
    dense = HOSTS[name]()
    model, plan = adapted(dense, target_modules=["model.decoder.layers.*"])
    assert kinds(plan) == {"mlp": 1}
    assert plan.scope == ""
    batch = inputs_for(dense)
    with choosing(model, half_width):
        assert (logits(model, batch) - logits(dense, batch)).abs().max() > 1e-3
    with choosing(model, full_width):
        torch.testing.assert_close(logits(model, batch), logits(dense, batch), rtol=0, atol=1e-3)


def test_a_subclass_is_not_matched() -> None:
    dense: Any = HOSTS["wav2vec2"]()
    layer = dense.wav2vec2.encoder.layers[0]

    class Odd(type(layer.feed_forward)):  # pyright: ignore
        pass

    layer.feed_forward.__class__ = Odd
    refused = {r.fqn: r.reason for r in find_sites(dense) if not isinstance(r, Site)}
    assert "Odd" in refused["wav2vec2.encoder.layers.0.feed_forward.intermediate_dense"]


@pytest.mark.parametrize("name", HOSTS)
def test_canary_of_transformers(name: str) -> None:
    """Fails where a version of transformers renames a class that must be known: lowest 5.0, newest seen 5.23."""
    known = {class_path(m) for m in HOSTS[name]().modules()} & HANDLERS.keys()
    assert known, f"transformers {transformers.__version__}: hosts_speech.py knows nothing in {name}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_are_left_as_they_are(attention: str) -> None:
    dense: Any = HOSTS["wav2vec2"]()
    dense.set_attn_implementation(attention)
    model, _ = adapted(dense)
    batch = inputs_for(dense, (EXAMPLE, 2500))
    with choosing(model, full_width):
        ours, wanted = logits(model, batch), logits(dense, batch)
    torch.testing.assert_close(ours[0], wanted[0], rtol=0, atol=1e-4 * float(wanted.std()))


# --- padding --------------------------------------------------------------------------------------------------


def _priced(model: nn.Module, price: float = 6000.0) -> nn.Module:
    """Gates of random weights that choose differently for different tokens."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, DamageGate):
            module.price.fill_(price)
            with torch.no_grad():
                for p in (module.fc1.weight, module.fc2.weight, module.fc2.bias):
                    p.normal_(generator=generator)
    return model


def _frames(model: Any, length: int) -> int:
    return int(model._get_feat_extract_output_lengths(torch.tensor(length)))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # how WavLM calls torch
@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_unequal_lengths_equal_one_by_one(name: str) -> None:
    dense = HOSTS[name]()
    model, plan = adapted(dense)
    _priced(model)
    lengths = (EXAMPLE, 2500, 1000)
    batch = inputs_for(dense, lengths)
    with record(model, len(lengths)) as seen:
        together = logits(model, batch)
    spent, whole = plan.account(seen.executed(), seen.tokens)
    assert len({int(c) for counts in seen.per_token.values() for c in counts.unique()}) > 2  # the gates do choose
    scale = together.std()
    for i, length in enumerate(lengths):
        frames = _frames(dense, length)
        alone = Inputs({"input_values": batch.tensors["input_values"][i : i + 1, :length]})
        with record(model, 1) as own:
            by_itself = logits(model, alone)
        torch.testing.assert_close(together[i, :frames] / scale, by_itself[0] / scale, rtol=0, atol=2e-4)
        mine = plan.account(own.executed(), own.tokens)
        torch.testing.assert_close(torch.stack([spent[i], whole[i]]).float(), torch.cat(mine).float())
        for entry in plan.entries:
            shown = seen.per_token[entry.fqn][i]
            assert torch.equal(shown[:frames], own.per_token[entry.fqn][0])
            assert (shown[frames:] == -1).all()


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_families_that_are_fed_one_by_one(name: str) -> None:
    """Exactly those whose dense output depends on the padding of the batch."""
    dense = HOSTS[name]()
    assert (alone_only(dense) is not None) == (name in ALONE)
    if name in ALONE:
        batch = inputs_for(dense, (EXAMPLE, 2500))
        wave = batch.tensors["input_values"][1:, :2500]
        alone = Inputs({**batch[1:].without("attention_mask").tensors, "input_values": wave})
        together, by_itself = logits(dense, batch)[1], logits(dense, alone)[0]
        assert (together[: len(by_itself)] - by_itself).abs().max() > 1e-3 * by_itself.std()


@torch.no_grad()
def test_padded_frames_run_no_learner() -> None:
    dense = HOSTS["wav2vec2"]()
    model, _ = adapted(dense)
    batch, mlps = inputs_for(dense, (EXAMPLE, 1000)), [m for m in model.modules() if isinstance(m, AcmMlp)]
    seen: list[Tensor] = []
    for mlp in mlps:
        mlp.register_forward_hook(lambda m, _a, y: seen.append(y[1, _frames(dense, 1000) :] - m.fc2.table()[0]))
    with choosing(model, full_width):
        forward(model, batch)
    assert len(seen) == len(mlps)
    assert max(float(rest.abs().max()) for rest in seen) < 1e-6  # what no learner leaves behind
    forward(model, Inputs({"input_values": batch.tensors["input_values"]}))
    assert all(module.padding is None or module.padding.read(torch.zeros(2, 199, 32)) is None for module in mlps)


def test_padded_frames_are_neither_fitted_on_nor_in_the_moments() -> None:
    dense: Any = HOSTS["hubert"]()
    model, plan = adapted(dense)
    batch = inputs_for(dense, (EXAMPLE, 1000))
    frames = _frames(dense, EXAMPLE) + _frames(dense, 1000)
    counts = torch.arange(_frames(dense, EXAMPLE)) < torch.tensor([[_frames(dense, n)] for n in (EXAMPLE, 1000)])
    generator = torch.Generator().manual_seed(0)
    data = collect_damage(
        model, dense, [Inputs(batch.tensors, counts)], choose=full_width, generator=generator, draws=1, keep_tokens=1.0
    )
    assert {len(rows.x) for rows in data.values()} == {frames}
    moments = collect_moments(dense, plan, [batch])
    assert {round(m[0, -1, -1].item()) for m in moments.values()} == {frames}


@torch.no_grad()
def test_a_copy_has_padding_of_its_own() -> None:
    dense = HOSTS["wav2vec2"]()
    model, _ = adapted(dense)
    copied = copy.deepcopy(model)
    ours, theirs = ([m.padding for m in x.modules() if isinstance(m, AdaptiveModule)] for x in (model, copied))
    assert len({id(p) for p in ours}) == len({id(p) for p in theirs}) == 1
    assert ours[0] is not theirs[0]
    batch = inputs_for(dense, (EXAMPLE, 1000))
    torch.testing.assert_close(logits(_priced(copied), batch), logits(_priced(model), batch))


@torch.no_grad()
def test_inside_an_encoder_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptive or dense, of any length; outside, and after an error, numbers of rows are what they are."""
    seen: list[tuple[bool, int]] = []
    gemm = torch.ops.mkldnn._linear_pointwise

    def noted(x: Tensor, *rest: Any) -> Tensor:
        seen.append((bool(products._thread.ragged), len(x)))
        return gemm(x, *rest)

    monkeypatch.setattr(products, "ONEDNN_MACS", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    dense = HOSTS["hubert"]()
    model, _ = adapted(dense)
    alike, rival = same_products(dense), same_products(dense)
    few_shapes(rival)
    lengths = (EXAMPLE, EXAMPLE - 900)
    for made in (model, alike, rival):
        seen.clear()
        for length in lengths:
            batch = inputs_for(dense, (length,))
            with choosing(model, full_width):
                torch.testing.assert_close(logits(made, batch), logits(dense, batch), rtol=1e-3, atol=1e-4)
        inside, outside = ({rows for ragged, rows in seen if ragged is where} for where in (True, False))
        assert {_frames(dense, n) for n in lengths} <= outside  # what projects the features, in all of them
        assert bool(inside) == (made is not alike)
        assert all(rows % 16 == 0 for rows in inside)

    def broken(*_: Any) -> None:
        assert products._thread.ragged
        raise RuntimeError("broken")

    model.get_submodule("hubert.encoder.layers.0").register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        logits(model, inputs_for(dense))
    assert not products._thread.ragged


# --- cost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "moonshine"])
@torch.no_grad()
def test_macs_of_any_length(name: str) -> None:
    """The polynomial of the plan, and the work executed at full width, against what is counted."""
    dense: Any = HOSTS[name]()
    model, plan = adapted(dense)
    batch = inputs_for(dense, (23_456,))
    encoder = batch.without("decoder_input_ids")
    part = dense.get_submodule(plan.scope) if plan.scope else dense
    counted = count_macs(part, encoder)
    with choosing(model, half_width), record(model, 1) as seen:
        forward(model, batch)
    spent, whole = plan.account(seen.executed(), seen.tokens)
    assert float(whole[0]) == pytest.approx(counted, rel=5e-3)
    with choosing(model, half_width), use_backend("sorted"):
        ran = count_macs(model.get_submodule(plan.scope) if plan.scope else model, encoder)
    assert ran < counted
    gates = sum(seen.gates.values())  # which do not run where choices are forced
    assert float(spent[0]) - gates == pytest.approx(ran, rel=5e-3)


def test_budgets_of_a_fixed_length() -> None:
    for name in ("whisper", "ast"):
        plan = make_plan(HOSTS[name](), CONFIG)
        assert plan.length_macs is None
        assert plan.scope == ("model.encoder" if name == "whisper" else "")


# --- the sorted backend ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_ordered_units_written_into_a_part_of_a_fused_output() -> None:
    layer = Expand(6, 8, True, (0, 2, 4), heads=2, ordered=True)
    assert layer.order is not None
    x, choice, fused = torch.randn(5, 6), torch.tensor([0, 1, 2, 2, 1]), torch.full((5, 16), -1.0)
    plain = layer.masked(x, Decision(choice))
    layer.order.copy_(torch.tensor([[2, 3, 0, 1], [1, 0, 3, 2]]))
    expected = layer.masked(x, Decision(choice))
    assert not torch.equal(expected, plain)
    layer.write(x, Decision(choice[:, None]).group(0), fused[:, 8:])
    torch.testing.assert_close(fused[:, 8:], expected)
    assert (fused[:, :8] == -1).all()


@pytest.mark.parametrize("name", ["wav2vec2", "moonshine"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_static_width_meets_its_budget_on_unequal_lengths(name: str, share: float) -> None:
    dense: Any = HOSTS[name]()
    plan = make_plan(dense, AcmConfig(num_learners=8, gate_hidden=1))
    model = convert_(copy.deepcopy(dense), plan)
    lengths = ((23_000,), (9_000,), (30_000,)) if name == "moonshine" else ((8_000, 1_500), (700, 3_000, 2_000))
    batches = [inputs_for(dense, some) for some in lengths]
    work = workload(model, plan, batches)
    entry = plan.entries[0]
    assert work.tokens[entry.fqn] < entry.tokens / 3  # the plan's example is much longer

    def realised(choose: Any) -> float:
        spent, whole = [], []
        for batch in batches:
            with torch.no_grad(), choosing(model, choose), record(model, len(batch)) as seen:
                forward(model, batch)
            macs = plan.account(seen.executed().double(), seen.tokens)
            spent.append(macs[0]), whole.append(macs[1])
        return float(torch.cat(spent).sum() / torch.cat(whole).sum())

    fewest, all_of_them = (static_width(model, plan, b, work) for b in (0.0, 2.0))
    low, high = realised(fewest), realised(all_of_them)
    budget = low + share * (high - low)
    assert budget - 0.01 <= realised(static_width(model, plan, budget, work)) <= budget + 1e-6
    gates = sum(n * e.gate_macs for e, n in zip(plan.entries, work.tokens.values(), strict=True))
    more = sum(work.tokens[e.fqn] * (sum(e.learner_macs) - e.macs // e.tokens) for e in plan.entries)  # full rank
    assert gates_share(model, plan, work) == pytest.approx(high - 1 - more / work.dense, rel=1e-6)
    assert gates_share(model, plan, work) == pytest.approx(gates / work.dense)
    with pytest.raises(AcmizeError, match="expected those that will be run"):
        static_width(model, plan, budget)


def test_site_times_of_keyword_inputs() -> None:
    dense = HOSTS["wav2vec2"]()
    plan = make_plan(dense, CONFIG)
    times = site_times(dense, plan, inputs_for(dense, (EXAMPLE, 2500)))
    assert sorted(name for t in times for name in t.names) == sorted(e.fqn for e in plan.entries)
    assert all(t.dense_ms > 0 and t.adaptive_ms > 0 for t in times)
