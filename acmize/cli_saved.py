"""Commands that judge, show and publish a saved model: report, compare, reproduce, push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from acmize.console import AsJson, DenseWeights, Device, NoCompile, Source, err, out, percent, table_of
from acmize.errors import AcmizeError

app = typer.Typer()

Images = Annotated[str | None, typer.Option("--data", help="images; the test split is used")]


@app.command()
def report(
    source: Source,
    data: Images = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the HTML file")] = Path("report.html"),
    weights: DenseWeights = None,
    budget: Annotated[list[float] | None, typer.Option(help="stops of the slider")] = None,
    limit: Annotated[int, typer.Option(help="images at most")] = 64,
    seed: Annotated[int, typer.Option(help="of the choice of images")] = 0,
) -> None:
    """One HTML file: accuracy against compute, choices of every site, heat maps over images, failures, the recipe."""
    from acmize.api import dense_from
    from acmize.hub import from_pretrained
    from acmize.report import write_report

    model = from_pretrained(source)
    write_report(
        model, output, data, folder=source, dense=dense_from(model, weights), budgets=budget, limit=limit, seed=seed
    )
    out.print(f"{output}: {output.stat().st_size / 1e6:.2f} MB", highlight=False)


@app.command()
def compare(
    source: Source,
    data: Annotated[str, typer.Option(help="images; the test split is used")],
    weights: DenseWeights = None,
    against: Annotated[list[str] | None, typer.Option(metavar="NAME=WEIGHTS", help="a smaller timm model")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="budgets; default: those it was saved with")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="images in a timed call; default: 1, 8")] = None,
    repeats: Annotated[int, typer.Option(help="timed calls of each model and batch size")] = 30,
    threads: Annotated[int | None, typer.Option(help="of PyTorch; default: as it is")] = None,
    device: Device = "cpu",
    limit: Annotated[int | None, typer.Option(help="images at most")] = None,
    seed: Annotated[int, typer.Option(help="of the order of images")] = 0,
    no_compile: NoCompile = False,
    save: Annotated[bool, typer.Option("--save", help="keep the table in DIR, for `acmize report`")] = False,
    as_json: AsJson = False,
) -> None:
    """Beside static width, token merging, the dense and smaller models, in one run; says where it loses."""
    from acmize.checkpoint import write_json
    from acmize.compare import BATCH_SIZES, compare_saved
    from acmize.hosts_speech import is_speech
    from acmize.hub import from_pretrained
    from acmize.timing import Setting

    if save and not Path(source).is_dir():
        raise AcmizeError(f"--save: found {source}, expected a folder here; leave it out, or download the model first")
    model = from_pretrained(source)
    if is_speech(model):
        raise AcmizeError(f"compare: found {type(model).__name__}, a speech model; it works on images only so far")
    found = compare_saved(
        model, data, weights=weights, against=_pairs(against), budgets=budget, batch_sizes=batch_size or BATCH_SIZES,
        setting=Setting(device=device, threads=threads, repeats=repeats, seed=seed), limit=limit,
        compiled=not no_compile,
    )  # fmt: skip
    if save:
        write_json(Path(source) / "comparison.json", found)
    if as_json:
        print(json.dumps(found))
    else:
        print_comparison(found)


def _pairs(given: list[str] | None) -> dict[str, str]:
    """NAME=WEIGHTS as a dictionary."""
    pairs = [item.partition("=") for item in given or ()]
    for name, _, file in pairs:
        if not (name and file):
            raise AcmizeError(f"--against {name}: expected NAME=WEIGHTS, a timm model and its .safetensors file")
    return {name: file for name, _, file in pairs}


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


@app.command()
def reproduce(
    source: Source,
    data: Annotated[str | None, typer.Option(help="the recipe's data, where it lies elsewhere here")] = None,
    weights: DenseWeights = None,
    train: Annotated[bool, typer.Option("--train", help="convert again by the recipe, and judge that")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="new folder for --train")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="difference of a share that counts as none; default: .005, with --train .02")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether the numbers published with a model hold here: evaluated again, or converted again."""
    from acmize.hub import check_replaceable, from_pretrained
    from acmize.reproduce import reproduce_saved

    if output is not None:
        check_replaceable(output)
    model = from_pretrained(source)
    found = reproduce_saved(model, data, weights=weights, train=train, output=output, tolerance=tolerance)
    if as_json:
        print(json.dumps(found))
    else:
        print_reproduction(found)
    if not found["ok"]:
        err.print("acmize: the published numbers do not hold here", style="bold red", highlight=False)
        raise typer.Exit(1)


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


@app.command()
def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository; made where there is none")],
    private: Annotated[bool, typer.Option("--private", help="make a private one")] = False,
) -> None:
    """Publish a saved model on the Hugging Face Hub, with the token of `hf auth login` or of HF_TOKEN."""
    from acmize.hub import from_pretrained, push_to_hub

    out.print(push_to_hub(from_pretrained(source), repo_id, private=private), highlight=False)
