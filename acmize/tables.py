"""What the commands print for people: a plan, results, times, checks and comparisons as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from acmize.console import err, out

PROJECTIONS = ("q", "k", "v", "out", "linear")


def table_of(*columns: str) -> Table:
    """Columns of numbers, the first one of names."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def percent(x: float | None) -> str:
    """A share as per cent with one decimal, or a dash."""
    return "-" if x is None else f"{100 * x:.1f}"


def print_plan(name: str, made: Any) -> None:
    """The plan as a table: one row for each site, then what stays dense, then the totals."""
    table = Table(title=f"{name}: {len(made.entries)} sites", box=None, pad_edge=False)
    for column in ("site", "kind", "form", "learners", "width", "MMACs", "% of model", "gate %"):
        table.add_column(column, justify="left" if column in ("site", "kind", "form") else "right")
    for e in made.entries:
        share, gate = 100 * e.macs / made.macs_dense, 100 * e.gate_macs * e.tokens / e.macs
        width = f"{e.heads} x {e.bounds[-1]}" if e.heads > 1 else str(e.bounds[-1])
        table.add_row(
            e.fqn, e.kind, e.form, str(e.num_learners), width, f"{e.macs / 1e6:.2f}", f"{share:.2f}", f"{gate:.1f}"
        )
    out.print(table)
    if made.refused:
        stays = Table(title="stays dense", box=None, pad_edge=False)
        stays.add_column("module")
        stays.add_column("reason")
        for r in made.refused:
            stays.add_row(r.fqn, r.reason)
        out.print(stays)
    small = [e.fqn for e in made.entries if e.gate_macs >= 0.25 * sum(e.learner_macs)]
    if small:
        names = ", ".join(small[:4]) + (f" and {len(small) - 4} more" if len(small) > 4 else "")
        out.print(f"small: the gate costs a quarter of the site or more, so it hardly pays at {names}", highlight=False)
    kinds: dict[str, int] = {}
    for e in made.entries:
        name = "MLPs" if e.kind == "mlp" else "projections" if e.kind in PROJECTIONS else f"{e.kind}s"
        kinds[name] = kinds.get(name, 0) + 1
    gates = sum(e.gate_macs * e.tokens for e in made.entries)
    low, high = made.budget_range
    told = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
    out.print(told or "no site: tokens are merged, and nothing else", highlight=False)
    part = made.scope or "whole model"
    out.print(f"{part} {made.macs_dense / 1e9:.3f} GMACs ({2 * made.macs_dense / 1e9:.3f} GFLOPs)")
    out.print(f"gates {gates / 1e6:.1f} MMACs ({100 * gates / made.macs_dense:.1f} %); budgets {low:.3f} to {high:.3f}")


def print_results(results: dict[str, Any], latency: bool = False) -> None:
    """Budget, realised MACs, accuracy, agreement with dense and spread over samples; findings below."""
    table = Table(box=None, pad_edge=False)
    dense = results["dense"]
    metric = "wer" if "wer" in dense else "accuracy"
    columns = ["budget", "MACs ratio", "+- sample", "WER %" if metric == "wer" else "top-1 %", "agreement %"] + (
        ["ms/image", "speedup"] if latency else []
    )
    for column in columns:
        table.add_column(column, justify="right")
    row = ["dense", "1.000", "-", percent(dense[metric]), "100.0"]
    table.add_row(*row, *([f"{dense['latency_ms']:.2f}", "1.00"] if latency else []))
    for r in results["results"]:
        row = [f"{r['budget']:g}", f"{r['macs_ratio']:.3f}", f"{r['macs_ratio_std']:.3f}"]
        row += [percent(r[metric]), percent(r["agreement"])]
        if latency:
            row += [f"{r['latency_ms']:.2f}", f"{dense['latency_ms'] / r['latency_ms']:.2f}"]
        table.add_row(*row)
    out.print(table)
    out.print(
        f"{results['samples']} {results.get('split', 'test')} samples; dense {dense['macs'] / 1e9:.3f} GMACs a sample"
    )
    findings = results.get("findings", [])
    same = sum(f["kind"] == "collapse" and f["site"] != "" for f in findings)
    if same:
        out.print(f"{same} sites give every token the same choice at this budget; results.json names them")
    for finding in findings:
        if finding["kind"] == "distillation" or not finding["site"]:
            out.print(f"! {finding['message']}", highlight=False)


def print_bench(found: dict[str, Any]) -> None:
    """Milliseconds of models and of primitives, each beside the dense ones."""
    if "work" in found:
        _print_heard(found)
    elif found.get("results"):
        table = table_of(
            "batch", "budget", "MACs ratio", "p50 ms", "p5", "p95", "p99", "speedup", "images/s", "peak MB"
        )
        for size in dict.fromkeys(r["batch_size"] for r in found["results"]):
            rows = [r for r in found["results"] if r["batch_size"] == size]
            dense = rows[0]["dense_latency_ms"]
            cells = [*_milliseconds(dense), "1.00", f"{1e3 * size / dense['p50']:.1f}"]
            cells.append(f"{rows[0]['dense_peak_memory_mb']:.1f}")
            table.add_row(str(size), f"dense, {dense['form']}", "1.000", *cells)
            for form, median in rows[0]["dense_forms_ms"].items():
                if form != dense["form"]:
                    cells = [f"{median:.2f}", "-", "-", "-", f"{dense['p50'] / median:.2f}", "-", "-"]
                    table.add_row(str(size), f"dense, {form}", "1.000", *cells)
            for r in rows:
                cells = [*_milliseconds(r["latency_ms"]), f"{r['speedup']:.2f}"]
                cells += [f"{r['throughput']:.1f}", f"{r['peak_memory_mb']:.1f}"]
                form = min(r["forms_ms"], key=r["forms_ms"].get)
                name = f"{r['budget']:g}" + ("" if form == "eager" else f", {form}")
                table.add_row(str(size), name, f"{r['macs_ratio']:.3f}", *cells)
        out.print(table)
        for fit in found["fit"]:
            line = f"{fit['intercept']:.2f} + {fit['slope']:.2f} x MACs ratio"
            out.print(f"batch of {fit['batch_size']}: milliseconds = {line}, r2 {fit['r2']:.3f}", highlight=False)
    if found.get("ops"):
        table = table_of("primitive", "tokens", "learners", "MACs", "ms", "dense ms", "form", "efficiency", "linear")
        for r in found["ops"]:
            cells = [f"{r['macs_ratio']:.3f}", f"{r['latency_ms']['p50']:.2f}", f"{r['dense_latency_ms']['p50']:.2f}"]
            cells += [r["dense_latency_ms"]["form"], f"{r['efficiency']:.2f}", f"{r['efficiency_linear']:.2f}"]
            table.add_row(r["op"], str(r["tokens"]), str(r["learners"]), *cells)
        out.print(table)
        out.print("efficiency: dense time x MACs ratio / time; 1 where every MAC left out is time saved")
        out.print("linear: the same beside PyTorch's linear layers, where another form of the dense layer is faster")
    out.print(f"{found['device']}, {found['threads']} threads, {found['dtype']}", highlight=False)


def _print_heard(found: dict[str, Any]) -> None:
    """Real-time factors of a speech model and of its encoder."""
    names = ("ms", "RTF", "speedup", "encoder ms", "encoder RTF", "encoder speedup")
    table = table_of("batch", "budget", "MACs ratio", *names)
    for size in dict.fromkeys(r["batch_size"] for r in found["results"]):
        rows = [r for r in found["results"] if r["batch_size"] == size]
        cells = [c for r in (rows[0], rows[0]["encoder"]) for c in _heard(r["dense_latency_ms"], r["dense_rtf"], 1.0)]
        table.add_row(str(size), f"dense, {rows[0]['dense_latency_ms']['form']}", "1.000", *cells)
        for r in rows:
            cells = [c for part in (r, r["encoder"]) for c in _heard(part["latency_ms"], part["rtf"], part["speedup"])]
            table.add_row(str(size), f"{r['budget']:g}", f"{r['macs_ratio']:.3f}", *cells)
        told = f"batch of {size}: {rows[0]['seconds']:.1f} s of audio"
        out.print(f"{told}; no encoder makes the whole more than {rows[0]['bound']:.2f} times as fast", highlight=False)
    out.print(table)
    work = found["work"]
    told = f"{work['gmacs_per_second']:.3f} GMACs a second of audio, {100 * work['front_share']:.1f} % of them"
    out.print(f"{told} the front end's, which stay", highlight=False)


def _heard(latency: dict[str, Any], rtf: float, speedup: float) -> list[str]:
    return [f"{latency['p50']:.1f}", f"{rtf:.4f}", f"{speedup:.2f}"]


def _milliseconds(latency: dict[str, Any]) -> list[str]:
    return [f"{latency[p]:.2f}" for p in ("p50", "p5", "p95", "p99")]


def print_checks(found: dict[str, Any]) -> None:
    """One row for each check: what was run, how far it was off, what is allowed."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "what", "max abs difference", "tolerance", "ok", "note"):
        table.add_column(column, justify="right" if column in ("max abs difference", "tolerance") else "left")
    for c in found["checks"]:
        numbers = ["-" if x is None else f"{x:.1e}" for x in (c["difference"], c["tolerance"])]
        table.add_row(c["check"], c["what"], *numbers, "yes" if c["ok"] else "NO", c["note"])
    out.print(table)
    out.print(f"{found['samples']} samples of {found['inputs']} on {found['device']}", highlight=False)


def print_comparison(found: dict[str, Any]) -> None:
    """One row for each model and budget; below, where the adaptive one loses."""
    sizes = [time["batch_size"] for time in found["rows"][0]["latency"]]
    table = table_of("model", "budget", "MACs ratio", "top-1 %", "agreement %", *(f"ms, batch {s}" for s in sizes))
    for r in found["rows"]:
        times = [f"{time['p50']:.1f}" for time in r["latency"]]
        form = next((f" ({t['form']})" for t in r["latency"] if "form" in t), "")
        budget = "-" if r["budget"] is None else f"{r['budget']:g}"
        figures = [f"{r['macs_ratio']:.3f}", percent(r["accuracy"]), percent(r["agreement"])]
        table.add_row(r["model"] + form, budget, *figures, *times)
    out.print(table)
    where = f"{found['device']}, {found['threads']} threads, {found['dtype']}"
    out.print(f"{found['samples']} {found['split']} samples; median ms of a batch; {where}", highlight=False)
    for line in found["left_out"]:
        out.print(f"left out: {line}", highlight=False)
    for line in found["verdicts"]:
        err.print(line, style="bold red" if line.startswith("budget") else None, highlight=False)


def print_reproduction(found: dict[str, Any]) -> None:
    """One row for each figure; below, what differs between the two environments."""
    table = table_of("budget", "figure", "published", "found", "holds")
    for r in found["rows"]:
        shown = ["-" if r[key] is None else f"{r[key]:.4f}" for key in ("published", "found")]
        holds = {True: "yes", False: "NO", None: "not checked"}[r["holds"]]
        table.add_row("dense" if r["budget"] is None else f"{r['budget']:g}", r["figure"], *shown, holds)
    out.print(table)
    out.print(f"tolerance {found['tolerance']:g}", highlight=False)
    for d in found["environment"]:
        out.print(f"{d['name']}: published {d['published']}, here {d['here']}", highlight=False)
    for note in found["notes"]:
        out.print(f"note: {note}", highlight=False)
