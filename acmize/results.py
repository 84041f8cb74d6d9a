"""What was measured of a model, as a dictionary that prints, shows and plots itself."""

from __future__ import annotations

import html
from typing import Any

from acmize.errors import AcmizeError


class Results(dict[str, Any]):
    """The measured table of a conversion, in the layout of `results.json`: `print(model.results)`.

    Notebooks show it as a table; `plot()` draws it. A dictionary in every other respect.
    """

    def __str__(self) -> str:
        return "\n".join(results_table(self)) if self.get("results") else "nothing measured"

    def _repr_markdown_(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [row for row in str(self).splitlines() if not row.startswith("|---")]
        lines = [_html_row(row, "td" if number else "th") for number, row in enumerate(rows)]
        return f"<table>{''.join(lines)}</table>"

    def plot(self, axes: Any = None) -> Any:
        """The metric against executed MACs, the dense model as a dashed line.

        Args:
            axes: of matplotlib; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            AcmizeError: nothing measured, or matplotlib is missing.
        """
        rows = self.get("results") or []
        metric, title = metric_of(self)
        if not rows or any(row.get(metric) is None for row in rows):
            raise AcmizeError(f"results: found no {title} to plot, expected some; evaluate on data with labels")
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise AcmizeError("plot: found no matplotlib, expected it; pip install matplotlib") from None
            axes = pyplot.subplots()[1]
        ordered = sorted(rows, key=lambda row: row["macs_ratio"])
        axes.plot([r["macs_ratio"] for r in ordered], [100 * r[metric] for r in ordered], "o-", label="adaptive")
        if self["dense"].get(metric) is not None:
            axes.axhline(100 * self["dense"][metric], linestyle="--", color="grey", label="dense")
        axes.set(xlabel="executed MACs, share of dense", ylabel=f"{title} %")
        axes.legend()
        return axes


def metric_of(results: dict[str, Any]) -> tuple[str, str]:
    """Key and title of what a model is judged by."""
    return ("wer", "WER") if "wer" in results.get("dense", {}) else ("accuracy", "accuracy")


def results_table(results: dict[str, Any]) -> list[str]:
    """Markdown rows of a results dictionary."""

    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}"

    dense = results["dense"]
    metric, title = metric_of(results)
    rows = [f"| budget | executed MACs | {title} % | agreement with dense % |", "|---|---|---|---|"]
    rows.append(f"| dense | 1.000 ({dense['macs'] / 1e9:.3f} G) | {percent(dense[metric])} | 100.0 |")
    rows += [
        f"| {r['budget']:g} | {r['macs_ratio']:.3f} | {percent(r[metric])} | {percent(r['agreement'])} |"
        for r in results["results"]
    ]
    return rows


def latency_table(found: dict[str, Any]) -> list[str]:
    """Markdown rows of what `latency.budget_for` measured."""
    where = f"{found['device']}, {found['threads']} threads, {found['dtype']}"
    rows = [f"Milliseconds of a batch of {found['batch_size']} ({where}); asked: {found['target_ms']:g}.", ""]
    rows += ["| budget | median | p95 |", "|---|---|---|"]
    for row in found["table"]:
        rows.append(f"| {row['budget']:.3f} | {row['latency_ms']['p50']:.2f} | {row['latency_ms']['p95']:.2f} |")
    return rows


def _html_row(row: str, tag: str) -> str:
    cells = (html.escape(cell.strip()) for cell in row.strip("|").split("|"))
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
