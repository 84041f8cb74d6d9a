"""The command line: plan, convert, eval, bench, verify, export, quickstart, and those of cli_saved.py.

Tables; `--json` for programs.
Exit status: 0 done; 1 done, but a budget was missed or a check failed; 2 something the user can mend, said on one line;
143 stopped by SIGTERM, with what was done saved.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from acmize import cli_saved
from acmize.__about__ import __version__
from acmize.console import AsJson, DenseWeights, Device, NoCompile, err, out, percent, table_of
from acmize.errors import AcmizeError
from acmize.interrupt import EXIT_STATUS, Stopped, stopping_on_sigterm
from acmize.launched import alone_of
from acmize.registry import methods

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Adaptive computation for pretrained models.")
app.add_typer(cli_saved.app)
PROJECTIONS = ("q", "k", "v", "out", "linear")

Model = Annotated[str, typer.Argument(help="timm model, or a folder or USER/NAME of a transformers speech model")]
Weights = Annotated[Path | None, typer.Option(help="safetensors file (or index) with the weights, in place of the Hub")]
Targets = Annotated[list[str] | None, typer.Option("--target-modules", help="globs over sites, or PATH:mlp(fc1,fc2)")]
Exclude = Annotated[list[str] | None, typer.Option(help="globs of sites that stay dense")]
Learners = Annotated[int | None, typer.Option(help="learners a site")]
Width = Annotated[int | None, typer.Option("--learner-dim", help="hidden units of an MLP's learner")]
MethodName = Annotated[str | None, typer.Option("--method", help=", ".join(methods()))]
Settings = Annotated[list[str] | None, typer.Option("--set", help="an option of the method's config: NAME=VALUE")]
Preset = Annotated[str, typer.Option(help="default, or paper (arXiv 2312.10193)")]
Config = Annotated[Path | None, typer.Option(help="YAML file with any option of the recipe")]


def main() -> None:
    """Entry point: user errors become one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("acmize").setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    if (count := alone_of()) is not None:
        logging.getLogger("acmize").info(
            "accelerate started one process on this CPU: torchrun starts the %d that were asked for", count
        )
        words = ["--nproc-per-node", str(count), "--master-port", os.environ["MASTER_PORT"], "-m", "acmize"]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words, *sys.argv[1:]])
    try:
        with stopping_on_sigterm():
            app(standalone_mode=True)
    except Stopped as stopped:
        sys.stderr.write(f"acmize: {stopped}; what was done is kept, --resume goes on from it\n")
        raise SystemExit(EXIT_STATUS) from None
    except AcmizeError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.filename or 'output'}: {error.strerror}; free space, check the path, or choose another folder")


def _fail(message: str) -> None:
    told = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))  # no escape codes
    sys.stderr.write(f"acmize: {told}\n")
    raise SystemExit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"acmize {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Adaptive computation for pretrained models."""


# --- plan -----------------------------------------------------------------------------------------------------


@app.command()
def plan(
    model: Model,
    weights: Weights = None,
    budget: Annotated[float | None, typer.Option(help="check that this budget can be reached")] = None,
    target_modules: Targets = None,
    exclude: Exclude = None,
    method: MethodName = None,
    settings: Settings = None,
    num_learners: Learners = None,
    learner_dim: Width = None,
    preset: Preset = "default",
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """What would be converted, at what size and cost, and what not and why. Nothing is changed."""
    from acmize.hosts import make_plan
    from acmize.models import architecture, load_model

    flags = _given(target_modules=_tuple(target_modules), exclude=_tuple(exclude))
    recipe = _recipe(preset, config, {**_method(method, settings, num_learners, learner_dim), **flags})
    dense = load_model(model, weights) if weights is not None else architecture(model)
    made = make_plan(
        dense, recipe.config, target_modules=recipe.target_modules, exclude=recipe.exclude, merge=recipe.merge
    )
    if budget is not None:
        made.check_budget(budget)
    if as_json:
        print(json.dumps(made.to_dict()))
        return
    print_plan(model, made)


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


# --- convert --------------------------------------------------------------------------------------------------


@app.command()
def convert(
    model: Model,
    data: Annotated[str, typer.Option(help="folder of images or audio, or anything datasets.load_dataset opens")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the result")],
    weights: Weights = None,
    budget: Annotated[str | None, typer.Option(help="share of the dense MACs, 0..1, or a time: 20ms")] = None,
    latency_batch: Annotated[int, typer.Option(help="images in a batch that --budget 20ms speaks of")] = 1,
    phases: Annotated[str | None, typer.Option(help="all, none, or some of distill,gates,finetune")] = None,
    preset: Preset = "default",
    config: Config = None,
    target_modules: Targets = None,
    exclude: Exclude = None,
    method: MethodName = None,
    settings: Settings = None,
    num_learners: Learners = None,
    learner_dim: Width = None,
    gate_labels: Annotated[str | None, typer.Option(help="damage, or threshold (published)")] = None,
    merge: Annotated[str | None, typer.Option(help="merge tokens: auto, budget, none, or pairs a block")] = None,
    epochs: Annotated[int | None, typer.Option(help="epochs of finetune")] = None,
    limit: Annotated[int | None, typer.Option(help="samples a split at most")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="read samples as they come: tar shards, the Hub")
    ] = False,
    max_corrupt: Annotated[int | None, typer.Option(help="samples that cannot be read and are left out")] = None,
    fit_batch: Annotated[int | None, typer.Option(help="leave dense what does not pay here in such batches")] = None,
    batch_size: Annotated[int | None, typer.Option(help="of every phase")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything drawn")] = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on from an unfinished conversion")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a pretrained model adaptive, measure it and save it."""
    from acmize import parallel
    from acmize.api import convert as run
    from acmize.hub import base_of, check_replaceable
    from acmize.latency import parse_budget
    from acmize.models import load_model

    share, target_ms = (None, None) if budget is None else parse_budget(budget)
    flags: dict[str, Any] = {
        **_method(method, settings, num_learners, learner_dim),
        **_given(budget=share, limit=limit, batch_size=batch_size, seed=seed, merge=_merge(merge), data=data),
        **_given(target_modules=_tuple(target_modules), exclude=_tuple(exclude), phases=_phases(phases)),
        **_given(fit_batch=fit_batch, max_corrupt=max_corrupt, streaming=streaming or None),
    }
    if gate_labels is not None:
        flags["gates"] = {"labels": gate_labels}
    if epochs is not None:
        flags["train"] = {"epochs": epochs}
    recipe = _recipe(preset, config, flags)
    check_replaceable(output)
    dense = load_model(model, weights).to(parallel.placed(device))
    if target_ms is not None:
        _images_only(dense, "--budget as a time")
        if parallel.join(next(dense.parameters()).device) > 1:
            raise AcmizeError("--budget as a time: found several processes, expected one to measure; give a share")
    work = output.absolute().with_name(output.absolute().name + ".work")
    made = run(dense, data=data, recipe=recipe, base=base_of(dense), work=work, resume=resume, output=output)
    if not parallel.is_main():
        return
    met = target_ms is None or _keep_time(made, dense, data, output, target_ms, latency_batch)
    _report(made.results, as_json)
    if not met:
        raise typer.Exit(1)


def _keep_time(model: Any, dense: Any, data: str, output: Path, target_ms: float, batch: int) -> bool:
    """Leave the model at the largest budget that keeps a time, and save what was measured; whether there is one."""
    from acmize.api import evaluate_saved
    from acmize.bench import real_images
    from acmize.hub import save_pretrained
    from acmize.latency import budget_for
    from acmize.timing import Setting

    images = real_images(model, data, limit=max(64, batch), seed=model.recipe["seed"])
    found = budget_for(model, images, target_ms, batch_size=batch, setting=Setting(seed=model.recipe["seed"]))
    measured = evaluate_saved(model, data, [found["budget"]], dense=dense, limit=model.recipe["limit"])
    rows = [row for row in model.results["results"] if row["budget"] != found["budget"]]
    model.results["results"] = sorted([*rows, *measured["results"]], key=lambda row: -row["budget"])
    model.results["latency"] = found
    model.set_budget(found["budget"])
    save_pretrained(model, output)
    spent = next(row["latency_ms"] for row in found["table"] if row["budget"] == found["budget"])
    told = f"{spent['p50']:.2f} ms (p95 {spent['p95']:.2f}) a batch of {batch} at budget {found['budget']:.3f}"
    if found["met"]:
        err.print(f"{told}, asked {target_ms:g} ms", highlight=False)
    else:
        err.print(f"acmize: budget {target_ms:g}ms: found {told}, the lowest; ask for more", style="bold red")
    return found["met"]


def _report(results: dict[str, Any], as_json: bool) -> None:
    from acmize import parallel

    if not parallel.is_main():
        return
    if as_json:
        print(json.dumps(results))
    else:
        print_results(results)
    missed = [row["missed"] for row in results["results"] if row.get("missed")]
    for line in missed:
        err.print(f"acmize: {line}", style="bold red", highlight=False)
    if missed:
        raise typer.Exit(1)


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


# --- eval, quickstart -----------------------------------------------------------------------------------------


@app.command("eval")
def evaluate_(
    source: Annotated[str, typer.Argument(metavar="DIR", help="folder or Hub repository of an adaptive model")],
    data: Annotated[str, typer.Option(help="evaluation data; its test split is used")],
    budget: Annotated[list[float] | None, typer.Option(help="budgets; default: those it was saved with")] = None,
    weights: Annotated[Path | None, typer.Option(help="weights of the dense model, to compare with")] = None,
    limit: Annotated[int | None, typer.Option(help="samples at most")] = None,
    batch_size: Annotated[int, typer.Option()] = 32,
    as_json: AsJson = False,
) -> None:
    """Accuracy against executed MACs of a saved model, for a list of budgets."""
    from acmize.api import evaluate_saved
    from acmize.hub import from_pretrained

    model = from_pretrained(source)
    results = evaluate_saved(model, data, budget, weights=weights, limit=limit, batch_size=batch_size)
    _report(results, as_json)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the result")] = Path("acmize-quickstart"),
    as_json: AsJson = False,
) -> None:
    """The whole way on what the package carries, offline: a small ViT and scikit-learn's digits."""
    from acmize.hub import check_replaceable
    from acmize.quickstart import run

    check_replaceable(output)
    results = run(output)
    if as_json:
        print(json.dumps(results))
        return
    print_results(results, latency=True)
    out.print(f"saved in {output}: acmize.from_pretrained({str(output)!r}).set_budget(0.6)", highlight=False)


# --- bench, verify --------------------------------------------------------------------------------------------


@app.command()
def bench(
    source: Annotated[str | None, typer.Argument(metavar="DIR", help="folder or Hub repository")] = None,
    data: Annotated[str | None, typer.Option(help="real inputs, since gates decide from them")] = None,
    weights: DenseWeights = None,
    budget: Annotated[list[float] | None, typer.Option(help="budgets; default: those it was saved with")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="samples a call; default 1, 8, 32; speech 1")] = None,
    repeats: Annotated[int, typer.Option(help="timed calls of each model, budget and batch size")] = 30,
    threads: Annotated[int | None, typer.Option(help="of PyTorch; default: as it is")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Device = "cpu",
    limit: Annotated[int, typer.Option(help="samples at most; 32 at most in speech")] = 256,
    seed: Annotated[int, typer.Option(help="of the order of samples")] = 0,
    no_compile: NoCompile = False,
    ops: Annotated[bool, typer.Option("--ops", help="time the primitives alone; DIR may be left out")] = False,
    as_json: AsJson = False,
) -> None:
    """Milliseconds beside the dense model's, eager or compiled, on real inputs in turns."""
    from acmize.bench import BATCH_SIZES, bench_saved
    from acmize.bench_ops import bench_ops
    from acmize.bench_speech import bench_speech
    from acmize.hosts_speech import is_speech
    from acmize.hub import from_pretrained
    from acmize.timing import Setting

    setting = Setting(device=device, dtype=dtype, threads=threads, repeats=repeats, seed=seed)
    if source is None and not ops:
        raise AcmizeError("bench: found no model, expected a folder or repository; give DIR, or --ops for primitives")
    found: dict[str, Any] = {}
    if source is not None:
        model = from_pretrained(source)
        told: dict[str, Any] = {"weights": weights, "budgets": budget, "setting": setting}
        if is_speech(model):
            found |= bench_speech(model, data, batch_sizes=batch_size or (1,), limit=min(limit, 32), **told)
        else:
            sizes = batch_size or BATCH_SIZES
            found |= bench_saved(model, data, batch_sizes=sizes, limit=limit, compiled=not no_compile, **told)
    if ops:
        found |= bench_ops(setting)
    if as_json:
        print(json.dumps(found))
    else:
        print_bench(found)


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
                table.add_row(str(size), f"{r['budget']:g}", f"{r['macs_ratio']:.3f}", *cells)
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


@app.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="DIR", help="folder or Hub repository of an adaptive model")],
    data: Annotated[str | None, typer.Option(help="real inputs; without them, noise")] = None,
    weights: DenseWeights = None,
    limit: Annotated[int, typer.Option(help="samples")] = 4,
    seed: Annotated[int, typer.Option(help="of samples, noise and random choices")] = 0,
    device: Device = "cpu",
    no_compile: NoCompile = False,
    as_json: AsJson = False,
) -> None:
    """Whether all ways of running a saved model give the same answers on this machine."""
    from acmize.hub import from_pretrained
    from acmize.verify import verify_saved

    compiler = None if no_compile else "inductor"
    model = from_pretrained(source)
    found = verify_saved(model, data, weights=weights, limit=limit, seed=seed, device=device, compiler=compiler)
    if as_json:
        print(json.dumps(found))
    else:
        print_checks(found)
    if not found["ok"]:
        failed = sum(not check["ok"] for check in found["checks"])
        err.print(f"acmize: {failed} of {len(found['checks'])} checks failed", style="bold red", highlight=False)
        raise typer.Exit(1)


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


@app.command("export")
def export_(
    source: Annotated[str, typer.Argument(metavar="DIR", help="folder or Hub repository of an adaptive model")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the file: .onnx, or .pt2")],
    format: Annotated[str, typer.Option(help="onnx, onnx-int8, onnx-int8-dynamic, torch-export, aoti")] = "onnx",
    with_compute: Annotated[bool, typer.Option("--with-compute", help="a second output: macs_ratio")] = False,
) -> None:
    """One file for other runtimes, with the budget as an input."""
    from acmize.export import export
    from acmize.hub import from_pretrained

    path = export(from_pretrained(source), output, format, compute=with_compute)
    out.print(f"wrote {path}: inputs x and budget, {path.stat().st_size / 1e6:.1f} MB", highlight=False)


# --- options --------------------------------------------------------------------------------------------------


def _recipe(preset: str, config: Path | None, flags: dict[str, Any]) -> Any:
    from acmize.recipe import read_config, resolve

    layers = [read_config(config)] if config is not None else []
    return resolve(*layers, flags, preset_name=preset)


def _method(
    name: str | None, settings: list[str] | None, num_learners: int | None, learner_dim: int | None
) -> dict[str, Any]:
    """The method and what is said of its config."""
    import yaml

    config: dict[str, Any] = _given(num_learners=num_learners, learner_dim=learner_dim)
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise AcmizeError(f"--set {setting}: expected NAME=VALUE, such as --set mode=oracle")
        config[key.replace("-", "_")] = yaml.safe_load(value)
    return _given(method=name, config=config or None)


def _given(**options: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _images_only(model: Any, what: str) -> None:
    from acmize.hosts_speech import is_speech

    if is_speech(model):
        raise AcmizeError(f"{what}: found {type(model).__name__}, a speech model; it works on images only so far")


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if not values else tuple(values)


def _merge(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _phases(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from acmize.recipe import named_phases

    return named_phases(text)


__all__ = ["app", "main", "print_bench", "print_checks", "print_plan", "print_results"]
