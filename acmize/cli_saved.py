"""Commands that judge, show and publish a saved model: bench, verify, export, report, compare, reproduce, push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from acmize.console import AsJson, DenseWeights, Device, NoCompile, Source, err, images_only, out
from acmize.errors import AcmizeError
from acmize.tables import print_bench, print_checks, print_comparison, print_reproduction

app = typer.Typer()

Images = Annotated[str | None, typer.Option("--data", help="images; the test split is used")]


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
    compile_adaptive: Annotated[bool, typer.Option(help="compile it as well: minutes for each budget")] = False,
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
            which = () if no_compile else ("dense", "adaptive") if compile_adaptive else ("dense",)
            found |= bench_saved(model, data, batch_sizes=sizes, limit=limit, compiled=which, **told)
    if ops:
        found |= bench_ops(setting)
    if as_json:
        print(json.dumps(found))
    else:
        print_bench(found)


@app.command()
def verify(
    source: Source,
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


@app.command("export")
def export_(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file: .onnx, or .pt2")],
    format: Annotated[str, typer.Option(help="onnx, onnx-int8, onnx-int8-dynamic, torch-export, aoti")] = "onnx",
    with_compute: Annotated[bool, typer.Option("--with-compute", help="a second output: macs_ratio")] = False,
) -> None:
    """One file for other runtimes, with the budget as an input."""
    from acmize.export import export
    from acmize.hub import from_pretrained

    path = export(from_pretrained(source), output, format, compute=with_compute)
    out.print(f"wrote {path}: inputs x and budget, {path.stat().st_size / 1e6:.1f} MB", highlight=False)


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
    from acmize.hub import from_pretrained
    from acmize.timing import Setting

    if save and not Path(source).is_dir():
        raise AcmizeError(f"--save: found {source}, expected a folder here; leave it out, or download the model first")
    model = from_pretrained(source)
    images_only(model, "compare")
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


@app.command()
def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository; made where there is none")],
    private: Annotated[bool, typer.Option("--private", help="make a private one")] = False,
) -> None:
    """Publish a saved model on the Hugging Face Hub, with the token of `hf auth login` or of HF_TOKEN."""
    from acmize.hub import from_pretrained, push_to_hub

    out.print(push_to_hub(from_pretrained(source), repo_id, private=private), highlight=False)
