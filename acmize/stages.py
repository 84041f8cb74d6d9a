"""The stages of a conversion, in the order of docs/concepts.md.

    [sites that pay] -> learners from the weights -> [distill] -> gates -> [finetune] -> calibrate -> evaluate

Each takes the conversion as it stands (see `conversion.py`) and leaves it one stage further.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.batches import SeededMixup, mixup
from acmize.checkpoint import read_json, write_json
from acmize.compensate import compensate_
from acmize.conversion import LARGE, Conversion
from acmize.damage import collect_damage
from acmize.diagnose import check_gates, check_sites
from acmize.environment import environment, release_memory
from acmize.errors import AcmizeError
from acmize.evaluate import evaluate, mean_error, reference
from acmize.gates import full_width, set_dial
from acmize.hub import base_of, make_adaptive
from acmize.init import initialise_
from acmize.methods.token_merging import set_schedule
from acmize.phases.calibrate import Calibration, set_budget
from acmize.phases.distill import distill, distillable
from acmize.phases.finetune import drawn_budget, finetune
from acmize.phases.interpolate import interpolate_
from acmize.phases.pretrain_gates import collect_errors, fit_classification_gates, fit_damage_gates
from acmize.recipe import Recipe
from acmize.site_times import SiteTime, site_times

log = logging.getLogger("acmize")


def run_stages(job: Conversion, base: dict[str, Any] | None) -> Any:
    """All stages, those that are left to do.

    Args:
        job: what they work on.
        base: how to build the dense model again; None: as `base_of` says.

    Returns:
        The adaptive model, evaluated, set to the recipe's budget.
    """
    recipe = job.recipe
    if recipe.fit_batch is not None:
        _fit_device(job, recipe.fit_batch)
    job.stage("init", _init)
    if "distill" in recipe.phases:
        job.stage("distill", _distill)
    job.stage("gates", _gates)
    if "finetune" in recipe.phases:
        job.calibration = job.calibrated(_down_to(recipe.losses.budgets[0], 0.9, 0.6, 0.4), 0.02)
        job.stage("finetune", _finetune)
    budgets = sorted({*recipe.budgets, recipe.budget}, reverse=True)
    budgets = [b for b in budgets if b >= job.plan.budget_range[0]]
    ends = (1.0, round(job.plan.budget_range[0] + 0.01, 3))  # so that set_budget reaches every budget there is
    job.calibration = job.calibrated(budgets) + job.calibrated(ends, 0.02)
    results = _evaluate(job, job.calibration, budgets)
    made = make_adaptive(job.model, job.plan, job.calibration, base or base_of(job.dense), results, _described(job))
    made.set_budget(recipe.budget)
    return made.eval()


# --- sites that pay on this device ----------------------------------------------------------------------------


def _fit_device(job: Conversion, size: int) -> None:
    """Leave sites dense whose learners do not pay on this device; a resumed conversion keeps the plan it had.

    Where merging cannot reach the budget alone, those that lose the least time are kept all the same.
    """
    kept = None if job.work is None else job.work / "device.json"
    if kept is not None and kept.exists():
        names, size = (read_json(kept)[key] for key in ("names", "size"))
    else:
        inputs = max(job.images.batches(job.images.fit, size, size=size), key=len)
        size = len(inputs)  # fewer where there are no more, or where samples go one by one
        times = parallel.from_main(site_times(job.dense, job.plan, inputs, job.recipe.seed))
        for t in times:
            told = f"{t.dense_ms:.2f} ms dense, {t.adaptive_ms:.2f} ms at half of the learners"
            log.info("%d entries like %s: %s; %s", len(t.names), t.names[0], told, "kept" if t.pays else "left dense")
        names = _not_paying(job, times, size)
        if kept is not None and parallel.is_main():
            write_json(kept, {"names": names, "size": size})
    job.replan(names, f"does not pay on this device in batches of {size}")
    job.plan.check_budget(job.recipe.budget)


def _not_paying(job: Conversion, times: list[SiteTime], size: int) -> list[str]:
    """Entries to leave dense, by the times of their places."""
    losing = sorted((t for t in times if not t.pays), key=lambda t: t.adaptive_ms / t.dense_ms)
    merges = job.plan.merging is not None and job.plan.merging.fixed is None
    if not merges and len(losing) == len(times):
        raise AcmizeError(
            f"fit_batch: no site pays on this device in batches of {size}; try a larger batch, "
            "merge tokens (--merge budget), or leave it out"
        )
    while merges and losing and job.plan_without(_names(losing)).budget_range[0] > job.recipe.budget:
        least, *losing = losing
        log.info("%d entries like %s: needed to reach %g", len(least.names), least.names[0], job.recipe.budget)
    if len(losing) == len(times):
        log.info("no site pays in batches of %d: tokens are merged, and nothing else", size)
    return _names(losing)


def _names(times: list[SiteTime]) -> list[str]:
    return [name for t in times for name in t.names]


# --- learners -------------------------------------------------------------------------------------------------


def _init(job: Conversion) -> None:
    if not job.plan.exact or not job.plan.entries:
        return

    def batches() -> Iterator[Any]:
        return job.images.batches(job.images.fit, job.recipe.moments)

    initialise_(job.model, job.dense, job.plan, batches)


def _distill(job: Conversion) -> None:
    options = job.recipe.distill
    if not distillable(job.model):
        log.info("distill: nothing to learn locally: every module of this method keeps the dense weights")
        return
    batches, steps = job.images.epochs(job.images.augmented, job.recipe.seed)
    history = distill(
        job.model, job.source(), batches, steps_per_epoch=steps, tokens=options.tokens,
        config=job.recipe.loop(epochs=options.epochs, lr=options.lr), by_site=options.by_site, **job.checkpoint(),
    )  # fmt: skip
    job.note(history)
    failed = check_sites(history.last, job.recipe.max_error)
    job.findings += failed
    few = 2 * len(failed) <= len(distillable(job.model))  # when most fail, the training is at fault
    if failed and few and not job.given:
        _keep_dense(job, [finding.site for finding in failed])


def _keep_dense(job: Conversion, sites: list[str]) -> None:
    """Plan again without the sites that could not be distilled; what the others have learned is kept."""
    reason = f"distillation error above {job.recipe.max_error}"
    names = [e.fqn for e in job.plan.entries if e.target in sites]
    learned = {k: v for k, v in job.model.state_dict().items() if ".gate." not in k}
    job.replan(names, reason)
    _init(job)
    own = job.model.state_dict()
    kept = {k: v for k, v in learned.items() if k in own and v.shape == own[k].shape}
    job.model.load_state_dict({**own, **kept})
    if job.work is not None and parallel.is_main():
        write_json(job.work / "dense.json", {"names": names, "reason": reason})


# --- gates ----------------------------------------------------------------------------------------------------


def _gates(job: Conversion) -> None:
    options, seed = job.recipe.gates, job.recipe.seed
    generator = torch.Generator().manual_seed(seed)
    if options.labels == "none" or not job.plan.entries:
        return
    if options.labels == "threshold":
        batches = job.images.batches(job.images.fit, options.images)
        data = collect_errors(job.model, job.source(), batches, generator=generator)
        fit_classification_gates(
            data, tau=options.tau, steps=options.steps, lr=options.lr or 1e-2, seed=seed, **job.checkpoint()
        )
        return
    for number in range(options.rounds):
        calibration = job.calibrated(_down_to(options.budgets[0], 0.9, 0.7, 0.5), 0.03) if number else None
        if calibration is not None and options.compensate:
            _compensate(job, calibration)
        batches = job.images.batches(job.images.fit, options.images, size=job.small_batch)
        batches = _at_drawn_budgets(job, batches, calibration)
        data = collect_damage(
            job.model, job.dense, batches, choose=None if number else full_width, generator=generator,
            draws=options.draws, keep_tokens=options.keep_tokens, bf16=job.recipe.mixed_precision == "bf16",
            keep_bf16=job.plan.macs_dense > LARGE,
        )  # fmt: skip
        fit_damage_gates(
            data, steps=options.steps, lr=options.lr or 3e-3, seed=seed + number, fresh=number == 0,
            name=f"gates-{number + 1}", **job.checkpoint(),
        )  # fmt: skip
        del data  # gigabytes, for a large model: gone before the next round collects as much
        release_memory()


def _compensate(job: Conversion, calibration: Calibration) -> None:
    batches = job.images.batches(job.images.fit, job.recipe.moments, size=job.small_batch)
    compensate_(job.model, _at_drawn_budgets(job, batches, calibration))


def _at_drawn_budgets(job: Conversion, batches: Iterator[Tensor], calibration: Calibration | None) -> Iterator[Tensor]:
    """Set a budget drawn for each batch before it is run: what is merged, and the dial once it is calibrated."""
    low, high = job.recipe.gates.budgets
    low = max(low, job.plan.budget_range[0])
    for step, batch in enumerate(batches):
        budget = drawn_budget((low, max(low, high)), job.recipe.seed, step)
        set_schedule(job.model, job.plan.schedule(budget))
        set_dial(job.model, 0.0 if calibration is None else calibration.dial(budget))
        yield batch


def _down_to(low: float, *budgets: float) -> tuple[float, ...]:
    """Budgets to calibrate before a range of them is drawn from: these, and its end where they stop short of it."""
    return budgets if low > min(budgets) - 0.06 else (*budgets, low)


# --- finetuning -----------------------------------------------------------------------------------------------


def _finetune(job: Conversion) -> None:
    train, losses = job.recipe.train, job.recipe.losses
    batches, steps = job.images.epochs(job.images.augmented, job.recipe.seed + 1)
    loop = job.recipe.loop(
        epochs=train.epochs, lr=train.lr, weight_decay=train.weight_decay, warmup=train.warmup,
        ema_decay=train.ema_decay, accumulate=train.accumulate,
    )  # fmt: skip
    gates = {k: v for k, v in {"lr": train.gate_lr, "weight_decay": train.gate_decay}.items() if v is not None}
    assert job.calibration is not None
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    with job.images.training(job.model):
        history = finetune(
            job.model, job.dense, job.plan, job.calibration, batches, steps_per_epoch=steps, losses=losses,
            config=loop, task=job.images.task, mix=mixing(job.recipe, job.dense), gates=gates,
            batch_norm=train.batch_norm, shard=train.shard, **job.checkpoint(),
        )  # fmt: skip
    job.note(history)
    job.measured["finetune_loss"] = [round(terms["loss"], 4) for terms in history.logs]
    if train.interpolate:
        scores = interpolate_(job.model, before, _held_out_error(job))
        job.measured["interpolated"] = {f"{share:g}": value for share, value in scores.items()}


def mixing(recipe: Recipe, model: nn.Module) -> SeededMixup | None:
    """What mixes the images of phase 3, where the recipe asks for it; `losses.label_smoothing` alone smooths labels."""
    train = recipe.train
    if train.mixup == 0 and train.cutmix == 0:
        return None
    options = {"mixup_alpha": train.mixup, "cutmix_alpha": train.cutmix, "label_smoothing": 0.0, "seed": recipe.seed}
    return mixup(int(model.num_classes), **options)  # pyright: ignore[reportArgumentType]


def _held_out_error(job: Conversion) -> Callable[[], float]:
    """Mean error (KL, where no label was trained on) on the held-out images of the model as it then stands.

    At the largest, the middle and the smallest of the budgets that are wanted.
    """
    held = job.labelled(job.images.held)
    dense = reference(job.dense, held)
    wanted = sorted({job.recipe.budget, *job.recipe.budgets}, reverse=True)
    wanted = [wanted[i] for i in sorted({0, len(wanted) // 2, len(wanted) - 1})]

    def error() -> float:
        calibration = job.calibrated(wanted, 0.02)
        found = evaluate(job.model, job.plan, calibration, held, dense, calibration.budgets)
        return mean_error(found["results"], by_labels=job.recipe.losses.task > 0)

    return error


# --- results --------------------------------------------------------------------------------------------------


def _evaluate(job: Conversion, calibration: Calibration, budgets: Sequence[float]) -> dict[str, Any]:
    images = job.images
    batches = job.labelled(images.test if images.test is not None else images.held)
    dense = reference(job.dense, batches)
    results = evaluate(job.model, job.plan, calibration, batches, dense, budgets)
    set_budget(job.model, job.plan, calibration, job.recipe.budget)
    held = list(images.batches(images.held, 64))
    job.findings += check_gates(job.model, job.plan, held, results)
    results["split"] = "test" if images.test is not None else "held out of train"
    results["findings"] = [f.to_dict() for f in job.findings]
    results["left_out"] = sorted(images.unreadable.found.values())
    results["environment"] = environment(next(job.model.parameters()).device)
    return results


def _described(job: Conversion) -> dict[str, Any]:
    told = {"data": job.recipe.data or job.images.name, "seconds": job.seconds, "peak_gb": job.peaks}
    return {**job.recipe.to_dict(), **told, **job.measured}


__all__ = ["run_stages"]
