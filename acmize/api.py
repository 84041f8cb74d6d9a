"""`convert`: from a pretrained model to an adaptive one; `evaluate_saved`: what a saved one reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from acmize import parallel
from acmize.audio import open_audio
from acmize.checkpoint import remove_dir
from acmize.conversion import Conversion, planned
from acmize.errors import AcmizeError
from acmize.evaluate import evaluate, reference
from acmize.gates import choosing, full_width
from acmize.hf_models import processor_of
from acmize.hosts_speech import is_speech
from acmize.hub import save_pretrained
from acmize.images import Batches, Images, images_to_test
from acmize.methods.token_merging import set_schedule
from acmize.models import load_model
from acmize.plan import Plan
from acmize.recipe import Recipe, resolve
from acmize.speech import Listener, Speech, Spoken
from acmize.stages import run_stages


def convert(
    model: nn.Module,
    *,
    data: Any,
    budget: float | None = None,
    recipe: Recipe | None = None,
    base: dict[str, Any] | None = None,
    plan: Plan | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    output: str | Path | None = None,
    **options: Any,
) -> Any:
    """Make a pretrained model adaptive.

    Args:
        model: a dense model; left as it is.
        data: anything `datasets.load_dataset` opens: a folder of images, a Hub data set, a `DatasetDict`. Labels are
            optional.
        budget: share of the dense MACs the model is left at; `model.set_budget` changes it later.
        recipe: every option; or give some of them as keywords (`phases=()`, `seed=1`, `acm={"num_learners": 4}`,
            `method="cosine-gate"`).
        base: how to build the dense model again, from `base_of(model, kwargs)`.
        plan: from `make_plan`, for sites of a module of one's own; it stays as it is.
        work: folder for checkpoints; kept on failure, removed on success.
        resume: go on from the checkpoints in `work`.
        output: folder to save the result in, before `work` is removed.
        options: fields of a `Recipe`, in place of `recipe`.

    Returns:
        A converted copy with `set_budget`, `save_pretrained`, `push_to_hub`, and its measured `results`.

    Raises:
        AcmizeError: anything the caller can mend.
    """
    if recipe is None:
        recipe = resolve(options)
    elif options:
        raise TypeError(f"give a recipe or options, not both: found {sorted(options)}")
    parallel.join(next(model.parameters()).device)
    if budget is not None:
        recipe = Recipe(**{**{f: getattr(recipe, f) for f in recipe.__dataclass_fields__}, "budget": budget})
    given = plan is not None
    if given and recipe.fit_batch is not None:
        raise AcmizeError(
            "fit_batch: found a plan beside it, expected none, since what does not pay is planned again; leave one out"
        )
    speech = Speech(data, model, recipe) if is_speech(model) else None
    plan = plan or planned(model, recipe, speech and speech.example)
    plan.check_budget(recipe.budget)
    samples = speech or Images(data, model, recipe)
    made = run_stages(Conversion(model, plan, recipe, samples, work, resume, given=given), base)
    if is_speech(model):
        made.processor = processor_of(model)
    if parallel.is_main():
        if output is not None:
            save_pretrained(made, output)
        if work is not None:
            remove_dir(Path(work))
    parallel.wait()
    return made


def evaluate_saved(
    model: Any,
    data: Any,
    budgets: Sequence[float] | None = None,
    *,
    weights: str | Path | None = None,
    dense: nn.Module | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Evaluate a loaded adaptive model on the test split of `data` (its train split where there is none).

    Args:
        model: from `from_pretrained`.
        data: anything `datasets.load_dataset` opens.
        budgets: to evaluate; by default those it was saved with.
        weights: safetensors file (folder, for transformers) of the dense model; without it the converted model at full
            width stands for it.
        dense: the dense model itself, in place of its weights.
        limit: samples at most.
        seed: of the choice of those.
        batch_size: images in a batch.
    """
    if dense is None:
        dense = dense_from(model, weights)
    parallel.join(next(model.parameters()).device)
    if is_speech(model):
        return _evaluate_saved_speech(model, data, budgets, dense, limit)
    images, which, _ = images_to_test(data, model, limit=limit, seed=seed)
    batches = Batches(parallel.subset(images), batch_size, next(model.parameters()).device)
    answers = answers_of(model, dense, batches)
    saved = [row["budget"] for row in model.results.get("results", [])]
    results = evaluate(model, model.plan, model.calibration, batches, answers, budgets or saved or (0.5,))
    return {**results, "split": which, "dense_is": "base weights" if dense is not None else "full width"}


def dense_from(model: Any, weights: str | Path | None) -> nn.Module | None:
    """The dense model of an adaptive one from a safetensors file (a folder, for transformers); None without one."""
    if weights is None:
        return None
    if model.base["library"] == "transformers":
        return load_model(str(weights))
    return load_model(model.base["architecture"], weights, **model.base["kwargs"])


def answers_of(model: Any, dense: nn.Module | None, batches: Batches | Spoken) -> Any:
    """The dense model's answers, or those of the adaptive one at full width in its place."""
    if dense is not None:
        return reference(dense, batches)
    set_schedule(model, ())
    with choosing(model, full_width):
        return reference(model, batches)


def _evaluate_saved_speech(
    model: Any, data: Any, budgets: Sequence[float] | None, dense: Any, limit: int | None
) -> dict[str, Any]:
    splits = open_audio(data, limit=limit)
    which = "test" if splits.test is not None else "train"
    teacher = model if dense is None else dense
    listener = Listener(teacher)
    batches = Spoken(parallel.subset(splits.audio(splits.split(which), which, listener.processor.rate)), listener)
    answers = answers_of(model, dense, batches)
    saved = [row["budget"] for row in model.results.get("results", [])]
    results = evaluate(model, model.plan, model.calibration, batches, answers, budgets or saved or (0.5,))
    return {**results, "split": which, "dense_is": "full width" if dense is None else "base weights"}


__all__ = ["convert", "evaluate_saved"]
