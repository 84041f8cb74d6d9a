"""LAG over the real timm classes: exact when inserted, skipping what is counted, gates that learn, channels removed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import BlurPool2d
from timm.models import efficientnet
from timm.models.resnet import BasicBlock, Bottleneck
from tiny_cnn import CHAINS, images, noisy, resnet
from torch import nn

from acmize.channels import ChannelChain
from acmize.cost import count_macs
from acmize.damage import collect_damage
from acmize.errors import AcmizeError
from acmize.gates import Gate, GateSpec, choosing, full_width, gates_of, set_dial
from acmize.hosts import make_plan
from acmize.hub import from_pretrained, make_adaptive
from acmize.init import collect_moments, init_
from acmize.insert import convert_
from acmize.methods.lag import LagConfig, LogisticGate, temperature
from acmize.ops import use_backend
from acmize.phases.calibrate import calibrate, realised
from acmize.phases.pretrain_gates import fit_damage_gates
from acmize.plan import Plan, Site
from acmize.recording import record
from acmize.removal import remove_dead_

CONFIG = LagConfig(num_learners=4, gate_hidden=2)
ENTRIES = {
    "resnet basic": 5, "resnet bottleneck": 5, "efficientnet lite": 7, "vgg": 3, "vgg without norms": 3, "convnext": 4,
    "convnext conv_mlp": 4, "fasternet": 4,
}  # fmt: skip


def planned(dense: nn.Module, config: LagConfig = CONFIG, **kwargs: Any) -> Plan:
    return make_plan(dense, config, example=(images(1),), **kwargs)


def adapted(dense: nn.Module, config: LagConfig = CONFIG, **kwargs: Any) -> tuple[nn.Module, Plan]:
    plan = planned(dense, config, **kwargs)
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [images(16, seed=1)]))
    return model.eval(), plan


def fixed(choice: int) -> Any:
    """A `Choose`: every sample runs as many learners, but no fewer than it may."""
    return lambda gate, x: torch.full((len(x), 1), max(choice, gate.min_choice))


class Mixed:
    """A `Choose`: samples differ, and the same call gives the same choices."""

    def __call__(self, gate: Gate, x: torch.Tensor) -> torch.Tensor:
        return (torch.arange(len(x)) % (gate.num_learners + 1)).clamp_min(gate.min_choice)[:, None]


@pytest.mark.parametrize("name", CHAINS)
def test_every_convolution_is_accounted_for(name: str) -> None:
    dense = CHAINS[name]()
    plan = planned(dense)
    assert len(plan.entries) == ENTRIES[name]
    named = {path for e in plan.entries for path in e.roles.values()} | {r.fqn for r in plan.refused}
    missing = [p for p, m in dense.named_modules() if isinstance(m, nn.Conv2d) and p not in named]
    assert all("downsample" in p or "conv_s2d" in p or "spatial_mixing" in p for p in missing), missing


def test_weights_are_not_ordered_without_moments() -> None:
    dense = CHAINS["vgg"]()
    plan = planned(dense)
    with pytest.raises(AcmizeError, match="moments: found none of"):
        init_(convert_(copy.deepcopy(dense), plan), dense, plan, {})


def test_put_back_means_help() -> None:
    """At half width the output is nearer to the dense one with the means put back than with zeros."""
    dense = CHAINS["resnet basic"]()
    model, _ = adapted(dense)
    x = images(16, seed=1)
    with torch.no_grad(), choosing(model, fixed(2)):
        y = dense(x)
        near = (model(x) - y).square().mean()
        for module in model.modules():
            if isinstance(module, ChannelChain):
                for layer in module.layers:
                    cut: Any = layer
                    if cut.learner_bias is not None:
                        cut.bias.add_(cut.learner_bias.sum(0))
                        cut.learner_bias.zero_()
        assert (model(x) - y).square().mean() > 1.05 * near


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: resnet(Bottleneck, cardinality=4, base_width=16), CONFIG, "conv2: a convolution of 4 groups"),
        (lambda: resnet(BasicBlock), LagConfig(num_learners=100), "--num-learners 8"),
        (lambda: resnet(BasicBlock, aa_layer=BlurPool2d, channels=(8, 8, 8, 8)), CONFIG, None),
        (lambda: efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.3), CONFIG, "SqueezeExcite"),
    ],
    ids=["groups", "learners", "blur", "squeeze-and-excitation"],
)
def test_what_cannot_be_cut_is_refused_by_name(make: Any, config: LagConfig, message: str | None) -> None:
    dense = noisy(make())
    if message is None:  # blocks of stride 2 alone have a blur
        assert "a BlurPool2d (aa)" in {r.fqn: r.reason for r in planned(dense).refused}["layer2.0"]
        return
    with pytest.raises(AcmizeError, match=message):
        planned(dense, config)


class Own(nn.Module):
    """A chain in a module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.a, self.norm, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.b(self.norm(self.a(x)))).mean((2, 3)))


@torch.no_grad()
def test_a_chain_of_ones_own() -> None:
    dense, x = noisy(Own()), images(5)
    model, plan = adapted(dense, sites=[Site.channels("own", ["a", "b"], [["norm"]])])
    assert [e.fqn for e in plan.entries] == ["own"]
    assert [r.fqn for r in plan.refused] == ["stem"]
    with choosing(model, full_width):
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-4)
    with choosing(model, fixed(1)):
        assert (model(x) - dense(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site.channels("own", ["a"], []), "expected two or more"),
        (Site.channels("own", ["a", "b"], [["nothing"]]), "'nothing' is not a module"),
        (Site.channels("own", ["b", "stem"], [[]]), "'stem' takes 3 channels, but 'b' gives 8"),
        (Site.channels("own", ["a", "norm"], [[]]), "is a BatchNorm2d, expected a plain convolution"),
    ],
)
def test_wrong_chains_are_named(site: Site, message: str) -> None:
    with pytest.raises(AcmizeError, match=message):
        planned(noisy(Own()), sites=[site])


def test_a_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="expected 'damage' or 'logistic'"):
        LagConfig(gate="soft")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_learners: found 0"):
        LagConfig(num_learners=0)


# --- gates ----------------------------------------------------------------------------------------------------


def logistic(num: int = 4, min_choice: int = 0) -> LogisticGate:
    """Learners of one unit of cost each."""
    spec = GateSpec(dim=6, hidden=8, learner_macs=((1,) * num,), gate_macs=(0,), macs_total=1, min_choice=min_choice)
    return LogisticGate(spec).eval()


def test_a_fresh_logistic_gate_runs_everything() -> None:
    gate = logistic()
    assert (gate(torch.randn(9, 6)).choice == 4).all()


def test_learners_run_up_to_the_first_that_is_not_worth_it() -> None:
    gate = logistic()
    gate.fc2.bias.data = torch.tensor([5.0, 4.1, 2.5, 3.0]).log()  # what is left out costs 4, 3, 2, 1
    for price, choice in ((1.2, 4), (1.249, 4), (1.251, 0), (9.0, 0)):
        gate.price.fill_(price)
        assert (gate(torch.randn(3, 6)).choice == choice).all()
    gate.fc2.bias.data = torch.tensor([9.0, 4.1, 2.5, 3.0]).log()
    for price, choice in ((1.2, 4), (1.3, 2), (1.4, 1), (2.2, 1), (2.3, 0)):
        gate.price.fill_(price)
        assert (gate(torch.randn(3, 6)).choice == choice).all(), price
    least = logistic(min_choice=1)
    least.price.fill_(1e9)
    assert (least(torch.randn(3, 6)).choice == 1).all()


@pytest.mark.parametrize("min_choice", [0, 1])
def test_straight_through_samples_prefixes_and_passes_the_gradient(min_choice: int) -> None:
    gate = logistic(min_choice=min_choice).train()
    gate.price.fill_(1.0)
    gate.fc2.bias.data = torch.tensor([1.5, 0.5, -0.5, -1.5]) + torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
    decision = gate(torch.randn(20_000, 6))
    keep = decision.keep
    assert keep is not None
    assert torch.equal((keep.detach() > 0.5).sum(-1), decision.choice)
    assert (keep.detach().diff(dim=-1) < 0.5).all()  # a prefix
    share = (keep.detach() > 0.5).float().mean((0, 1))
    expected = torch.tensor([1.5, 0.5, -0.5, -1.5]).sigmoid()
    expected[:min_choice] = 1.0
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)
    keep.sum().backward()
    grad = gate.fc2.bias.grad
    assert grad is not None
    assert (grad[min_choice:] > 0).all()


def test_the_temperature_falls_as_published_over_any_length() -> None:
    assert temperature(0.0) == 5.0
    assert temperature(0.4) == pytest.approx(5 * 0.9**10)
    assert temperature(1.0) == 0.5


@pytest.mark.parametrize("gate", ["damage", "logistic"])
def test_training_reaches_gates_and_weights(gate: Any) -> None:
    model, _ = adapted(resnet(BasicBlock), LagConfig(num_learners=4, gate_hidden=2, gate=gate))
    for one in gates_of(model):
        one.price.fill_(1.5 / one.cost[0, -1])  # where a fresh gate is undecided
    model.train()
    with record(model, 4) as seen:
        loss = model(images(4)).square().mean() + seen.differentiable().mean() / 1e6
    loss.backward()
    for module in model.modules():
        if isinstance(module, ChannelChain):
            last: Any = module.gate.fc2
            assert last.weight.grad.abs().sum() + last.bias.grad.abs().sum() > 0
            assert module.layers[-1].bias.grad.abs().sum() > 0  # pyright: ignore


# --- the way of a conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated() -> tuple[nn.Module, nn.Module, Plan]:
    """A ResNet with fitted damage gates: (dense, model, plan)."""
    dense = CHAINS["resnet basic"]()
    model, plan = adapted(dense)
    generator = torch.Generator().manual_seed(0)
    data = collect_damage(
        model, dense, [images(24, seed=s) for s in range(4)], choose=full_width, generator=generator, draws=2
    )
    assert all(d.x.dim() == 2 and d.damage.shape[1:] == (1, 4) for d in data.values())
    fit_damage_gates(data, steps=60)
    return dense, model, plan


def test_any_budget_is_met(gated: Any) -> None:
    _, model, plan = gated
    held = [images(48, seed=9)]
    budgets = (0.97, 0.93, 0.88)
    calibration = calibrate(model, plan, held, budgets)
    for budget in budgets:
        set_dial(model, calibration.dial(budget))
        assert realised(model, plan, held).mean().item() == pytest.approx(budget, abs=0.01)


@torch.no_grad()
def test_removed_channels_are_gone_and_the_rest_is_unchanged(gated: Any, tmp_path: Any) -> None:
    dense, fitted, plan = gated
    model, x = copy.deepcopy(fitted), images(6, seed=4)

    def least(gate: Gate, y: torch.Tensor) -> torch.Tensor:
        return (torch.arange(len(y)) % 3)[:, None]  # two of four learners at most

    with choosing(model, least):
        before = model(x)
        smaller = remove_dead_(model, plan, [x])
        after = model(x)
    assert all(e.num_learners == 2 for e in smaller.entries)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    with use_backend("masked"), choosing(model, least):
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    chain: Any = model.get_submodule(plan.entries[0].target)
    assert chain.layers[0].weight.shape[0] == plan.entries[0].bounds[2]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in chain.modules())
    paths = list(plan.entries[0].roles.values())
    whole = sum(dense.get_submodule(p).weight.numel() for p in paths)
    assert sum(layer.weight.numel() for layer in chain.layers) == whole / 2
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in dense.parameters())
    with choosing(model, full_width), record(model, len(x)) as seen:
        counted = count_macs(model, x)
        gates = sum(seen.gates.values())
        assert counted == len(x) * (smaller.macs_rest() - gates) + seen.executed().sum().item()
    assert smaller.budget_range[1] < plan.budget_range[1]

    calibration = calibrate(model, smaller, [images(24, seed=9)], (0.9,), tolerance=0.05)
    base = {"library": "module", "architecture": "ResNet", "kwargs": {}, "pretrained_cfg": {}}
    made = make_adaptive(model, smaller, calibration, base)
    made.set_budget(0.9)
    made.save_pretrained(tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out", model=CHAINS["resnet basic"]())
    assert torch.equal(loaded(x), made(x))


def test_what_runs_often_enough_stays() -> None:
    dense = CHAINS["resnet basic"]()
    model, plan = adapted(dense)
    with choosing(model, Mixed()):
        assert remove_dead_(model, plan, [images(10)]) == plan
