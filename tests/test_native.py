"""A converted model is still a module: what people do with modules works, and says so where it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from short import converted
from tiny import Random, adapted, half_width, images, vit
from torch import Tensor, nn

from acmize import AcmConfig, AcmizeError
from acmize.gates import choosing, full_width, gates_of, set_dial
from acmize.hub import make_adaptive
from acmize.layers import Dense
from acmize.methods.token_merging import set_schedule
from acmize.phases.calibrate import Calibration
from acmize.recording import record
from acmize.results import Results


@pytest.fixture
def model() -> Any:
    """A tiny ViT whose gates, random, choose differently for different tokens."""
    torch.manual_seed(0)
    made, plan = adapted(vit(), AcmConfig(num_learners=4, gate_hidden=4), merge="auto")
    for gate in gates_of(made):
        for name, p in gate.named_parameters():
            nn.init.normal_(p, std=1.0 if "weight" in name else 0.3)
    made = make_adaptive(made, plan, Calibration(budgets=(1.0, 0.3), dials=(0.3, 0.75)), {"architecture": "tiny"})
    made.set_budget(0.6)
    return made.eval()


@pytest.fixture(scope="module")
def measured() -> Any:
    return converted({"phases": []})


def chosen(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and every choice of every gate."""
    with torch.no_grad(), record(model, len(x)) as seen:
        out = model(x)
    return out, torch.cat([c.flatten() for c in seen.per_token.values()])


def close(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool((found.float() - expected).norm() < share * expected.norm())


# --- other precisions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_makes_the_same_choices(model: Any, dtype: torch.dtype) -> None:
    x = images(8)
    expected, before = chosen(model, x)
    assert 0 < (before == before.max()).sum() < len(before)
    half = copy.deepcopy(model).to(dtype)
    assert half.blocks[0].mlp.fc1.weight.dtype == dtype
    assert half.blocks[0].mlp.gate.price == model.blocks[0].mlp.gate.price
    found, after = chosen(half, x.to(dtype))
    assert found.dtype == dtype
    assert not torch.equal(found.float(), expected)
    same = (before == after).double().mean() if before.shape == after.shape else torch.zeros(())
    assert same > 0.9
    with choosing(model, Random(1)), choosing(half, Random(1)), torch.no_grad():
        set_schedule(model, ())
        set_schedule(half, ())
        assert close(half(x.to(dtype)), model(x), 0.05)


def test_prices_survive_half_precision(model: Any) -> None:
    """The smallest prices and costs are below what half precision can hold."""
    before = copy.deepcopy(model)
    model.half().float()
    for old, new in zip(gates_of(before), gates_of(model), strict=True):
        assert (old.cost > 0).any()
        for name in ("cost", "price", "dial", "learner_macs"):
            assert torch.equal(getattr(old, name), getattr(new, name))
    assert not torch.equal(before.head.weight, model.head.weight)


def test_autocast(model: Any) -> None:
    x = images(8)
    set_schedule(model, ())
    with choosing(model, Random(1)), torch.no_grad():
        expected = model(x)
    with choosing(model, Random(1)), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert not torch.equal(found.float(), expected)
    assert close(found, expected, 0.05)


# --- training -------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(model: Any) -> None:
    x = images().requires_grad_()  # as in training behind a layer that learns
    set_schedule(model, (0, 3))
    model.train()
    expected = gradients(model, x)
    calls: list[int] = []
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    found = gradients(model, x)
    assert len(calls) == 2, "nothing was computed again"
    assert expected.keys() == found.keys()
    assert any(name.startswith("blocks.0.mlp.gate") and g.abs().max() > 0 for name, g in found.items())
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, msg=lambda told, name=name: f"{name}: {told}")


def test_data_parallel_on_the_cpu(model: Any) -> None:
    x = images(6)
    expected, _ = chosen(model, x)
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(model)(x), expected)


# --- adapters -------------------------------------------------------------------------------------------------


def test_lora_on_what_stays_dense() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, _ = adapted(vit(), target_modules=["*.mlp"], merge="none")
    set_dial(model, 0.5)
    x = images()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"]))
    learnt = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(learnt) == 2 * 2 * 2
    assert all("lora_" in name for name in learnt)
    with choosing(model, half_width):
        before = wrapped.eval()(x).detach()
        for p in wrapped.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.2)
        with torch.no_grad():
            found = wrapped(x)
        assert not torch.allclose(found, before, atol=1e-2)
        gradients(wrapped, x)
        assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
        merged = wrapped.merge_and_unload()
        with torch.no_grad():
            torch.testing.assert_close(merged(x), found, atol=1e-4, rtol=1e-4)


def test_an_adapter_around_a_layer_that_is_cut_is_refused() -> None:
    """Its product would be left out: such a layer is read, not called."""
    peft = pytest.importorskip("peft")
    model, _ = adapted(vit())
    with pytest.raises(AcmizeError, match=r"blocks\.0\.mlp.*around its layer fc1, which is not called but cut"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["mlp.fc1"]))


def test_torchao_weights_in_what_stays_dense() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, _ = adapted(vit(), target_modules=["*.mlp"], merge="none")
    x = images()
    with choosing(model, half_width), torch.no_grad():
        expected = model(x)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, _: type(m) is Dense)
        assert type(model.blocks[0].attn.qkv.weight) is not nn.Parameter  # type: ignore[union-attr]
        found = model(x)
    assert not torch.equal(found, expected)
    assert close(found, expected, 0.05)


# --- what it says of itself -----------------------------------------------------------------------------------


def test_repr_shows_the_plan(model: Any) -> None:
    told = repr(model)
    assert "budget=0.6" in told
    low, high = model.plan.budget_range
    assert f"{len(model.plan.entries)} adaptive sites (" in told
    assert f"merging tokens, {len(model.plan.refused)} modules stay dense; budgets {low:.3f} to {high:.3f}" in told
    assert "AcmMlp(" in told


def test_what_a_batch_costs_comes_with_its_output(model: Any) -> None:
    x = images(6)
    expected, _ = chosen(model, x)
    with torch.no_grad():
        found, share = model.with_compute(x)
        with record(model, len(x)) as seen:
            model(x)
        alone = torch.cat([model.with_compute(one[None])[1] for one in x])
    assert torch.equal(found, expected)
    rest = model.plan.macs_rest(model.plan.schedule(0.6))
    torch.testing.assert_close(share, (seen.executed().double() + rest) / model.plan.macs_dense)
    assert share.std() > 0
    torch.testing.assert_close(alone, share)
    with choosing(model, full_width), torch.no_grad():
        assert (model.with_compute(x)[1] > share).all()


def test_results_print_show_and_plot_themselves(measured: Any) -> None:
    results = measured.results
    assert isinstance(results, Results)
    text = str(results)
    assert [row["budget"] for row in results["results"]] == [0.75, 0.6]
    for row in results["results"]:
        assert f"| {row['budget']:g} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.1f} |" in text
    shown = results._repr_html_()
    assert shown.count("<tr>") == 4  # head, dense, two budgets
    assert f"<td>{results['results'][0]['macs_ratio']:.3f}</td>" in shown
    assert str(Results()) == "nothing measured"
    with pytest.raises(AcmizeError, match="found no accuracy to plot"):
        Results(dense={"accuracy": None}).plot()


def test_the_plot_has_every_row(measured: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = measured.results.plot()
    line, dense = axes.lines
    wanted = sorted((r["macs_ratio"], 100 * r["accuracy"]) for r in measured.results["results"])
    assert list(zip(*line.get_data(), strict=True)) == wanted
    assert dense.get_ydata()[0] == 100 * measured.results["dense"]["accuracy"]
    pyplot.close(axes.figure)
