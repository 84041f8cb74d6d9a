"""The page: what a saved model knows of itself and what a survey found, in one HTML file that needs nothing else.

The template, its style and its script lie beside this module. Everything that comes from a file or from data reaches
the page as one JSON block, which the script puts in place as text, never as markup.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from acmize.__about__ import __version__
from acmize.checkpoint import read_json, write_text
from acmize.hosts_speech import is_speech
from acmize.report.survey import survey
from acmize.report.survey_speech import survey_speech
from acmize.results import metric_of

LIMIT = 64  # images surveyed by default: half a minute for a DeiT-Tiny


def write_report(
    model: Any,
    path: str | Path,
    data: Any = None,
    *,
    folder: str | Path | None = None,
    dense: Any = None,
    budgets: list[float] | None = None,
    limit: int | None = LIMIT,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a page about an adaptive model; the model is left at the budget it had.

    Args:
        model: from `from_pretrained` or `convert`.
        path: of the HTML file; written whole or not at all.
        data: images or recordings to survey; without them the page has what was saved with the model.
        folder: where the model was saved: rivals measured by `acmize compare` are read from there.
        dense: the dense model, to set beside; without it the adaptive one at full width stands for it.
        budgets: stops of the slider; by default those the model was evaluated at and the middle between each two.
        limit: images or recordings surveyed at most.
        seed: of the choice of those.

    Returns:
        What the page was made of, as of `content`.

    Raises:
        AcmizeError: data that cannot be opened, a budget out of reach, a disk that refuses.
    """
    made = content(model, folder)
    if data is not None:
        before = model.budget
        stops = sorted(budgets) if budgets else _stops([row["budget"] for row in made["results"]])
        for budget in stops:
            model.plan.check_budget(budget)
        if is_speech(model):
            made["survey"] = survey_speech(model, data, stops, dense=dense, limit=limit)
        else:
            made["survey"] = survey(model, data, stops, dense=dense, limit=limit, seed=seed)
        if before is not None:
            model.set_budget(before)
    write_text(path, render(made))
    return made


def content(model: Any, folder: str | Path | None = None) -> dict[str, Any]:
    """What the saved model itself says: JSON values."""
    results, entries = model.results, model.plan.entries
    rivals = Path(folder) / "comparison.json" if folder is not None else None
    return {
        "name": model.base["architecture"],
        "acmize": __version__,
        "budget": model.budget,
        "macs_dense": model.plan.macs_dense,
        "metric": metric_of(results)[0],
        "dense": results.get("dense"),
        "results": sorted(results.get("results", []), key=lambda row: row["budget"]),
        "samples": results.get("samples"),
        "split": results.get("split"),
        "data": Path(str(model.recipe.get("data", "?"))).name,
        "comparison": read_json(rivals) if rivals is not None and rivals.is_file() else None,
        "latency": results.get("latency"),
        "sites": [
            {"name": e.fqn, "kind": e.kind, "learners": e.num_learners, "share": e.macs / model.plan.macs_dense, **cell}
            for e, cell in zip(entries, _cells([(e.kind, e.fqn) for e in entries]), strict=True)
        ],
        "refused": len(model.plan.refused),
        "findings": [f["message"] for f in results.get("findings", [])],
        "recipe": {k: v for k, v in model.recipe.items() if k != "data"},
        "environment": results.get("environment"),
        "survey": None,
    }


def render(made: dict[str, Any]) -> str:
    """The page as text."""
    template, style, script = (
        (files("acmize.report") / name).read_text("utf-8") for name in ("template.html", "style.css", "page.js")
    )
    # No "<" can end the block early, and no "&" be taken for a character reference: JSON knows both by number.
    blob = json.dumps(made, allow_nan=False, separators=(",", ":"))
    blob = blob.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    filled = {
        "title": html.escape(f"{made['name']}, adaptive"),
        "style": style,
        "script": script,
        "content": blob,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _stops(budgets: list[float]) -> list[float]:
    """Rising budgets and the middle between each two."""
    ordered = sorted(set(budgets)) or [0.5]
    middles = [round((a + b) / 2, 4) for a, b in pairwise(ordered)]
    return sorted({*ordered, *middles})


def _cells(names: list[tuple[str, str]]) -> list[dict[str, int]]:
    """A column for each (kind, path): the first number in the path where that tells the sites of a kind apart."""
    numbers = [re.search(r"\d+", path) for _, path in names]
    keys = [(kind, int(n[0]) if n else -1) for (kind, _), n in zip(names, numbers, strict=True)]
    if max(Counter(keys).values(), default=1) == 1:
        return [{"column": number} for _, number in keys]
    seen: Counter[str] = Counter()
    cells = []
    for kind, _ in names:
        cells.append({"column": seen[kind]})
        seen[kind] += 1
    return cells


__all__ = ["content", "render", "write_report"]
