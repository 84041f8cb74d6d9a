"""The command line: plan, convert, eval, quickstart, and those of cli_saved.py.

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

from acmize import cli_saved
from acmize.__about__ import __version__
from acmize.console import AsJson, Device, Source, err, images_only, out
from acmize.errors import AcmizeError
from acmize.interrupt import EXIT_STATUS, Stopped, stopping_on_sigterm
from acmize.launched import alone_of
from acmize.registry import methods
from acmize.tables import print_plan, print_results

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Adaptive computation for pretrained models.")
app.add_typer(cli_saved.app)

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
        images_only(dense, "--budget as a time")
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


# --- eval, quickstart -----------------------------------------------------------------------------------------


@app.command("eval")
def evaluate_(
    source: Source,
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


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if not values else tuple(values)


def _merge(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _phases(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from acmize.recipe import named_phases

    return named_phases(text)


__all__ = ["app", "main"]
