"""What a saved folder says, checked before anything is built: none of it is trusted.

Every number has a limit, every name its type. What the files say of sizes is compared with the tensors that are really
there, on the meta device, before memory is taken for a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from acmize import hf_models
from acmize.checkpoint import read_json
from acmize.errors import AcmizeError
from acmize.models import SOURCES
from acmize.phases.calibrate import Calibration
from acmize.plan import Plan
from acmize.untrusted import check_sizes
from acmize.weights import Weights

SCHEMA = 1
MAX_BUFFERS = 256 << 20  # bytes that a model may take beside the tensors of its file
FOREIGN = {*SOURCES, "file", "url", "hf_hub_id", "custom_load", *hf_models.DROPPED}
FIGURES = ("macs", "macs_ratio", "macs_ratio_std", "chosen_ratio", "accuracy", "wer", "agreement", "kl", "seconds")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The JSON files of a folder, see `hub`.

    Attributes:
        base: how to build the dense model, see `hub.base_of`.
        plan: what to insert into it.
        calibration: budget -> position of the dial.
        budget: that it was left at, or None.
        results: measured table.
        recipe: resolved options of the conversion.
    """

    base: dict[str, Any]
    plan: Plan
    calibration: Calibration
    budget: float | None
    results: dict[str, Any]
    recipe: dict[str, Any]


def read_saved(folder: Path) -> Saved:
    """The JSON files of a folder.

    Raises:
        AcmizeError: a file is missing, damaged, of another schema or tampered with.
    """
    config, stored = read_json(folder / "config.json"), read_json(folder / "plan.json")
    if not isinstance(config, dict) or type(config.get("schema")) is not int or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else type(config).__name__
        raise AcmizeError(f"{folder}/config.json: found schema {str(found)[:80]!r}, expected {SCHEMA}; save it again")
    try:
        plan, calibration = Plan.from_dict(stored["plan"]), _calibration(stored["calibration"])
        if not 0 <= plan.budget_range[0] <= plan.budget_range[1] < math.inf:
            raise ValueError(f"plan.json: budgets {plan.budget_range}")
        base, budget = _base(config["base"]), config.get("budget")
        if type(budget) not in (int, float, type(None)):
            raise TypeError(f"config.json: budget {budget!r}")
        results, recipe = (_optional(folder / name) for name in ("results.json", "recipe.json"))
        _check_results(results)
        _check_recipe(recipe)
    except AcmizeError as error:
        raise error if str(error).startswith(str(folder)) else AcmizeError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = repr(error)[:400]
        raise AcmizeError(f"{folder}: damaged or tampered ({why}); restore the file or convert again") from None
    return Saved(base=base, plan=plan, calibration=calibration, budget=budget, results=results, recipe=recipe)


def _calibration(d: dict[str, Any]) -> Calibration:
    made = Calibration(dials=tuple(map(float, d["dials"])), budgets=tuple(map(float, d["budgets"])))
    if not all(0 <= x <= 1 for x in made.dials) or not all(0 <= b < 100 for b in made.budgets):
        raise ValueError(f"calibration: dials {made.dials[:8]} or budgets {made.budgets[:8]} out of range")
    return made


def _base(d: Any) -> dict[str, Any]:
    """The base of a config.json; nothing in it may say where weights come from, since it could name a pickle."""
    base = dict(d)
    if not isinstance(base["architecture"], str) or not isinstance(base["library"], str):
        raise TypeError("config.json: architecture and library must be text")
    if not isinstance(base["kwargs"], dict) or not isinstance(base["pretrained_cfg"], dict):
        raise TypeError("config.json: kwargs and pretrained_cfg must be objects")
    foreign = sorted(FOREIGN & {*base["kwargs"], *base["pretrained_cfg"]})
    if foreign:
        raise ValueError(f"config.json: {foreign[0]} is not allowed there")
    check_sizes(base, "config.json")
    return base


def _optional(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise AcmizeError(f"{path}: found {type(found).__name__}, expected an object; restore or remove the file")
    return found


def _check_results(results: dict[str, Any]) -> None:
    """Whatever the card, the report and the commands read of a results.json."""
    rows = results.get("results", [])
    if not isinstance(rows, list):
        raise TypeError("results.json: results must be a list")
    if rows:
        metric = "wer" if "wer" in results["dense"] else "accuracy"
        _figures(results["dense"], "macs", metric)
        for row in rows:
            _figures(row, "budget", "macs_ratio", metric, "agreement")
            if not isinstance(row["budget"], int | float) or not 0 < row["budget"] <= 1:
                raise ValueError(f"results.json: found a budget of {row['budget']!r}, expected one in (0, 1]")
    for name in ("dense", "environment", "latency"):
        if not isinstance(results.get(name, {}), dict):
            raise TypeError(f"results.json: {name} must be an object")
    for finding in results.get("findings", []):
        if not all(isinstance(finding[name], str) for name in ("kind", "site", "message")):
            raise TypeError("results.json: findings must be text")
    if "latency" in results:
        latency = results["latency"]
        _figures(latency, "batch_size", "target_ms", "threads")
        _ = latency["device"], latency["dtype"]
        for row in latency["table"]:
            _figures(row, "budget")
            _figures(row["latency_ms"], "p50", "p95")


def _figures(row: Any, *needed: str) -> None:
    """Refuses a row without these figures, or in which one of `FIGURES` is no number."""
    for name in (*needed, *(name for name in FIGURES if name in row)):
        if not isinstance(row[name], int | float | None) or isinstance(row[name], bool):
            raise TypeError(f"results.json: {name}: found {str(row[name])[:40]!r}, expected a number")


def _check_recipe(recipe: dict[str, Any]) -> None:
    phases, data = recipe.get("phases", []), recipe.get("data")
    if not isinstance(phases, list) or not all(isinstance(phase, str) for phase in phases):
        raise TypeError("recipe.json: phases must be a list of names")
    if not isinstance(data, str | None) or len(data or "") > 1000 or "\0" in (data or ""):
        raise TypeError("recipe.json: data must be a path or a name")


# --- weights --------------------------------------------------------------------------------------------------


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Compare names and shapes of a model, perhaps on the meta device, with those of its files.

    Raises:
        AcmizeError: they differ, or the model would take much more memory than its files.
    """
    path, found = weights.path, weights.shapes
    try:
        state = model.state_dict()
    except RecursionError:
        raise AcmizeError(f"{path}: plan.json puts a module into itself; restore the file or convert again") from None
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [k for k in expected if k in found and found[k] != expected[k]]
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if wrong or missing or extra:
        what = wrong or missing or extra
        raise AcmizeError(
            f"{path}: does not fit plan.json ({len(wrong)} shapes, {len(missing)} missing, {len(extra)} extra; "
            f"first: {what[0]}); restore the file or convert again"
        )
    beside = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in expected)
    if beside > MAX_BUFFERS:
        raise AcmizeError(
            f"{path.parent}/config.json: the model would take {beside >> 20} MB beside its weights, expected "
            f"{MAX_BUFFERS >> 20} at most; restore the file"
        )


def load_state(model: nn.Module, weights: Weights) -> nn.Module:
    """Put tensors back, one after another; the model itself is returned.

    Raises:
        AcmizeError: names or shapes differ, a file is damaged, or holds anything but real numbers for real weights.
    """
    check_weights(model, weights)
    tensors = weights.tensors()
    for name, value in model.state_dict().items():
        given = tensors[name]
        if value.is_floating_point() != given.is_floating_point() or given.is_complex():
            kind = "floats" if value.is_floating_point() else "whole numbers"
            raise AcmizeError(f"{weights.path}: {name} holds {given.dtype}, expected {kind}; restore the file")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # a file that was changed meanwhile
        raise AcmizeError(f"{weights.path}: cannot be read ({str(error)[:300]}); restore the file") from None
    return model


__all__ = ["SCHEMA", "Saved", "check_weights", "load_state", "read_saved"]
