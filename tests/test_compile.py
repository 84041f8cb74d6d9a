"""Compiled and exported, an adaptive model stays adaptive: one graph for every input, the same outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from short import converted
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from acmize import products
from acmize.adaptive import AcmMlp
from acmize.quickstart_model import digits
from acmize.recording import record


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": []})


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    images, _ = digits("test")
    return [images[i : i + 4] for i in range(0, 24, 4)]


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operators(graph: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if "acmize" in str(node.target)}


def test_one_graph_serves_inputs_of_different_widths(model: Any, inputs: list[Tensor]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        counts = []
        for x in inputs:
            with record(model, len(x)) as seen:
                model(x)
            counts.append(tuple(seen.executed().tolist()))
        assert len(set(counts)) > 1  # the inputs differ in work, which is what could compile anew
        expected = [model(x) for x in inputs]
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        found = [compiled(x) for x in inputs]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    assert operators(counter.graphs[0]) == {"acmize.expand", "acmize.contract", "acmize.mlp"}


def test_an_exported_model_runs_the_same_operators(model: Any, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],))
        assert {"acmize.mlp.default", "acmize.expand.default"} <= operators(program.graph_module)
        for x in inputs[1:]:
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)


def test_an_activation_that_no_operator_knows_is_compiled_masked(model: Any, inputs: list[Tensor]) -> None:
    class Leaky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(x)

    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, AcmMlp):
            module.act = Leaky()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        found, expected = torch.compile(other, backend=counter, fullgraph=True)(inputs[0]), other(inputs[0])
        assert (expected - model(inputs[0])).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert operators(counter.graphs[0]) == {"acmize.expand", "acmize.contract"}


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (nn.ReLU(), "relu"),
        (nn.Sigmoid(), "sigmoid"), (nn.Identity(), "identity"), (nn.Tanh(), None), (F.gelu, "gelu"),
        (F.relu, "relu"), (F.silu, "silu"), (torch.sigmoid, "sigmoid"), (F.mish, None),
    ],
)  # fmt: skip
def test_activations_by_name(act: Any, name: str | None) -> None:
    assert products.act_name(act) == name
    if name is not None:
        x = torch.linspace(-3, 3, 50)
        torch.testing.assert_close(products.ACTS[name](x), act(x))


def test_operators_fit_what_they_promise() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bounds, choice = [0, 2, 4], torch.tensor([0, 2, 1, 2, 0])
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.acmize.expand, (random(5, 6), random(8, 6), None, choice, bounds, 2)),
        (torch.ops.acmize.contract, (random(5, 8), random(6, 8), random(3, 6), choice, bounds, 2)),
        (
            torch.ops.acmize.mlp,
            (random(5, 6), [random(4, 6)], [random(4)], [True], "gelu", random(6, 4), random(3, 6), choice, bounds),
        ),
    ]
    for op, args in checks:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
