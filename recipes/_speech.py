"""What the recipes for speech share: one adaptive model beside its controls at equal MACs, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _common import Row, Rows, converted, percent

from acmize.audio import open_audio
from acmize.controls import gates_share, static_width, workload
from acmize.evaluate import evaluate_at, reference
from acmize.gates import full_width
from acmize.recipe import Recipe
from acmize.speech import Listener, Spoken

COLUMNS: dict[str, Callable[[str, Row], str]] = {
    "method": lambda key, _: key.split(" @ ")[0],
    "budget": lambda _, r: "-" if r.get("budget") is None else f"{r['budget']:g}",
    "MACs": lambda _, r: f"{r['macs_ratio']:.3f}",
    "WER %": lambda _, r: percent(r["wer"]),
    "agreement %": lambda _, r: percent(r["agreement"]),
    "KL": lambda _, r: f"{r['kl']:.4f}",
    "silent : speech": lambda _, r: f"{r['choice_silent'] / r['choice_speech']:.2f}" if r.get("choice_silent") else "-",
}


class SpeechBench:
    """The test recordings of a recipe, the dense model's answers on them, and rows of adaptive models.

    Args:
        rows: of the recipe.
        dense: the dense model.
        data: as `acmize.convert` takes it.
        limit: recordings at most.
        size: recordings in a batch.
    """

    def __init__(self, rows: Rows, dense: Any, data: str, limit: int | None, size: int = 1) -> None:
        self.rows, self.dense, self.data = rows, dense, data
        splits = open_audio(data, limit=limit)
        test = splits.audio(splits.split("test"), "test", dense.processor.rate)
        self.test = Spoken(test, Listener(dense), size)
        self.answers = reference(dense, self.test)
        full = {"macs_ratio": 1.0, "agreement": 1.0, "kl": 0.0}
        rows.measure("dense", lambda: {**full, **self.answers.described})

    def adaptive(self, name: str, folder: Path, recipe: Recipe, budgets: Sequence[float], *, controls: bool) -> None:
        """Rows of the adaptive model kept in `folder` (converted where there is none), with its controls if wanted.

        Controls: "static" runs one share of the learners everywhere, with the same merging; "merging" runs all of
        them, so that where merging is to save the whole budget nothing else does. Neither pays for gates.
        """
        model = converted(folder, self.dense, self.data, recipe)
        for budget in (b for b in budgets if b >= model.plan.budget_range[0]):
            model.set_budget(budget)
            self.rows.measure(f"{name} @ {budget}", lambda b=budget: self._row(model, b))
            if controls:
                work = workload(model, model.plan, (inputs for inputs, _ in self.test))
                spare = gates_share(model, model.plan, work)
                static = static_width(model, model.plan, budget + spare, work)
                self.rows.measure(f"static @ {budget}", lambda b=budget, s=static, g=spare: self._row(model, b, g, s))
                self.rows.measure(f"merging @ {budget}", lambda b=budget, g=spare: self._row(model, b, g, full_width))

    def _row(self, model: Any, budget: float, spare: float = 0.0, choose: Any = None) -> Row:
        found = evaluate_at(model, model.plan, self.test, self.answers, choose)
        found["macs_ratio"] -= spare
        return {"budget": budget, **{k: v for k, v in found.items() if k != "sites"}}
