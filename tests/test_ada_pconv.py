"""Ada-PConv over timm's FasterNet and the TinyModel: nothing changes when inserted, one convolution a sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_cnn import fasternet, images
from torch import nn

import acmize.cifar_models  # noqa: F401 - registers the TinyModel
from acmize.branches import PartialBranches
from acmize.cost import count_macs
from acmize.damage import collect_damage
from acmize.errors import AcmizeError
from acmize.gates import GateSpec, choosing, full_width, set_dial
from acmize.hosts import make_plan
from acmize.init import collect_moments, init_
from acmize.insert import convert_
from acmize.methods.ada_pconv import AdaPConvConfig, Router
from acmize.phases.calibrate import calibrate
from acmize.phases.pretrain_gates import fit_damage_gates
from acmize.plan import Plan
from acmize.recording import record

HARD, SOFT, DAMAGE = AdaPConvConfig(), AdaPConvConfig(mode="soft"), AdaPConvConfig(gate="damage", gate_hidden=4)


def adapted(dense: nn.Module, config: AdaPConvConfig = HARD) -> tuple[nn.Module, Plan]:
    plan = make_plan(dense, config, example=(images(1),))
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, []))
    return model.eval(), plan


def branch(k: int) -> Any:
    return lambda gate, x: torch.full((len(x), 1), k)


@torch.no_grad()
def test_two_branches_compute_what_the_dense_one_did() -> None:
    dense = fasternet()
    model, plan = adapted(dense)
    assert len(plan.entries) == 4
    x = images(4, seed=2)
    logits = dense(x)
    scale = logits.std()
    for k in (2, 3):
        with choosing(model, branch(k)):
            torch.testing.assert_close(model(x) / scale, logits / scale, rtol=0, atol=1e-4)
    with choosing(model, branch(1)):
        assert (model(x) - logits).abs().max() / scale > 1e-3


@torch.no_grad()
def test_soft_mode_runs_every_branch() -> None:
    dense = fasternet()
    model, plan = adapted(dense, SOFT)
    x = images(3, seed=3)
    with record(model, len(x)) as seen:
        counted = count_macs(model, x)
    assert counted == len(x) * plan.macs_rest() + seen.executed().sum().item()
    static = sum(e.macs for e in plan.entries)
    assert sum(seen.most.values()) == pytest.approx((0.25 + 1 + 4) * static)
    module = next(m for m in model.modules() if isinstance(m, PartialBranches))
    seen_inputs: list[Any] = []
    handle = module.register_forward_hook(lambda _m, args, y: seen_inputs.append((args[0], y)))
    model(x)
    handle.remove()
    features, y = seen_inputs[0]
    router: Any = module.gate
    p = router.fc(features.mean((2, 3))).softmax(-1)
    expected = sum(w[:, None, None, None] * b for w, b in zip(p.unbind(1), module.all_branches(features), strict=True))
    torch.testing.assert_close(y, expected)


def test_training_teaches_routers_and_adds_its_terms() -> None:
    model, plan = adapted(fasternet())
    model.train()
    with record(model, 4) as seen:
        loss = model(images(4)).square().mean()
    assert set(seen.losses) == {"hinge", "balance"}
    assert len(seen.losses["hinge"]) == len(plan.entries)
    loss.backward()
    for module in model.modules():
        if isinstance(module, PartialBranches):
            router: Any = module.gate
            assert router.fc.bias.grad.abs().sum() > 0
            assert all(conv.weight.grad is not None for conv in module.convs)  # pyright: ignore
    model.eval()
    with record(model, 4) as seen, torch.no_grad():
        model(images(4))
    assert not seen.losses


def test_hinge_and_balance_by_hand() -> None:
    spec = GateSpec(dim=16, hidden=1, learner_macs=((1, 3, 12),), gate_macs=(0,), macs_total=16, min_choice=1)
    from acmize.methods.ada_pconv import AdaPConv

    made = AdaPConv((2, 4, 8), Router(spec, soft=True), ("a",), hinge=2.0, balance=3.0).train()
    router: Any = made.gate
    router.fc.bias.data = torch.tensor([0.0, 0.0, 1.0])
    with record(made, 5) as seen:
        made(torch.randn(5, 16, 4, 4))
    p = torch.tensor([0.0, 0.0, 1.0]).softmax(-1)
    assert seen.losses["hinge"][0].item() == pytest.approx(2 * (0.25 * p[0] + p[1] + 4 * p[2] - 1).item(), rel=1e-5)
    assert seen.losses["balance"][0].item() == pytest.approx(3 * (p - 1 / 3).square().sum().item(), rel=1e-5)


def test_routers_draw_their_own_distribution() -> None:
    spec = GateSpec(dim=4, hidden=1, learner_macs=((1, 3, 12),), gate_macs=(0,), macs_total=16, min_choice=1)
    router = Router(spec, soft=False).train()
    router.fc.bias.data = torch.tensor([0.5, 1.0, -0.5])
    decision = router(torch.randn(30_000, 4))
    share = torch.bincount(decision.choice.flatten(), minlength=4)[1:] / 30_000
    torch.testing.assert_close(share, router.fc.bias.detach().softmax(-1), rtol=0, atol=0.02)
    decision.keep.sum().backward()  # pyright: ignore
    assert router.fc.bias.grad is not None
    assert router.fc.bias.grad.abs().sum() > 0


def test_damage_gates_find_that_the_largest_branch_adds_nothing_yet() -> None:
    dense = fasternet()
    model, plan = adapted(dense, DAMAGE)
    data = collect_damage(
        model, dense, [images(24, seed=1)], choose=full_width, generator=torch.Generator().manual_seed(0)
    )
    for rows in data.values():
        assert rows.damage[..., 2].abs().max() == 0
        assert rows.damage[..., 1].min() > 0
    fit_damage_gates(data, steps=40)
    held = [images(24, seed=2)]
    calibration = calibrate(model, plan, held, (0.98, 0.95), tolerance=0.01)
    set_dial(model, calibration.dial(0.95))
    with record(model, 24) as seen, torch.no_grad():
        model.eval()(held[0])
    assert all(histogram[3] == 0 for histogram in seen.choices.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "half"}, "expected one of"), ({"mode": "soft", "gate": "damage"}, "soft mode runs every branch")],
)
def test_a_config_checks_itself(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaPConvConfig(**options)


def test_other_divisors_are_refused() -> None:
    with pytest.raises(AcmizeError, match="a quarter of 16 channels"):
        make_plan(fasternet(n_div=2), HARD, example=(images(1),))
