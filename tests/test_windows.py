"""Convolutions over time as ACMs: exact, the same on every path, optimal at every rank, free where there is padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Random
from tiny_speech import HOSTS, inputs_for
from torch import Tensor, nn

from acmize.cost import count_macs
from acmize.errors import AcmizeError
from acmize.gates import choosing, full_width
from acmize.hosts import make_plan
from acmize.init import collect_moments, init_
from acmize.inputs import forward
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.ops import use_backend
from acmize.phases._capture import capture, tokens_of
from acmize.plan import Plan, Site
from acmize.recording import record
from acmize.windows import Geometry

CONVS: dict[str, dict[str, Any]] = {
    "strided": {"kernel_size": 5, "stride": 2},
    "padded": {"kernel_size": 3, "stride": 1, "padding": 2, "bias": False},
    "apart": {"kernel_size": 2, "stride": 3},
    "of one tap": {"kernel_size": 1},
}


class Front(nn.Module):
    """A convolution and what reads it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(12, 24, **options), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.conv(x)).mean(-1))


def made(dense: nn.Module, x: Tensor, num_learners: int = 4) -> tuple[Any, Plan]:
    config = AcmConfig(num_learners=num_learners, gate_hidden=2)
    plan = make_plan(dense, config, example=(x[:1],), sites=[Site.linear("conv")])
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [x]))
    return model.eval(), plan


@pytest.mark.parametrize("named", CONVS)
@torch.no_grad()
def test_windows_are_what_a_convolution_reads(named: str) -> None:
    conv, x = nn.Conv1d(12, 24, **CONVS[named]), torch.randn(2, 12, 31)
    read = Geometry.of(conv).windows(x)
    found = F.linear(read.flatten(-2), conv.weight.mT.flatten(1), conv.bias).mT
    torch.testing.assert_close(found, conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", CONVS)
@torch.no_grad()
def test_paths_agree_and_full_width_is_the_dense_layer(named: str) -> None:
    torch.manual_seed(0)
    dense, x = Front(**CONVS[named]).eval(), torch.randn(3, 12, 40)
    model, plan = made(dense, x)
    assert Plan.from_dict(plan.to_dict()) == plan
    wanted, cut = dense(x), {}
    for backend in ("masked", "sorted"):
        with use_backend(backend), choosing(model, full_width):
            torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-4)
        with use_backend(backend), choosing(model, Random(1)):
            cut[backend] = model(x)
    assert (cut["sorted"] - wanted).abs().max() > 1e-2 * wanted.std()
    torch.testing.assert_close(cut["sorted"], cut["masked"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_each_rank_is_the_best_there_is() -> None:
    """On the data of the moments, k learners leave the least error that any map of that rank leaves (Eckart-Young)."""
    torch.manual_seed(0)
    dense, x = Front(kernel_size=5, stride=2).eval(), torch.randn(8, 12, 60).cumsum(-1)
    model, plan = made(dense, x)
    (entry,) = plan.entries
    y = dense.conv(x).mT.flatten(0, 1)
    spectrum = torch.linalg.svdvals((y - y.mean(0)).double()).square().flip(0).cumsum(0).flip(0)
    with capture(dense, ["conv"]) as seen:
        dense(x)
    inputs, outputs = tokens_of(model.conv, *seen["conv"])
    torch.testing.assert_close(outputs, y)
    for k, found in enumerate(model.conv.all_choices(inputs)[0].unbind(1)[:-1]):
        left = spectrum[entry.bounds[k]].item()
        assert (found - y).double().square().sum().item() == pytest.approx(left, rel=1e-3)


@torch.no_grad()
def test_learners_but_the_last_cost_what_the_dense_layer_costs() -> None:
    dense, x = Front(kernel_size=5, stride=2).eval(), torch.randn(1, 12, 60)
    model, plan = made(dense, x)
    (entry,) = plan.entries
    assert (entry.macs, entry.tokens) == (28 * 12 * 24 * 5, 28)
    assert 0.9 < sum(entry.learner_macs[:-1]) * entry.tokens / entry.macs <= 1 < sum(entry.learner_macs) / 1440
    with record(model, 1) as seen, choosing(model, lambda gate, x: torch.full((*x.shape[:-1], 1), 3)):
        model(x)
    spent, whole = plan.account(seen.executed(), seen.tokens)
    assert spent.item() == 28 * (sum(entry.learner_macs[:3]) + entry.gate_macs) + 24 * 3
    assert whole.item() == entry.macs + 24 * 3


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}])
def test_convolutions_that_are_refused(options: dict[str, Any]) -> None:
    dense = Front(kernel_size=3, **options)
    with pytest.raises(AcmizeError, match=r"site conv: (a convolution of|padding)"):
        make_plan(dense, AcmConfig(), example=(torch.zeros(1, 12, 9),), sites=[Site.linear("conv")])


@pytest.mark.parametrize("length", [20_000, 20_100, 20_300, 26_000])
@torch.no_grad()
def test_frames_that_only_padding_reads_run_no_learner(length: int) -> None:
    """The others run theirs: what is real comes out as if nothing were padded."""
    dense = HOSTS["moonshine"]()
    plan = make_plan(dense, AcmConfig(num_learners=4, gate_hidden=2), merge="none")
    model = convert_(copy.deepcopy(dense), plan)
    batch = inputs_for(dense, (30_000, length))
    init_(model, dense, plan, collect_moments(dense, plan, [batch]))
    real: dict[str, Tensor] = {}
    encoder = model.get_submodule("model.encoder")
    hook = encoder.layers[0].register_forward_pre_hook(lambda *_: real.update(frames=encoder.padding.read_any().sum(1)))
    with record(model, 2) as seen, choosing(model, full_width):
        found = forward(model, batch).logits
    hook.remove()
    second, third = (seen.tokens[f"model.encoder.{name}"] for name in ("conv2", "conv3"))
    assert third.tolist() == real["frames"].tolist()
    assert second[1] == 2 * real["frames"][1] + 1  # of three taps, every second frame
    assert second[0] == seen.per_token["model.encoder.conv2"].shape[1]  # the whole of the longest
    assert real["frames"][1] < real["frames"][0]
    torch.testing.assert_close(found, forward(dense, batch).logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("others", [(), ("*feed_forward",)])
@pytest.mark.parametrize("name", ["wavlm", "wav2vec2"])
@torch.no_grad()
def test_macs_of_any_length_beside_a_named_convolution(name: str, others: tuple[str, ...]) -> None:
    """A front end's frames are more than the blocks'; the plan's length is one of them, the same one everywhere."""
    dense = HOSTS[name]()
    (path,) = (p for p, _ in dense.named_modules() if p.endswith("conv_layers.0.conv"))
    wanted = (f"{path}:linear", *others)
    plan = make_plan(dense, AcmConfig(num_learners=2, gate_hidden=1), target_modules=wanted, merge="none")
    assert [e.own_frames for e in plan.entries] == [True, *(False for _ in plan.entries[1:])]
    assert (len(plan.entries) > 1) == bool(others)
    batch = inputs_for(dense, (5_321,))
    model = convert_(copy.deepcopy(dense), plan)
    with record(model, 1) as seen, choosing(model, full_width):
        forward(model, batch)
    counted = count_macs(dense, batch)
    spent, whole = plan.account(seen.executed(), seen.tokens)
    assert whole.item() == pytest.approx(counted, rel=5e-3)
    more = sum(seen.tokens[e.fqn] * (sum(e.learner_macs) + e.gate_macs - e.macs // e.tokens) for e in plan.entries)
    assert spent.item() == pytest.approx(counted + more, rel=5e-3)


@pytest.mark.parametrize("reader", ["head", "nowhere", ["conv"], 3])
def test_a_plan_that_names_no_convolution_as_the_reader_is_refused(reader: Any) -> None:
    dense = Front(kernel_size=3)
    _, plan = made(dense, torch.randn(2, 12, 9))
    d = plan.to_dict()
    d["entries"][0]["options"]["reader"] = reader
    with pytest.raises(AcmizeError, match="does not fit the plan"):
        convert_(dense, Plan.from_dict(d))
