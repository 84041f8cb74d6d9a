"""Known ways in which a conversion fails, watched for and named with a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from acmize.controls import histograms
from acmize.inputs import Batch
from acmize.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that went wrong or soon will: `kind`, `site` (or "" for the model), `message` with the remedy."""

    kind: str
    site: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON types."""
        return asdict(self)


def check_sites(last: Mapping[str, float], max_error: float) -> list[Finding]:
    """Sites whose relative distillation error stayed above `max_error`: their mean output would do nearly as well."""
    found = []
    for key, error in last.items():
        if key.startswith("site/") and error > max_error:
            site = key.removeprefix("site/")
            text = f"{site}: distillation error {error:.2f}; train longer, or leave it dense with --exclude"
            found.append(Finding(kind="distillation", site=site, message=text))
    return found


def check_gates(model: nn.Module, plan: Plan, batches: Sequence[Batch], results: Mapping[str, Any]) -> list[Finding]:
    """Gate collapse, learners that never run, and budgets missed, with the gates as they are set."""
    found = [f for name, counts in histograms(model, batches).items() for f in _one_gate(name, counts)]
    collapsed = [f for f in found if f.kind == "collapse"]
    if len(collapsed) > len(plan.entries) // 2:
        text = (
            f"{len(collapsed)} of {len(plan.entries)} gates give every token the same choice: nothing adapts; raise "
            "losses.entropy, lower the learning rate, or fit the gates on more images"
        )
        found.append(Finding(kind="collapse", site="", message=text))
    for row in results.get("results", []):
        if row.get("missed"):
            found.append(Finding(kind="drift", site="", message=row["missed"]))
    return found


def _one_gate(name: str, counts: Tensor) -> list[Finding]:
    total = counts.sum().item()
    used = counts.nonzero().flatten()
    if len(used) == 1 and total > 1:
        choice = int(used[0])
        text = f"{name}: every token runs {choice} learners; the gate has collapsed (or the site is best left so)"
        return [Finding(kind="collapse", site=name, message=text)]
    top = int(used[-1])
    if top < len(counts) - 1:
        text = (
            f"{name}: learners {top + 1} to {len(counts) - 1} never run at this budget; they only matter at larger ones"
        )
        return [Finding(kind="idle", site=name, message=text)]
    return []
