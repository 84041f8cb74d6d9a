"""What the recipes share: arguments, model and data, rows kept as soon as they are measured, the table printed last."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmize.api import convert
from acmize.checkpoint import read_json, write_json
from acmize.controls import gates_share, histograms, random_choice, static_width
from acmize.environment import environment
from acmize.evaluate import Reference, evaluate_at, reference
from acmize.hub import base_of, from_pretrained
from acmize.images import Images
from acmize.models import architecture, load_model
from acmize.plan import Plan
from acmize.quickstart_model import digits_dataset
from acmize.recipe import Recipe
from acmize.tables import percent

ROOT = Path(__file__).resolve().parents[1]
SMOKE: dict[str, Any] = {
    "limit": 120,
    "batch_size": 32,
    "moments": 64,
    "holdout": 0.3,
    "acm": {"gate_hidden": 8},
    "gates": {"images": 40, "steps": 40},
    "distill": {"epochs": 1},
    "train": {"epochs": 1, "crop_scale": (0.8, 1.0)},
}
Row = dict[str, Any]


def parser(doc: str, file: str, budgets: Sequence[float] = ()) -> argparse.ArgumentParser:
    """Arguments every recipe has: --smoke, --output, --seed, --limit, and --budgets where there are some."""
    shown = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog=Path(file).name, description=doc, formatter_class=shown)
    made.add_argument("--smoke", action="store_true", help="the packaged digits model, a few images: only that it runs")
    made.add_argument("--output", type=Path, help=f"folder for the results (default: runs/{Path(file).stem})")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--limit", type=int, help="samples a split at most")
    made.add_argument("--device", default="cpu", help="where the model runs: cpu or cuda")
    made.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"), help="of every training loop")
    if budgets:
        made.add_argument("--budgets", type=float, nargs="+", default=list(budgets))
    return made


def start(args: argparse.Namespace, file: str) -> dict[str, Any]:
    """Set up logging and the output folder; the options of a conversion that the arguments decide."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.output is None:
        args.output = Path(tempfile.mkdtemp()) if args.smoke else Path("runs") / Path(file).stem
    args.output.mkdir(parents=True, exist_ok=True)
    options = {**SMOKE} if args.smoke else {}
    options |= {"seed": args.seed, "mixed_precision": args.mixed_precision}
    return {**options, **({} if args.limit is None else {"limit": args.limit})}


def assets() -> Path:
    """The folder with real weights and data: ACMIZE_ASSETS, or shared/assets beside the repository."""
    path = Path(os.environ.get("ACMIZE_ASSETS") or ROOT.parent / "shared" / "assets")
    if not path.is_dir():
        raise SystemExit("set ACMIZE_ASSETS to the folder that holds models/ and data/, or use --smoke")
    return path


def deit_tiny(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny with its ImageNet weights, or the packaged digits model, on the device asked for."""
    if args.smoke:
        return load_model("acmize_vit_digits").to(args.device)
    weights = assets() / "models" / "deit_tiny_patch16_224" / "model.safetensors"
    return load_model("deit_tiny_patch16_224", weights, **kwargs).to(args.device)


def resnet20(args: argparse.Namespace) -> nn.Module:
    """ResNet-20 with its CIFAR-10 weights, or with random ones."""
    if args.smoke:
        torch.manual_seed(args.seed)
        return architecture("acmize_resnet20_cifar")
    return load_model("acmize_resnet20_cifar", assets() / "models" / "resnet20_cifar10" / "model.safetensors")


def photographs(smoke: bool) -> Any:
    """imagenet_mini, or scikit-learn's digits."""
    return digits_dataset() if smoke else str(assets() / "data" / "imagenet_mini")


def training_options(made: argparse.ArgumentParser, epochs: int, lr: float) -> None:
    """Arguments of the ResNet-20 recipes for phase 3."""
    made.add_argument("--data", help="folder of CIFAR-10 (default: that of ACMIZE_ASSETS, 10,000 training images)")
    made.add_argument("--epochs", type=int, default=epochs, help="of phase 3 and of the trained static control")
    made.add_argument("--lr", type=float, default=lr, help="of phase 3")
    made.add_argument("--weight-decay", type=float, default=0.01, help="of phase 3")
    made.add_argument("--temperature", type=float, default=4.0, help="of the dense model's answers, as a teacher")
    made.add_argument("--batch-norm", action="store_true", help="train BatchNorm too, on the statistics of batches")


def cifar10_options(args: Any, method: str) -> tuple[Any, dict[str, Any]]:
    """The data of the ResNet-20 recipes (--data, or that of ACMIZE_ASSETS), and the options that they share."""
    train = {
        "epochs": 1 if args.smoke else args.epochs,
        "lr": args.lr,
        "crop_pad": 4,
        "weight_decay": args.weight_decay,
        "batch_norm": args.batch_norm,
        "warmup": 0.05,
        "interpolate": False,
    }
    budgets = tuple(args.budgets)
    more: dict[str, Any] = {"method": method, "budget": budgets[0], "budgets": budgets, "holdout": 0.1, "train": train}
    more["losses"] = {"temperature": args.temperature, "budget": 30.0}  # softened answers weigh more: 10 met no .6
    if args.smoke:
        return photographs(True), more
    return args.data or str(assets() / "data" / "cifar10"), {**more, "batch_size": 128}


class Rows:
    """Measured rows in `results.json`, each written at once, so that a run that was killed goes on where it stopped.

    Args:
        args: arguments of the recipe; but for the folder, --from and --variants they must be those that the folder was
            begun with.
        file: the recipe's.
    """

    def __init__(self, args: argparse.Namespace, file: str) -> None:
        self.path = args.output / "results.json"
        skip = ("output", "trained", "variants")
        given = {k: v for k, v in sorted(vars(args).items()) if k not in skip}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        self.found: dict[str, Any] = {
            "recipe": Path(file).stem,
            "settings": settings,
            "machine": environment(args.device),
            "rows": {},
        }
        if self.path.exists():
            before = read_json(self.path)
            if before["settings"] != settings:
                raise SystemExit(f"{self.path}: begun with {before['settings']}; name another --output")
            self.found["rows"] = before["rows"]

    def measure(self, key: str, run: Callable[[], Row]) -> Row:
        """The row of this name: as it stands in the file, or measured now."""
        rows = self.found["rows"]
        if key not in rows:
            rows[key] = run()
            write_json(self.path, self.found)
        return rows[key]

    def show(self, columns: dict[str, Callable[[str, Row], str]]) -> None:
        """Print all rows as a markdown table, and write it to `table.md` beside them."""
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for key, row in self.found["rows"].items():
            lines.append("| " + " | ".join(cell(key, row) for cell in columns.values()) + " |")
        text = "\n".join(lines)
        (self.path.parent / "table.md").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)


class Bench:
    """The data of a recipe and the dense model's answers on its test split.

    Args:
        dense: the dense model.
        data: as `acmize.convert` takes it.
        recipe: seed, limit, batch size.
    """

    def __init__(self, dense: nn.Module, data: Any, recipe: Recipe) -> None:
        self.model, self.data, self.images = dense, data, Images(data, dense, recipe)
        self.test = self.images.labelled(self.images.test)
        self.held = list(self.images.batches(self.images.held, 200))

    @cached_property
    def dense(self) -> Reference:
        """The dense model's answers, computed when the first row is wanted."""
        return reference(self.model, self.test)

    def row(self, model: nn.Module, plan: Plan, choose: Any = None) -> Row:
        """Metrics on the test split of the model as it is set."""
        found = evaluate_at(model, plan, self.test, self.dense, choose)
        return {k: v for k, v in found.items() if k != "sites"}

    def gated(self, model: Any, budget: float) -> Row:
        """Metrics of an adaptive model at a budget."""
        model.set_budget(budget)
        return {"budget": budget, **self.row(model, model.plan)}

    def random(self, model: Any, budget: float, seed: int) -> Row:
        """Metrics of chance: every choice drawn from the histogram of its site's gate at this budget, on held rows."""
        model.set_budget(budget)
        chance = random_choice(model, histograms(model, self.held), torch.Generator().manual_seed(seed))
        return {"budget": budget, **self.row(model, model.plan, chance)}

    def static(self, model: nn.Module, plan: Plan, budget: float) -> Row:
        """Metrics of static width, with the merging in force; it needs no gates, so their MACs go to learners."""
        spare = gates_share(model, plan)
        row = self.row(model, plan, static_width(model, plan, budget + spare))
        ratio = row["macs_ratio"] - spare
        return {"budget": budget, **row, "macs_ratio": ratio, "macs": ratio * plan.macs_dense}

    def plain(self, model: nn.Module, macs_ratio: float) -> Row:
        """Metrics of a model without gates, whose MACs are known."""
        found = reference(model, self.test)
        teacher, student = self.dense.logits.log_softmax(-1), found.logits.log_softmax(-1)
        same = found.logits.argmax(-1) == self.dense.logits.argmax(-1)
        return {
            "macs_ratio": macs_ratio,
            "accuracy": found.accuracy,
            "agreement": same.double().mean().item(),
            "kl": (teacher.exp() * (teacher - student)).sum(-1).mean().item(),
            "seconds": found.seconds,
        }


def converted(folder: Path, dense: nn.Module, data: Any, recipe: Recipe, kwargs: dict[str, Any] | None = None) -> Any:
    """The adaptive model kept in `folder`; made, in a way that can be killed and gone on with, where there is none.

    Args:
        folder: of the converted model.
        dense: the dense model.
        data: as `acmize.convert` takes it.
        recipe: of the conversion.
        kwargs: what `timm.create_model` was given beside the name.
    """
    if (folder / "config.json").exists():
        return from_pretrained(folder).to(next(dense.parameters()).device)
    work = folder.with_name(f"{folder.name}.work")
    made = convert(dense, data=data, recipe=recipe, base=base_of(dense, kwargs), work=work, resume=True)
    made.save_pretrained(folder)
    return made


def pyplot() -> Any:
    """Pyplot of matplotlib without a window, or None, with a note, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib; pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def columns(first: str = "method") -> dict[str, Callable[[str, Row], str]]:
    """The usual columns: method, budget, realised MACs, top-1, agreement with dense, KL to dense."""
    return {
        first: lambda key, _: key.split(" @ ")[0],
        "budget": lambda _, r: "-" if r.get("budget") is None else f"{r['budget']:g}",
        "MACs": lambda _, r: f"{r['macs_ratio']:.3f}",
        "top-1 %": lambda _, r: percent(r["accuracy"]),
        "agreement %": lambda _, r: percent(r["agreement"]),
        "KL": lambda _, r: f"{r['kl']:.3f}",
    }


def dense_row(bench: Bench) -> Row:
    """The dense model's own row."""
    return {"macs_ratio": 1.0, "accuracy": bench.dense.accuracy, "agreement": 1.0, "kl": 0.0}
