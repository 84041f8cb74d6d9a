"""Real-time factors on a clock of our own, the work of recordings, and speech through `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_speech import OPTIONS, recordings, saved  # noqa: F401 - fixtures
from torch import nn

import acmize
from acmize import AcmizeError, bench_speech, ops, site_times, timing
from acmize.api import convert
from acmize.audio import Utterance
from acmize.cost import count_macs
from acmize.hosts_speech import alone_only, blocks_path, front_end
from acmize.inputs import Inputs
from acmize.models import load_model
from acmize.timing import Setting
from acmize.verify import verify_saved


@pytest.fixture(scope="module")
def folder(saved: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An adaptive model, saved."""
    out = tmp_path_factory.mktemp("bench") / "out"
    convert(load_model(str(saved)), data=str(recordings), phases=(), output=out, **OPTIONS)
    return out


@pytest.fixture
def model(folder: Path) -> Any:
    return acmize.from_pretrained(folder)


class Clock:
    """Seconds that pass only in modules given some."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, module: nn.Module, seconds: float) -> None:
        """Let every forward of a module take so long."""

        def pass_by(*_: Any) -> None:
            self.now += seconds

        module.register_forward_hook(pass_by)


def test_what_is_timed(model: Any, saved: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The encoder inside of the whole; as many tokens for every model; recordings of a decoder one after another."""
    dense: Any = load_model(str(saved))
    seq2seq = dense.config.is_encoder_decoder
    clock = Clock()
    monkeypatch.setattr(bench_speech, "placed", lambda module, _setting: module)
    monkeypatch.setattr(bench_speech, "same_products", lambda module: module)
    for module in (timing, site_times):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(bench_speech, "dense_of", lambda *_: dense)
    monkeypatch.setattr(bench_speech, "WARMUP", 1)
    clock.slow(dense.get_submodule(blocks_path(dense)), 3.0)
    clock.slow(model.get_submodule(blocks_path(model)), 2.0)
    for whole in (dense, model):
        clock.slow(whole.proj_out if seq2seq else whole.lm_head, 1.0)
    written: list[int] = []
    if seq2seq:
        own = type(dense).generate

        def noted(self: Any, **options: Any) -> Any:
            made = own(self, **options)
            if "min_new_tokens" in options:
                written.append(made.shape[1])
            return made

        monkeypatch.setattr(type(dense), "generate", noted)
    options: dict[str, Any] = {"budgets": [0.9], "batch_sizes": (2,), "setting": Setting(repeats=1)}
    found = bench_speech.bench_speech(model, str(recordings), **options)
    (row,) = found["results"]
    encoder, calls = row["encoder"], 2 if seq2seq else 1
    assert encoder["dense_latency_ms"]["p50"] == pytest.approx(3000 * calls)
    assert encoder["latency_ms"]["p50"] == pytest.approx(2000 * calls)
    assert encoder["speedup"] == pytest.approx(1.5)
    beyond = row["latency_ms"]["p50"] - 2000 * calls  # a second for every token, or for all frames together
    assert beyond >= 1000 * calls
    assert row["dense_latency_ms"]["p50"] == pytest.approx(3000 * calls + beyond)
    assert row["bound"] == pytest.approx(1 + 3000 * calls / beyond)
    for part in (row, encoder):
        assert part["dense_latency_ms"]["p50"] == min(part["dense_forms_ms"].values())
        assert part["dense_latency_ms"]["form"] in part["dense_forms_ms"]
    assert row["dense_rtf"] == pytest.approx(row["dense_latency_ms"]["p50"] / 1e3 / row["seconds"])
    assert 0.1 < row["seconds"] < 0.8  # two of 1500 to 2700 samples at 8 kHz
    assert json.loads(json.dumps(found)) == found
    if seq2seq:
        rounds = [written[i : i + 12] for i in range(0, len(written), 12)]
        assert len(rounds) == 2
        assert all(some == some[:4] * 3 for some in rounds)  # each model: two recordings untimed, and two timed
        assert 1000 * sum(n - 1 for n in rounds[-1][2:4]) == pytest.approx(beyond)


def test_the_dense_rival_rounds_rows_where_lengths_differ(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[nn.Module] = []
    monkeypatch.setattr(bench_speech, "few_shapes", told.append)
    monkeypatch.setattr(bench_speech, "WARMUP", 0)
    for lengths, rounds in (((1600, 1600), False), ((1600, 2400), True)):
        told.clear()
        waves = [Utterance(torch.randn(n), "", str(i)) for i, n in enumerate(lengths)]
        monkeypatch.setattr(bench_speech, "real_recordings", lambda *_, waves=waves, **__: waves)
        bench_speech.bench_speech(model, "given", budgets=[0.9], setting=Setting(repeats=4))
        assert bool(told) == rounds


def test_the_work_of_recordings(model: Any, saved: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(bench_speech, "WARMUP", 0)
    found = bench_speech.bench_speech(model, str(recordings), budgets=[0.9], setting=Setting(repeats=1))
    dense: Any = load_model(str(saved))
    part = dense.get_submodule(model.plan.scope)
    utterances = bench_speech.real_recordings(model, str(recordings), limit=32)
    with torch.no_grad():
        counted = sum(count_macs(part, Inputs({"input_values": u.wave[None]})) for u in utterances)
    seconds = sum(len(u.wave) for u in utterances) / 16_000
    assert found["work"]["gmacs_per_second"] == pytest.approx(counted / seconds / 1e9, rel=0.02)
    assert 0 < found["work"]["front_share"] < model.plan.budget_range[0]
    assert front_end(dense).modules


def test_wrong_options(model: Any, recordings: Path) -> None:  # noqa: F811
    for options, said in (({"batch_sizes": (9,)}, "9 for 4 recordings"), ({"budgets": [0.01]}, "cannot go below")):
        with pytest.raises(AcmizeError, match=said):
            bench_speech.bench_speech(model, str(recordings), **options)
    with pytest.raises(AcmizeError, match="gates decide from them"):
        bench_speech.bench_speech(model, None)


def test_recordings_are_cut_where_padding_matters(model: Any, recordings: Path) -> None:  # noqa: F811
    batch: Any = bench_speech.real_inputs(model, str(recordings), limit=3)
    assert len(batch) == 3
    assert bool(batch.tensors["attention_mask"].all()) is (alone_only(model) is not None)


def test_verify_finds_what_differs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = verify_saved(model, limit=2, compiler=None)
    assert sound["ok"], [c for c in sound["checks"] if not c["ok"]]
    assert {c["check"] for c in sound["checks"]} >= {"sorted", "sorted, alone", "masked, alone", "saved and loaded"}
    own = ops.mlp_sorted
    monkeypatch.setattr(ops, "mlp_sorted", lambda *args, **options: own(*args, **options) * 1.01)
    wrong = verify_saved(model, limit=2, compiler=None)
    assert {c["check"] for c in wrong["checks"] if not c["ok"]} >= {"sorted", "sorted, alone"}
