"""What recipes train beside `convert`, kept as safetensors: models from scratch and controls; and what LAG removes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import _common as common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize.checkpoint import load_tensors, read_json, save_tensors, write_json
from acmize.controls import gates_share, static_width
from acmize.gates import Choose, choosing
from acmize.phases._loop import History, fit
from acmize.phases.calibrate import Calibration, calibrate, set_budget
from acmize.phases.finetune import finetune
from acmize.recipe import Recipe
from acmize.recording import record
from acmize.removal import remove_dead_
from acmize.stages import mixing


def from_scratch_(
    path: Path, bench: common.Bench, recipe: Recipe, model: nn.Module, *, seed: int, augment: bool
) -> nn.Module:
    """Train a model in place with cross-entropy, AdamW 1e-3, cosine, and the terms its modules add.

    Args:
        path: safetensors of the trained model; taken from there if it exists.
        bench: its data.
        recipe: epochs, batch size, precision.
        model: random.
        seed: of the order of the images.
        augment: with the recipe's augmentation, or the images as they are.
    """
    if not path.exists():
        images = bench.images
        batches, steps = images.epochs(images.augmented if augment else images.fit, seed)

        def loss(batch: tuple[Tensor, Tensor], _step: int) -> dict[str, Tensor]:
            with record(model, len(batch[0])) as seen:
                task = F.cross_entropy(model(batch[0]), batch[1])
            terms = {key: torch.stack(parts).sum() for key, parts in seen.losses.items()}
            return {"loss": torch.stack([task, *terms.values()]).sum(), "task": task, **terms}

        history = fit(
            name=path.stem, model=model.train(), loss=loss, batches=batches, steps_per_epoch=steps,
            config=recipe.loop(epochs=recipe.train.epochs, lr=1e-3), checkpoint=path.parent / "steps", resume=True,
        )  # fmt: skip
        _keep(path, model, history)
    model.load_state_dict(load_tensors(path))
    return model.eval()


def control_(
    path: Path, bench: common.Bench, recipe: Recipe, model: Any, choose: Choose, calibration: Calibration
) -> Any:
    """Train a control in place with the losses, steps and images of phase 3.

    Args:
        path: safetensors of the trained model; taken from there if it exists.
        bench: data and teacher.
        recipe: of the method that it is a control of.
        model: converted.
        choose: the choices that it is trained with.
        calibration: tells `choose`, by the dial, what a step's budget is.
    """
    if not path.exists():
        train, images = recipe.train, bench.images
        batches, steps = images.epochs(images.augmented, recipe.seed + 1)
        loop = recipe.loop(epochs=train.epochs, lr=train.lr, weight_decay=train.weight_decay, warmup=train.warmup)
        with choosing(model, choose, probe=True):
            history = finetune(
                model, bench.model, model.plan, calibration, batches, steps_per_epoch=steps, losses=recipe.losses,
                config=loop, mix=mixing(recipe, bench.model), batch_norm=train.batch_norm,
                checkpoint=path.with_suffix(".work"), resume=True,
            )  # fmt: skip
        _keep(path, model, history)
    model.load_state_dict(load_tensors(path))
    return model.eval()


def _keep(path: Path, model: nn.Module, history: History) -> None:
    write_json(path.with_suffix(".json"), {"loss": [terms["loss"] for terms in history.logs]})
    save_tensors(path, model.state_dict())


def losses(path: Path) -> list[float]:
    """The loss at each log point of a model that was trained here."""
    return read_json(path.with_suffix(".json"))["loss"]


def static_(path: Path, bench: common.Bench, recipe: Recipe, model: Any) -> Any:
    """Static width, trained in place at the budgets of phase 3; see `control_`."""
    gates = gates_share(model, model.plan)

    @cache
    def at(budget: float) -> Choose:
        return static_width(model, model.plan, budget + gates)  # it runs no gates, so their MACs go to learners

    identity = Calibration(budgets=(1.0, 0.0), dials=(0.0, 1.0))  # the dial tells the step's budget
    return control_(path, bench, recipe, model, lambda gate, x: at(round(1 - gate.dial.item(), 2))(gate, x), identity)


def removed_rows(rows: common.Rows, name: str, bench: common.Bench, model: Any, budgets: tuple[float, ...]) -> None:
    """What is left when the learners that at most 1 % of samples run at the largest budget are cut off, in place."""
    before = sum(p.numel() for p in model.parameters())
    set_budget(model, model.plan, model.calibration, max(budgets))
    model.plan = remove_dead_(model, model.plan, bench.held)
    low, high = model.plan.budget_range
    reached = [b for b in budgets if low < b < high]
    model.calibration = calibrate(model, model.plan, bench.held, reached)
    sizes = {"parameters": sum(p.numel() for p in model.parameters()), "parameters_before": before}
    for budget in reached:
        rows.measure(f"{name} @ {budget:g}", lambda b=budget: {**bench.gated(model, b), **sizes})
