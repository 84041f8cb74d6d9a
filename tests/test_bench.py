"""Bench: turns in the promised order, right percentiles and ratios, the promised JSON, one line for what is amiss."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from short import MODEL, converted, image_folder, refused
from torch import nn

from acmize import bench, bench_ops, console, layers, timing
from acmize.bench import bench_model, bench_saved
from acmize.bench_ops import OpShape
from acmize.environment import keep_memory
from acmize.errors import AcmizeError
from acmize.gates import gates_of
from acmize.hub import from_pretrained, save_pretrained
from acmize.phases.calibrate import realised
from acmize.products import gathered
from acmize.timing import Call, Setting, interleaved, linear_fit

ROW = {
    "model", "batch_size", "budget", "macs_ratio", "latency_ms", "dense_latency_ms", "forms_ms", "dense_forms_ms",
    "speedup", "throughput", "peak_memory_mb", "dense_peak_memory_mb",
}  # fmt: skip
PERCENTILES = {"p5", "p50", "p95", "p99"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(converted({"phases": []}), tmp_path_factory.mktemp("bench") / "saved")


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return from_pretrained(saved)


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, "bench")


class Clock:
    """A clock that moves only when something is run."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 0.0

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


# --- timing ---------------------------------------------------------------------------------------------------


def test_calls_take_turns_on_every_input() -> None:
    told: list[str] = []
    calls = {
        name: Call(lambda item, name=name: told.append(f"{name}{item}"), lambda name=name: told.append(f"({name})"))
        for name in "abc"
    }
    found = interleaved(calls, range(4), warmup=1)
    prepared, before, timed = told[::3], told[1::3], told[2::3]
    assert timed == ["a0", "b0", "c0", "c1", "b1", "a1", "b2", "c2", "a2", "a3", "c3", "b3"]
    assert prepared == [f"({word[0]})" for word in timed]
    assert before == [f"{word[0]}{max(int(word[1]) - 1, 0)}" for word in timed], "each follows itself, an input earlier"
    assert {name: len(spent) for name, spent in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_call_alone_follows_itself_as_it_is() -> None:
    told: list[int] = []
    found = interleaved({"a": Call(told.append)}, range(4), warmup=1)
    assert told == [0, 1, 2, 3], "nothing is run twice"
    assert len(found["a"]) == 3


def test_two_calls_go_first_equally_often() -> None:
    told: list[str] = []
    interleaved({n: Call(lambda _, n=n: told.append(n)) for n in "ab"}, range(40), warmup=0)
    assert sorted(told[1::4]) == ["a"] * 20 + ["b"] * 20


def test_what_is_timed_is_the_call_without_its_preparation(clock: Clock) -> None:
    def spend(seconds: float) -> None:
        clock.now += seconds

    calls = {"fast": Call(lambda item: spend(item)), "slow": Call(lambda item: spend(3 * item), lambda: spend(100))}
    found = interleaved(calls, (float(i) for i in (50, 1, 2)), warmup=1)
    assert found == {"fast": [1.0, 2.0], "slow": [3.0, 6.0]}


def test_percentiles_of_known_samples() -> None:
    seconds = [s / 1000 for s in range(101)]
    found = timing.percentiles(torch.tensor(seconds)[torch.randperm(101)].tolist())
    assert found == pytest.approx({"p5": 5, "p50": 50, "p95": 95, "p99": 99}, rel=1e-6)
    assert timing.percentiles([0.25]) == dict.fromkeys(PERCENTILES, 250.0)


def test_linear_fit() -> None:
    assert linear_fit([0.4, 0.6, 0.9], [3.0, 4.0, 5.5]) == pytest.approx({"intercept": 1, "slope": 5, "r2": 1})
    noisy = linear_fit([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])
    assert noisy == pytest.approx({"intercept": 1 / 3, "slope": 0, "r2": 0})
    assert linear_fit([0.4, 0.6], [1.0, 2.0]) is None
    assert linear_fit([0.5, 0.5, 0.5], [1.0, 2.0, 3.0]) is None


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    seen = []
    with contextlib.suppress(KeyError), timing.threads(before + 1):
        seen.append(torch.get_num_threads())
        raise KeyError
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="elsewhere the peak cannot be set back")
def test_peak_memory_is_that_of_the_call() -> None:
    def take(megabytes: int) -> None:
        torch.ones(megabytes * 250_000).sum()

    large, small = timing.peak_mb(lambda: take(80), "cpu"), timing.peak_mb(lambda: take(20), "cpu")
    assert 79 < large < 85
    assert 19 < small < 25  # not hidden by the larger call before it


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="elsewhere the peak cannot be set back")
def test_peak_memory_counts_what_a_thread_keeps() -> None:
    x, index = torch.ones(5000, 1000), torch.arange(5000)
    gathered(x, index)  # 20 MB, used again by the next call in this thread
    assert 19 < timing.peak_mb(lambda: gathered(x, index), "cpu") < 25


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_memory_is_found_warm() -> None:
    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.ones(2_500_000) for _ in range(4)]  # glibc as it is gives back more than twice the largest of them
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_memory()
    assert min(new_pages() for _ in range(10)) < 100


# --- models ---------------------------------------------------------------------------------------------------


def test_the_result_is_the_promised_json(run: Any, saved: Path) -> None:
    words = ("--budget", 0.8, "--budget", 0.7, "--budget", 0.6, "--batch-size", 2, "--batch-size", 4)
    status, captured = run(saved, *words, "--repeats", 2, "--limit", 8, "--threads", 1, "--no-compile", "--json")
    assert status == 0, captured.err
    found = json.loads(captured.out)
    assert list(found) == ["device", "threads", "dtype", "results", "fit"]
    assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 1, "float32")
    cells = [(r["batch_size"], r["budget"]) for r in found["results"]]
    assert cells == [(2, 0.8), (2, 0.7), (2, 0.6), (4, 0.8), (4, 0.7), (4, 0.6)]
    for row in found["results"]:
        assert row.keys() == ROW
        assert row["latency_ms"].keys() == PERCENTILES
        assert row["dense_latency_ms"].keys() == PERCENTILES | {"form"}
        assert row["dense_latency_ms"]["form"].startswith("eager")
        assert row["model"] == MODEL
        assert row["speedup"] == row["dense_latency_ms"]["p50"] / row["latency_ms"]["p50"]
        assert row["dense_latency_ms"]["p50"] == min(row["dense_forms_ms"].values())
        assert row["dense_latency_ms"]["form"] in row["dense_forms_ms"]
        assert row["throughput"] == pytest.approx(1e3 * row["batch_size"] / row["latency_ms"]["p50"])
        assert row["peak_memory_mb"] >= 0
        assert abs(row["macs_ratio"] - row["budget"]) < 0.15
    assert [fit.keys() for fit in found["fit"]] == [{"batch_size", "intercept", "slope", "r2"}] * 2


def test_the_table(run: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 140)
    words = ("--budget", 0.8, "--budget", 0.7, "--budget", 0.6, "--batch-size", 2)
    status, captured = run(saved, *words, "--repeats", 1, "--limit", 4, "--no-compile")
    assert status == 0, captured.err
    for text in ("dense, eager", "MACs ratio", "peak MB", "batch of 2: milliseconds = ", "cpu, "):
        assert text in captured.out


class Spy(nn.Module):
    """Counts forwards and takes a time of its own."""

    def __init__(self, inner: nn.Module, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.inner, self.clock, self.seconds, self.seen = inner, clock, seconds, []
        clock.tick = 1e-9  # what is not spied upon takes time too

    def __deepcopy__(self, memo: Any) -> Spy:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds
        self.seen.append(x.clone())
        return self.inner(x)


def test_every_call_has_another_batch_of_the_real_inputs(
    model: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "same_products", lambda _: Spy(nn.Identity(), clock, 0.6))
    images = bench.real_images(model, None, limit=12)
    dense = Spy(bench.dense_of(model), clock, 0.5)
    setting = Setting(repeats=4)
    first = bench_model(model, dense, images, [0.7], [3], setting, compiled=())
    dense.seen.pop()  # the last call is for its memory
    timed = dense.seen[1::2]  # the others come before, untimed
    assert len({tuple(x.flatten().tolist()) for x in timed}) == len(timed) == timing.WARMUP + 4
    known = {tuple(image.flatten().tolist()) for image in images}
    assert all(tuple(image.flatten().tolist()) in known for batch in dense.seen for image in batch)
    latency = first["results"][0]["dense_latency_ms"]
    assert latency.pop("form") == "eager"
    assert latency == pytest.approx(dict.fromkeys(PERCENTILES, 500.0))
    copy = bench.placed(model, setting)
    copy.set_budget(0.7)
    share = realised(copy, copy.plan, [torch.cat(timed[timing.WARMUP :])]).mean().item()
    assert first["results"][0]["macs_ratio"] == pytest.approx(share, abs=1e-9)


def test_the_faster_dense_form_counts(model: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Spy(bench.dense_of(model), clock, 0.5)
    images = bench.real_images(model, None, limit=4)
    for compiled, same, form in ((0.2, 0.3, "compiled"), (0.9, 0.8, "eager"), (0.9, 0.1, "eager, same products")):
        seconds = min(compiled, same)
        monkeypatch.setattr(bench, "compiled_form", lambda *_, s=compiled: Spy(nn.Identity(), clock, s))
        monkeypatch.setattr(bench, "same_products", lambda *_, s=same: Spy(nn.Identity(), clock, s))
        found = bench_model(model, dense, images, [0.7], [2], Setting(repeats=2))["results"][0]
        assert found["dense_latency_ms"]["form"] == form
        assert found["dense_latency_ms"]["p50"] == pytest.approx(1e3 * min(0.5, seconds))


def test_the_faster_adaptive_form_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"0.8, eager": 0.3, "0.8, compiled": 0.2, "0.7, eager": 0.1, "0.7, compiled": 0.15}
    asked: list[str] = []

    def interleaved(calls: dict[str, Call], *_args: Any, **_options: Any) -> dict[str, list[float]]:
        return {name: [seconds.get(name, 0.4)] for name in calls}

    monkeypatch.setattr(bench, "interleaved", interleaved)
    monkeypatch.setattr(bench, "compiled_form", lambda net, _, name="dense": asked.append(name) or net)
    images, dense, setting = bench.real_images(model, None, limit=4), bench.dense_of(model), Setting(repeats=1)
    for which, fastest in ((["dense"], [300, 100]), (["dense", "adaptive"], [200, 100])):
        asked.clear()
        rows = bench_model(model, dense, images, [0.8, 0.7], [2], setting, which)["results"]
        assert asked == which
        assert [row["latency_ms"]["p50"] for row in rows] == pytest.approx(fastest)
        assert [row["speedup"] for row in rows] == pytest.approx([400 / ms for ms in fastest])
        assert all(len(row["forms_ms"]) == len(which) for row in rows)


def test_a_compiler_that_fails_is_told_and_left_out(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    found = bench_saved(model, budgets=[0.7], batch_sizes=[2], limit=4, setting=Setting(repeats=1))
    assert found["results"][0]["dense_latency_ms"]["form"].startswith("eager")
    assert "torch.compile failed (RuntimeError: no C++ compiler)" in caplog.text


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    setting = Setting(repeats=1, dtype="bfloat16", threads=1)
    found = bench_saved(model, budgets=[0.5], batch_sizes=[2], limit=4, setting=setting, compiled=())
    assert found["dtype"] == "bfloat16"
    assert all(torch.equal(v, model.state_dict()[k]) and v.dtype == torch.float32 for k, v in before.items())
    assert torch.equal(drawn, torch.get_rng_state())


def test_lower_precision_leaves_what_gates_weigh(model: Any) -> None:
    made = bench.placed(model, Setting(dtype="bfloat16"))
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    for gate, own in zip(gates_of(made), gates_of(model), strict=True):
        for name, tensor in gate.named_buffers(recurse=False):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, getattr(own, name))


def test_images_of_a_folder(model: Any, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "d", {"train": 8, "test": 6})
    assert bench.real_images(model, str(folder), limit=5).shape == (5, 1, 8, 8)
    images = bench.real_images(model, None, limit=602)
    assert statistics.fmean(images.flatten().tolist()) == pytest.approx(0, abs=0.05)


# --- the primitives -------------------------------------------------------------------------------------------


def test_ops() -> None:
    shape = OpShape(dim=24, hidden=48, heads=3)
    found = bench_ops.bench_ops(Setting(repeats=5), shape=shape, tokens=(9, 30), learners=(2, 4))
    assert list(found) == ["device", "threads", "dtype", "ops"]
    assert len(found["ops"]) == 8
    for row in found["ops"]:
        assert 0.3 < row["macs_ratio"] < 0.7
        dense, mine = row["dense_latency_ms"]["p50"], row["latency_ms"]["p50"]
        assert row["efficiency"] == pytest.approx(dense * row["macs_ratio"] / mine)
        assert row["dense_latency_ms"]["form"] in ("linear", "full")


def test_the_faster_dense_form_of_a_primitive_counts(clock: Clock) -> None:
    def spend(seconds: float) -> None:
        clock.now += seconds

    for linear, form in ((4.0, "linear"), (9.0, "full")):
        op = bench_ops._Op(
            lambda _, linear=linear: spend(linear), lambda item: spend(6.0 if bool((item[1] == 2).all()) else 2.0),
            (0, 3, 6), 1,
        )  # fmt: skip
        row = bench_ops._bench_op(op, 50, 4, Setting(repeats=3), torch.Generator().manual_seed(0))
        assert row["dense_latency_ms"]["form"] == form
        assert row["efficiency"] == pytest.approx(min(linear, 6.0) * row["macs_ratio"] / 2.0)
        assert row["efficiency_linear"] == pytest.approx(linear * row["macs_ratio"] / 2.0)


@pytest.mark.parametrize("make", [bench_ops._mlp_op, bench_ops._projections_op])
def test_at_full_width_the_primitive_is_the_dense_one(make: Any) -> None:
    op = make(OpShape(dim=24, hidden=48, heads=3), 4, Setting(), torch.Generator().manual_seed(0))
    x = torch.randn(7, 24)
    full, half = torch.full((op.groups, 7), 4), torch.full((op.groups, 7), 2)
    torch.testing.assert_close(op.sparse((x, full)), op.dense((x, full)), rtol=1e-4, atol=1e-7)
    assert (op.sparse((x, half)) - op.dense((x, half))).abs().max() > 1e-4


def test_ops_of_the_command_need_no_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bench_ops.bench_ops(
        Setting(repeats=1), shape=OpShape(dim=24, hidden=48, heads=3), tokens=(5,), learners=(4,)
    )
    asked: list[Setting] = []
    monkeypatch.setattr(bench_ops, "bench_ops", lambda setting: asked.append(setting) or tiny)
    status, captured = run("--ops", "--json", "--repeats", 7, "--dtype", "bfloat16")
    assert (status, json.loads(captured.out)) == (0, tiny)
    assert asked == [Setting(repeats=7, dtype="bfloat16")]
    status, captured = run("--ops")
    assert status == 0
    assert "projections" in captured.out
    assert "efficiency" in captured.out


# --- what the user can mend -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dtype", "float16"), "dtype: found 'float16', expected float32 or bfloat16"),
        (("--device", "tpu"), "device: found 'tpu'"),
        (("--repeats", 0), "repeats: found 0"),
        (("--threads", 0), "threads: found 0"),
        (("--limit", 0), "limit: found 0"),
        (("--limit", 4, "--batch-size", 8), "batch_size: found 8 for 4 images"),
        (("--budget", 0.001), "cannot go below"),
        (("--data", "absent/folder/here"), "no such folder"),
        (("--weights", "absent.safetensors"), "no such file"),
    ],
)
def test_wrong_options(run: Any, saved: Path, words: tuple[object, ...], said: str) -> None:
    status, captured = run(saved, "--no-compile", *words)
    assert status == 2
    assert captured.out == ""
    line = refused(captured)
    assert said in line
    assert ";" in line


def test_no_model_and_an_unknown_folder(run: Any, tmp_path: Path) -> None:
    status, captured = run()
    assert status == 2
    assert "give DIR, or --ops" in refused(captured)
    status, captured = run(tmp_path / "absent")
    assert status == 2
    assert "no such folder" in refused(captured)


def test_data_are_wanted_for_any_other_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.base, "architecture", "deit_tiny_patch16_224")
    with pytest.raises(AcmizeError, match=r"data: found none.*deit_tiny_patch16_224.*; give --data DATA"):
        bench.real_images(model, None, limit=4)


def test_without_saved_budgets_one_is_wanted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "results", {})
    monkeypatch.setattr(model, "budget", None)
    with pytest.raises(AcmizeError, match="give --budget"):
        bench_saved(model, limit=4, batch_sizes=[1], compiled=())


@torch.no_grad()
def test_same_products_are_the_dense_model_by_other_products(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, used = bench.dense_of(model), []
    gemm = layers.gemm
    monkeypatch.setattr(layers, "gemm", lambda *args: (used.append(args), gemm(*args))[1])
    made, x = bench.same_products(dense), bench.real_images(model, None, limit=4)
    torch.testing.assert_close(made(x), dense(x), atol=1e-5, rtol=1e-5)
    linears = [m for m in dense.modules() if type(m) is nn.Linear]
    assert len(used) == len(linears) > 8
    assert all(a is b for a, b in zip(made.parameters(), dense.parameters(), strict=True))
