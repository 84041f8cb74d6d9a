"""Any budget by one dial: brackets meet it, the table interpolates, the floor is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import adapted, images, vit
from torch import nn

from acmize import AcmizeError, Plan
from acmize.damage import collect_damage
from acmize.gates import full_width, gates_of
from acmize.phases import pretrain_gates
from acmize.phases.calibrate import Calibration, calibrate, missed, realised, set_budget
from acmize.phases.pretrain_gates import fit_damage_gates


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    dense = vit(depth=3)
    model, plan = adapted(dense)
    data = collect_damage(
        model, dense, [images(16, seed=7)], choose=full_width, generator=torch.Generator().manual_seed(0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_gates, "FEW", 0)  # gates that tell tokens apart: others cut all of them at once
        fit_damage_gates(data, steps=60, batch_tokens=256)
    return model, plan


def test_asked_budgets_are_met(fitted: tuple[Any, Plan]) -> None:
    model, plan = fitted
    budgets = (0.9, 0.75, 0.6, 0.5, 0.4)
    held_out = [images(32, seed=9)]
    calibration = calibrate(model, plan, held_out, budgets)
    assert calibration.budgets == budgets
    assert list(calibration.dials) == sorted(calibration.dials)
    for budget in budgets:
        set_budget(model, plan, calibration, budget)
        assert realised(model, plan, held_out).mean().item() == pytest.approx(budget, abs=0.0026)
        assert len({float(g.price) for g in gates_of(model)}) == 1  # one price for every site


def test_budgets_between_are_interpolated(fitted: tuple[Any, Plan]) -> None:
    model, plan = fitted
    batches = [images(32, seed=9)]
    calibration = calibrate(model, plan, batches, (0.9, 0.8, 0.7, 0.6, 0.5))
    spent = []
    for budget in (0.85, 0.75, 0.65, 0.55):
        set_budget(model, plan, calibration, budget)
        spent.append(realised(model, plan, batches).mean().item())
        assert spent[-1] == pytest.approx(budget, abs=0.03)
    assert spent == sorted(spent, reverse=True)


def test_realised_is_a_sample_each(fitted: tuple[Any, Plan]) -> None:
    model, plan = fitted
    set_budget(model, plan, Calibration(budgets=(1.0, 0.1), dials=(0.0, 1.0)), 0.5)
    x = images(5, seed=3)
    together = realised(model, plan, [x[:2], x[2:]])
    assert together.shape == (5,)
    torch.testing.assert_close(together, torch.cat([realised(model, plan, [x[i : i + 1]]) for i in range(5)]))
    assert (together <= plan.budget_range[1]).all()
    assert (together >= plan.budget_range[0] - 1e-9).all()


def test_below_the_floor(fitted: tuple[Any, Plan]) -> None:
    model, plan = fitted
    low = plan.budget_range[0]
    with pytest.raises(AcmizeError, match=rf"cannot go below {low:.3f}"):
        calibrate(model, plan, [images()], (0.9, low / 2))
    with pytest.raises(AcmizeError, match="cannot go below"):
        set_budget(model, plan, Calibration(budgets=(0.9,), dials=(0.5,)), low / 2)


def test_the_table() -> None:
    table = Calibration(budgets=(0.9, 0.5), dials=(0.2, 0.6))
    assert table.dial(0.9) == 0.2
    assert table.dial(0.5) == 0.6
    assert table.dial(0.7) == pytest.approx(0.4)
    assert table.dial(1.0) == 0.2
    assert table.dial(0.1) == 0.6
    assert table.to_dict() == {"budgets": [0.9, 0.5], "dials": [0.2, 0.6]}
    with pytest.raises(ValueError, match="budgets must fall"):
        Calibration(budgets=(0.5, 0.9), dials=(0.2, 0.6))
    with pytest.raises(ValueError, match="found 1 dials and 2 budgets"):
        Calibration(budgets=(0.9, 0.5), dials=(0.2,))
    with pytest.raises(ValueError, match="found 0 dials"):
        Calibration(budgets=(), dials=())


def test_a_missed_budget_is_said() -> None:
    assert missed(0.5, 0.509) is None
    said = missed(0.5, 0.52)
    assert said is not None
    assert "realised 0.520" in said
