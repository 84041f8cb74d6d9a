"""`acmize reproduce`: whether the numbers published with a model hold here, evaluated or converted once more.

A saved model carries its results, the recipe that led to them and the environment they were measured in. The same
samples are chosen again (split, limit and seed of the recipe) and the same budgets evaluated.

The same machine with the same versions gives the same figures; another one may round another way, which can move a
token to another choice and a sample to another answer. Hence a tolerance, in the unit of the figure (a share).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmize.api import answers_of, convert, dense_from, evaluate_saved
from acmize.environment import differences, environment
from acmize.errors import AcmizeError
from acmize.evaluate import evaluate
from acmize.images import Images
from acmize.models import load_model
from acmize.recipe import Recipe

EVALUATED, CONVERTED = 0.005, 0.02  # default tolerances: half a point, and two where the training is repeated


def reproduce_saved(
    model: Any,
    data: Any = None,
    *,
    weights: str | Path | None = None,
    train: bool = False,
    output: str | Path | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Measure a saved model once more and set the figures beside the published ones; the model is left at a budget.

    Args:
        model: from `from_pretrained`.
        data: what the recipe names, where it lies elsewhere here.
        weights: safetensors file of the dense model. Without it, full width stands for the dense model, which is the
            same until the model has been trained.
        train: convert the dense model again by the recipe, and judge the results of that.
        output: new folder for that conversion.
        tolerance: largest difference of a share that counts as the same.

    Returns:
        {"ok", "rows", "environment", "notes"}. A row has budget (None: dense), figure, published, found, and holds:
        None where it could not be checked. environment: what differs from the published one.

    Raises:
        AcmizeError: a model without results or recipe, or data or weights that cannot be opened.
    """
    published, recipe = model.results, recipe_of(model)
    if not published.get("results"):
        raise AcmizeError("results.json: found no results, expected those to reproduce; evaluate the model instead")
    data = _data(recipe, data)
    limit = tolerance if tolerance is not None else CONVERTED if train else EVALUATED
    notes = []
    if train:
        again = _converted(model, data, recipe, weights, output)
        same = _same_weights(model, again)
        notes.append("the new weights are bit for bit the published ones" if same else "the new weights differ")
        found, known = again.results, True
    else:
        dense = dense_from(model, weights)
        found, known = _evaluated(model, data, recipe, dense), dense is not None or untrained(model)
        if not known:
            notes.append("agreement and the dense figures are not checked: the model was trained; give --weights FILE")
    rows = _rows(published, found, limit, known)
    if "environment" not in published:
        notes.append("the model does not say in which environment it was measured")
    if published.get("samples") != found.get("samples"):
        notes.append(f"published on {published.get('samples')} samples, found {found.get('samples')}: other data?")
    here = environment(next(model.parameters()).device)
    return {
        "ok": all(row["holds"] is not False for row in rows) and published.get("samples") == found.get("samples"),
        "rows": rows,
        "tolerance": limit,
        "environment": differences(published["environment"], here) if "environment" in published else [],
        "notes": notes,
    }


def recipe_of(model: Any) -> Recipe:
    """The recipe that a model was made by.

    Raises:
        AcmizeError: the model has none.
    """
    known = {field.name for field in dataclasses.fields(Recipe)}
    stored = {key: value for key, value in model.recipe.items() if key in known}
    if not stored:
        raise AcmizeError("recipe.json: found no recipe, expected the options of the conversion; nothing to repeat")
    return Recipe.from_dict(stored)


def untrained(model: Any) -> bool:
    """Whether full width still is the dense model: learners from its weights, and no phase that trains them."""
    return model.plan.exact and not {"distill", "finetune"} & set(model.recipe.get("phases", ()))


def _data(recipe: Recipe, data: Any) -> Any:
    if data is not None:
        return data
    if not recipe.data or recipe.data == "given in Python":
        raise AcmizeError("data: the recipe names none, expected those the model was measured on; give --data DATA")
    return recipe.data


def _evaluated(model: Any, data: Any, recipe: Recipe, dense: nn.Module | None) -> dict[str, Any]:
    """The published budgets on the published samples."""
    budgets = [row["budget"] for row in model.results["results"]]
    if model.results.get("split", "test") == "test":
        return evaluate_saved(
            model, data, budgets, dense=dense, limit=recipe.limit, seed=recipe.seed, batch_size=recipe.batch_size
        )
    images = Images(data, model, recipe)
    batches = images.labelled(images.held)
    return evaluate(model, model.plan, model.calibration, batches, answers_of(model, dense, batches), budgets)


def _converted(model: Any, data: Any, recipe: Recipe, weights: str | Path | None, output: str | Path | None) -> Any:
    """The conversion once more, from the dense weights."""
    if output is None:
        raise AcmizeError("--train: found no folder for the new model, expected one; give -o OUT")
    base = model.base
    if base["library"] == "module":
        raise AcmizeError(f"--train: {base['architecture']} cannot be built by name; convert it in Python")
    dense = dense_from(model, weights) or load_model(base["architecture"], **base["kwargs"])
    work = Path(output).absolute().with_name(Path(output).absolute().name + ".work")
    return convert(dense, data=data, recipe=recipe, base=base, work=work, output=output)


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name].cpu(), two[name].cpu()) for name in one)


def _rows(published: dict[str, Any], found: dict[str, Any], limit: float, known: bool) -> list[dict[str, Any]]:
    metric = "wer" if "wer" in published["dense"] else "accuracy"
    rows = [_row(None, metric, published["dense"], found["dense"], limit, known)]
    again = {row["budget"]: row for row in found["results"]}
    for row in published["results"]:
        mine = again.get(row["budget"], {})
        rows.append(_row(row["budget"], "macs_ratio", row, mine, limit, True))
        rows.append(_row(row["budget"], metric, row, mine, limit, True))
        rows.append(_row(row["budget"], "agreement", row, mine, limit, known))
    return rows


def _row(
    budget: float | None, figure: str, published: dict[str, Any], found: dict[str, Any], limit: float, known: bool
) -> dict[str, Any]:
    before, now = published.get(figure), found.get(figure)
    row = {"budget": budget, "figure": figure, "published": before, "found": now, "holds": None}
    if before is None and now is None:
        return row  # no labels
    if before is None or now is None:
        return {**row, "holds": False}
    return {**row, "holds": abs(before - now) <= limit + 1e-9} if known else row


__all__ = ["recipe_of", "reproduce_saved", "untrained"]
