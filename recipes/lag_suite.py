"""The comparison suite of LAG: models x data sets, dense beside gated; table, and plots of accuracy, loss and gates.

Command:   python recipes/lag_suite.py --output runs/lag_suite --device cuda --cifar100 FOLDER --svhn FOLDER
                                       --cifar10 FOLDER        VGG-11 and ResNet-18 on three data sets
           python recipes/lag_suite.py --models vgg11 --datasets cifar10 --epochs 3 --finetune 2    reduced, for a CPU
           python recipes/lag_suite.py --smoke                 ResNet-20 on digits, under a minute
Shows:     for each model on each data set, all from one dense model that is trained from scratch here:
           dense             as trained
           dense, longer     trained on with the losses, steps and images that LAG gets
           label-free        LAG with damage gates, no training of the model
           lag               LAG with damage gates, finetuned, at every budget
           static            one share of channels for every sample, trained like LAG
           lag, removed      without the channels that hardly a sample runs: parameters
Data:      folders that `datasets.load_dataset` opens. Where CIFAR-100 or SVHN is not given, CIFAR-10 stands in (of
           which ACMIZE_ASSETS has 10,000 training images); a line and the table say so. 10 % of the training images are
           held out for calibration; nothing is chosen on the test split.
Protocol:  25 epochs as published (AdamW 1e-3, cosine, batch 128, crops and flips), then --finetune epochs.
Seed:      --seed.
Versions:  in results.json.

Result:    docs/results.md, "CNN backbones"; plots need matplotlib.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import _common as common
import _training as training
import timm
import torch

import acmize.cifar_models  # noqa: F401 - registers the models
from acmize.controls import histograms
from acmize.gates import full_width
from acmize.phases.calibrate import Calibration
from acmize.recipe import resolve
from acmize.splits import open_images

DATASETS = ("cifar10", "cifar100", "svhn")


class Comparison:
    """One model on one data set: its rows, and what its plots show.

    Args:
        args: of the command.
        options: of every conversion.
        model: name, such as "vgg11".
        named: name of the data set.
        data: the data set.
    """

    def __init__(self, args: Any, options: tuple[dict[str, Any], ...], model: str, named: str, data: Any) -> None:
        self.args, self.data, self.title = args, data, f"{model}, {named}"
        self.folder: Path = args.output / "models" / f"{model}-{named}"
        if named in ("svhn", "digits"):
            options = (*options, {"train": {"hflip": 0.0}})  # left and right differ
        epochs = {"dense": 1 if args.smoke else args.epochs, "lag": 1 if args.smoke else args.finetune}
        self.recipes = {
            "dense": resolve(*options, {"train": {"epochs": epochs["dense"]}}),
            "label-free": resolve(*options, {"phases": ()}),
            "lag": resolve(*options, {"phases": ("gates", "finetune"), "train": {"epochs": epochs["lag"]}}),
        }
        splits = open_images(data, limit=args.limit, seed=args.seed)
        classes = len(splits.split("train").features[splits.label_column].names)
        torch.manual_seed(args.seed)
        dense = timm.create_model(f"acmize_{model}_cifar", num_classes=classes).to(args.device)
        self.bench = common.Bench(dense, data, self.recipes["dense"])
        path = self.folder / "dense.safetensors"
        training.from_scratch_(path, self.bench, self.recipes["dense"], dense, seed=args.seed, augment=True)

    @cache  # noqa: B019 - kept as long as the program
    def converted(self, name: str) -> Any:
        """The adaptive model, label-free or trained."""
        return common.converted(self.folder / name, self.bench.model, self.data, self.recipes[name])

    @cache  # noqa: B019
    def control(self, name: str) -> Any:
        """What the adaptive model was before training, trained without gates."""
        path, model = self.folder / f"{name}.safetensors", copy.deepcopy(self.converted("label-free"))
        if name == "static":
            return training.static_(path, self.bench, self.recipes["lag"], model)
        whole = Calibration(budgets=(1.0,), dials=(0.0,))
        return training.control_(path, self.bench, self.recipes["lag"], model, full_width, whole)

    def longer(self) -> common.Row:
        """The dense model, trained on as long as LAG is."""
        made = self.control("longer")
        return {**self.bench.row(made, made.plan, full_width), "macs_ratio": 1.0}

    def gated(self, name: str, budget: float) -> common.Row:
        """An adaptive model at a budget, with the mean share of its learners that each chain runs."""
        made = self.converted(name)
        row = self.bench.gated(made, budget)
        counts = histograms(made, self.bench.held)
        means = {fqn: (c @ torch.arange(len(c), dtype=c.dtype) / c.sum() / (len(c) - 1)) for fqn, c in counts.items()}
        return {**row, "gates": {fqn: share.item() for fqn, share in means.items()}}

    def measure(self, rows: common.Rows) -> None:
        """All rows of this model on this data set."""
        sizes = {"parameters": sum(p.numel() for p in self.bench.model.parameters())}
        rows.measure(f"{self.title}: dense", lambda: {**common.dense_row(self.bench), **sizes})
        rows.measure(f"{self.title}: dense, longer", lambda: {**self.longer(), **sizes})
        for name in ("label-free", "lag"):
            for budget in self.args.budgets:
                rows.measure(f"{self.title}: {name} @ {budget:g}", lambda n=name, b=budget: self.gated(n, b))
        for budget in self.args.budgets:
            rows.measure(f"{self.title}: static @ {budget:g}", lambda b=budget: self.static(b))
        adaptive = copy.deepcopy(self.converted("lag"))
        training.removed_rows(rows, f"{self.title}: lag, removed", self.bench, adaptive, tuple(self.args.budgets))

    def static(self, budget: float) -> common.Row:
        """The trained static control."""
        made = self.control("static")
        return self.bench.static(made, made.plan, budget)

    def losses(self) -> dict[str, list[float]]:
        """Model -> its loss at each log point."""
        found = {name: training.losses(self.folder / f"{name}.safetensors") for name in ("dense", "longer", "static")}
        return {**found, "lag": self.converted("lag").recipe["finetune_loss"]}


def plots(output: Path, rows: common.Rows, made: list[Comparison]) -> None:
    """accuracy.png, loss.png, gates.png: one panel a comparison."""
    plt = common.pyplot()
    if plt is None:
        return

    def accuracy(axes: Any, one: Comparison) -> None:
        for name in ("dense", "dense, longer", "label-free", "lag", "static"):
            wanted = f"{one.title}: {name}"
            points = [r for key, r in rows.found["rows"].items() if key.split(" @ ")[0] == wanted]
            x, y = ([r[k] for r in points] for k in ("macs_ratio", "accuracy"))
            axes.plot(x, y, "o-", label=name)
        axes.set(xlabel="executed MACs, share of dense", ylabel="top-1")

    def loss(axes: Any, one: Comparison) -> None:
        for name, values in one.losses().items():
            axes.plot([(i + 1) / len(values) for i in range(len(values))], values, label=name)
        axes.set(xlabel="share of the training", ylabel="loss")

    def gates(axes: Any, one: Comparison) -> None:
        for budget in one.args.budgets:
            shares = rows.found["rows"][f"{one.title}: lag @ {budget:g}"]["gates"]
            axes.plot(list(shares), list(shares.values()), "o-", label=f"budget {budget:g}")
        axes.tick_params("x", rotation=90)
        axes.set(ylabel="mean share of learners run", ylim=(0, 1.05))

    for draw in (accuracy, loss, gates):
        figure, panels = plt.subplots(1, len(made), figsize=(5 * len(made), 4), squeeze=False, layout="constrained")
        for axes, one in zip(panels[0], made, strict=True):
            draw(axes, one)
            axes.set_title(one.title)
            axes.legend()
        figure.savefig(output / f"{draw.__name__}.png", dpi=150)
        plt.close(figure)


def folders(args: Any) -> dict[str, Any]:
    """Name of a data set -> the data; CIFAR-10 for those that are not given."""
    if args.smoke:
        return {"digits": common.photographs(True)}
    fallback = args.cifar10 or str(common.assets() / "data" / "cifar10")
    found = {}
    for name in args.datasets:
        if name != "cifar10" and getattr(args, name) is None:
            print(f"{name}: not given (--{name} FOLDER); CIFAR-10 in its place")
            name = "cifar10"
        found[name] = getattr(args, name) or fallback
    return found


def main() -> None:
    """Train what is missing; table and plots."""
    parser = common.parser(__doc__ or "", __file__, (0.8, 0.6))
    parser.add_argument("--models", nargs="+", default=["vgg11", "resnet18"], help="acmize_NAME_cifar")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    for name in DATASETS:
        parser.add_argument(f"--{name}", help="folder of this data set")
    parser.add_argument("--epochs", type=int, default=25, help="of the dense model")
    parser.add_argument("--finetune", type=int, default=10, help="epochs of phase 3 and of the trained controls")
    parser.add_argument("--num-learners", type=int, default=4)
    args = parser.parse_args()
    args.models = ["resnet20"] if args.smoke else args.models
    options, budgets = common.start(args, __file__), tuple(args.budgets)
    options.pop("acm", None)  # --smoke: options of another method
    train = {"lr": 5e-4, "crop_pad": 4, "warmup": 0.1, "interpolate": False}
    more: dict[str, Any] = {"method": "lag", "config": {"num_learners": args.num_learners}, "holdout": 0.1}
    more |= {
        "budget": budgets[0],
        "budgets": budgets,
        "train": train,
        "losses": {"budgets": (min(budgets) - 0.1, 0.95)},
    }
    more |= {} if args.smoke else {"batch_size": 128, "gates": {"images": 2000, "budgets": (min(budgets) - 0.1, 0.95)}}
    rows, data = common.Rows(args, __file__), folders(args)
    made = []
    for model in args.models:
        for named, folder in data.items():
            made.append(Comparison(args, (options, more), model, named, folder))
            made[-1].measure(rows)
    plots(args.output, rows, made)
    columns = common.columns("model, data: method")
    rows.show({**columns, "parameters": lambda _, r: f"{r['parameters']:,}" if "parameters" in r else "-"})


if __name__ == "__main__":
    main()
