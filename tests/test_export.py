"""Exported files: the model's answers at any budget chosen at run time, from one file, for any number of samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_onnx import ask, session
from short import converted, refused
from timm.models.resnet import BasicBlock
from tiny import adapted, images, vit
from tiny_cnn import SIZE, resnet
from torch import Tensor, nn

from acmize import AcmConfig, AcmizeError
from acmize.export import export
from acmize.export.trace import dial_at, schedule_at, trace
from acmize.gates import gates_of
from acmize.hosts import make_plan
from acmize.hub import from_pretrained, make_adaptive, save_pretrained
from acmize.methods.cosine_gate import CosineGateConfig
from acmize.methods.token_merging import schedule_of
from acmize.phases.calibrate import Calibration
from acmize.plan import Merging
from acmize.quickstart_model import digits
from acmize.recording import record

BUDGETS = (0.95, 0.75, 0.5, 0.3)
pytest.importorskip("onnxruntime")


def adaptive(dense: nn.Module, config: AcmConfig, merge: str = "none") -> Any:
    """A converted tiny model whose random gates choose differently for different tokens and budgets."""
    made, plan = adapted(dense, config, merge=merge)
    for gate in gates_of(made):
        for name, p in gate.named_parameters():
            nn.init.normal_(p, std=1.0 if "weight" in name else 0.3)
    calibration = Calibration(budgets=(1.0, 0.8, 0.3), dials=(0.3, 0.6, 0.75))
    base = {"library": "module", "architecture": "tiny", "kwargs": {}, "pretrained_cfg": {"license": "mit"}}
    results = {"results": [{"budget": 0.5, "macs_ratio": 0.49, "accuracy": 0.8, "seconds": 1.0}]}
    return make_adaptive(made.eval(), plan, calibration, base, results)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return adaptive(vit(), AcmConfig(num_learners=4, gate_hidden=4), "auto")


def answers(model: Any, x: Tensor, budget: float) -> tuple[Tensor, list[Tensor]]:
    """The model's own logits, and what its gates chose."""
    model.set_budget(budget)
    with torch.no_grad(), record(model, len(x)) as seen:
        return model(x), list(seen.per_token.values())


# --- rules inside the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [None, 2])
def test_dial_and_schedule_in_the_graph_are_those_of_python(fixed: int | None) -> None:
    macs, linear = 1_250_000_000, (442_368,) * 12
    merging = Merging(
        tokens=197, prefix=1, blocks=12, dim=192, attention_dim=192, macs=macs, linear_macs=linear,
        dense_macs=(0,) * 12, fixed=fixed,
    )  # fmt: skip
    table = Calibration(budgets=(1.0, 0.75, 0.5, 0.1), dials=(0.2, 0.4, 0.6, 0.8))
    found = set()
    for budget in torch.linspace(0.05, 1.0, 40, dtype=torch.float64):
        schedule = tuple(int(r) for r in schedule_at(merging, budget))
        assert schedule == merging.schedule(budget.item())
        assert dial_at(table, budget).item() == pytest.approx(table.dial(budget.item()), abs=1e-12)
        found.add(schedule)
    assert len(found) > 20 if fixed is None else len(found) == 1


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_always_skip")
def test_one_onnx_file_answers_as_the_model_does(model: Any, tmp_path: Path) -> None:
    x = images(5)
    loaded = session(export(model, tmp_path / "model.onnx"))
    seen: list[Tensor] = []
    for budget in BUDGETS:
        expected, choices = answers(model, x, budget)
        torch.testing.assert_close(ask(loaded, x, budget), expected, atol=1e-4, rtol=0)
        assert not any(torch.equal(expected, other) for other in seen)
        seen.append(expected)
    assert any(schedule_of(model)), "no tokens are merged at the last budget"
    assert any(0 < (c < c.max()).sum() < c.numel() for c in choices), "every token runs the same"
    alone = torch.cat([ask(loaded, x[i : i + 1], 0.5) for i in range(5)])
    torch.testing.assert_close(alone, answers(model, x, 0.5)[0], atol=1e-4, rtol=0)
    assert torch.equal(ask(loaded, x, 7.0), ask(loaded, x, 1.0))  # clamped to the range
    told = loaded.get_modelmeta().custom_metadata_map
    assert json.loads(told["preprocessing"])["input_size"] == [3, 16, 16]
    assert told["license"] == "mit"
    assert json.loads(told["results"]) == [{"budget": 0.5, "macs_ratio": 0.49, "accuracy": 0.8}]
    low, high = json.loads(told["budget_range"])
    assert low == pytest.approx(model.plan.budget_range[0])
    assert high == 1.0


@pytest.mark.parametrize(("format", "product"), [("onnx-int8", "MatMulNBits"), ("onnx-int8-dynamic", "MatMulInteger")])
def test_int8_rounds_layers_but_not_gates(model: Any, tmp_path: Path, format: str, product: str) -> None:
    import onnx

    x = images(16)
    path = export(model, tmp_path / "model.onnx", format, compute=True)
    expected = answers(model, x, 0.75)[0]
    loaded = session(path)
    found = ask(loaded, x, 0.75)
    assert not torch.allclose(found, expected, atol=1e-4)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9
    with torch.no_grad():
        share = model.with_compute(x)[1]
    assert ask(loaded, x, 0.75, "macs_ratio").mean().item() == pytest.approx(share.mean().item(), abs=0.01)
    if format == "onnx-int8":  # no scale is shared between samples
        alone = torch.cat([ask(loaded, one[None], 0.75) for one in x])
        torch.testing.assert_close(alone, found, atol=1e-4, rtol=0)
    graphs = [onnx.load(path).graph]
    for graph in graphs:  # grows on the way
        graphs += [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    kinds = [[node.op_type for node in graph.node] for graph in graphs]
    assert any(product in k for k in kinds[1:]), "no adaptive product is in 8 bits"
    stored = {tensor.name for tensor in graphs[0].initializer}
    kept = sum(node.op_type == "MatMul" and node.input[1] in stored for node in graphs[0].node)
    assert kept == 2 * len(gates_of(model))


def test_a_torch_program_answers_as_the_model_does(model: Any, tmp_path: Path) -> None:
    x = images(5)
    program = torch.export.load(export(model, tmp_path / "model.pt2", "torch-export")).module()
    outputs = []
    for budget in BUDGETS:
        with torch.no_grad():
            outputs.append(program(x, torch.tensor(budget)))
        torch.testing.assert_close(outputs[-1], answers(model, x, budget)[0], atol=1e-5, rtol=0)
    assert not torch.allclose(outputs[0], outputs[-1], atol=1e-3)
    assert program(x[:1], torch.tensor(0.5)).shape == (1, 5)


def test_what_each_sample_cost_can_be_an_output(model: Any, tmp_path: Path) -> None:
    x = images(5)
    loaded = session(export(model, tmp_path / "model.onnx", compute=True))
    program = torch.export.load(export(model, tmp_path / "model.pt2", "torch-export", compute=True)).module()
    assert [output.name for output in loaded.get_outputs()] == ["logits", "macs_ratio"]
    seen = []
    for budget in BUDGETS[1:]:
        model.set_budget(budget)
        with torch.no_grad():
            expected, share = model.with_compute(x)
            found = program(x, torch.tensor(budget))
        assert share.std() > 0
        for logits, ratio in (found, (ask(loaded, x, budget), ask(loaded, x, budget, "macs_ratio"))):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(ratio.double(), share, atol=1e-5, rtol=0)
        seen.append(share.mean())
    assert seen == sorted(seen, reverse=True)


def test_a_compiled_package_answers_as_the_model_does(tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = adaptive(vit(depth=1), AcmConfig(num_learners=2, gate_hidden=4))
    path = export(model, tmp_path / "model.pt2", "aoti", compute=True)
    loaded = torch._inductor.aoti_load_package(str(path))
    outputs = []
    for count, budget in ((2, 0.9), (5, 0.5)):
        x = images(count)
        model.set_budget(budget)
        with torch.no_grad():
            expected, share = model.with_compute(x)
            found, ratio = loaded(x, torch.tensor(budget))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(ratio.double(), share, atol=1e-5, rtol=0)
        outputs.append(found)
    assert not torch.allclose(outputs[0], outputs[1][:2], atol=1e-3)


def test_tracing_leaves_the_model_as_it_was(model: Any) -> None:
    x = images(3)
    before, _ = answers(model, x, 0.5)
    schedule = schedule_of(model)
    trace(model, fused_attention=False)
    assert schedule_of(model) == schedule
    assert all(block.attn.fused_attn for block in model.blocks)
    with torch.no_grad():
        assert torch.equal(model(x), before)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("model.onnx", "tflite", "format: found 'tflite', expected one of onnx"),
        ("model.pt", "onnx", "expected a file .onnx"),
        ("model.onnx", "torch-export", "expected a file .pt2"),
        ("missing/model.onnx", "onnx", "is no folder; make it first"),
    ],
)
def test_wrong_names_are_refused(model: Any, tmp_path: Path, name: str, format: str, said: str) -> None:
    with pytest.raises(AcmizeError, match=said):
        export(model, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    cnn = resnet(BasicBlock)
    plan = make_plan(cnn, CosineGateConfig(), example=(torch.zeros(1, 3, SIZE, SIZE),))
    table = Calibration(budgets=(1.0,), dials=(0.0,))
    made = make_adaptive(cnn, plan, table, {"library": "module", "architecture": "tiny"})
    with pytest.raises(AcmizeError, match="found method cosine-gate, expected acm"):
        export(made, tmp_path / "model.onnx")


def test_a_missing_compiler_is_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(AcmizeError, match=r"found no C\+\+ compiler, expected one for aoti; install g\+\+ or clang"):
        export(model, tmp_path / "model.pt2", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(AcmizeError, match=r'found no onnxscript, .*pip install "acmize\[export\]"'):
        export(model, tmp_path / "model.onnx")


def test_the_command_writes_a_program(run_command: Any, tmp_path: Path) -> None:
    save_pretrained(converted({"phases": []}), tmp_path / "saved")
    status, captured = run_command("export", tmp_path / "saved", "-o", tmp_path / "model.pt2")
    assert status == 2
    assert "expected a file .onnx for onnx; name it so" in refused(captured)
    status, captured = run_command(
        "export", tmp_path / "saved", "--format", "torch-export", "-o", tmp_path / "model.pt2"
    )
    assert status == 0
    assert "inputs x and budget" in captured.out
    x, _ = digits("test")
    loaded = from_pretrained(tmp_path / "saved")
    loaded.set_budget(0.7)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(x[:3], torch.tensor(0.7))
        torch.testing.assert_close(found, loaded(x[:3]), atol=1e-5, rtol=0)
