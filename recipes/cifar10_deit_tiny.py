"""DeiT-Tiny on CIFAR-10 (64 px, patches of 8): finetuned dense, made adaptive, beside two controls at equal MACs.

Command:   python recipes/cifar10_deit_tiny.py --output runs/cifar10              10,000 training images
           python recipes/cifar10_deit_tiny.py --output runs/cifar10-full --full --data FOLDER --device cuda
                                                                  all 50,000 (the folder of tools/cifar10_full.py)
           python recipes/cifar10_deit_tiny.py --smoke            the digits model, under a minute
Shows:     phase 3 where there are labels and enough data. All rows come from one finetuned dense model:
           adaptive      three phases, one checkpoint for every budget
           static width  the same plan (merging included), every token alike, trained like phase 3 with the same losses,
                         steps and budgets; pays for no gates
           fewer blocks  a smaller dense ViT for each budget: evenly spaced blocks of the dense one, trained as long on
                         labels and the dense model's logits
Data:      CIFAR-10. 15 % of the training images are held out; calibration uses them, nothing is chosen on the test
           split, which each row reads once, at the end. Images: what --images says (in results.json).
Seed:      0.
Hardware:  one core of a shared x86-64 machine, no GPU.
Time:      an hour and three quarters beside other work (3 + 2 epochs, bf16).
Versions:  in results.json (torch 2.14.1, timm 1.0.31).

Result:    docs/results.md, "DeiT-Tiny on CIFAR-10, part of the data"; the full data: not yet run.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import _common as common
import _training as training
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize.checkpoint import load_tensors, save_tensors
from acmize.cost import count_macs
from acmize.hosts import example_input
from acmize.inputs import logits_of
from acmize.losses import teacher_loss
from acmize.methods.token_merging import set_schedule
from acmize.phases._loop import fit
from acmize.recipe import resolve

BUDGETS = (0.75, 0.5, 0.25)
SIZE = {"img_size": 64, "patch_size": 8}


def pretrained(args: Any) -> Any:
    """DeiT-Tiny, its positions and patches resampled by timm, with a new head of ten classes."""
    dense: Any = common.deit_tiny(args, **SIZE)
    if not args.smoke:
        torch.manual_seed(args.seed)
        dense.reset_classifier(10)
        dense.to(args.device)
    dense.pretrained_cfg = {**dense.pretrained_cfg, "crop_pct": 1.0}
    return dense


def cifar10(args: Any) -> Any:
    """Both splits, the training one cut to --images."""
    if args.smoke:
        return common.photographs(True)
    import datasets

    data = datasets.load_dataset(str(args.data or common.assets() / "data" / "cifar10"))
    count = len(data["train"]) if args.full else min(args.images, len(data["train"]))
    data["train"] = data["train"].select(range(count))
    return data


class Training:
    """What every row trains with: images, steps, seed. A result is kept as safetensors, and loaded when it is there."""

    def __init__(self, args: Any, recipe: Any, bench: common.Bench) -> None:
        self.args, self.recipe, self.bench = args, recipe, bench

    def _loop(self, epochs: int) -> Any:
        train = self.recipe.train
        return self.recipe.loop(epochs=epochs, lr=train.lr, weight_decay=train.weight_decay, warmup=train.warmup)

    def plain(self, name: str, model: nn.Module, epochs: int, teacher: nn.Module | None = None) -> nn.Module:
        """Train a model without gates on labels and, where there is a teacher, its logits."""

        def loss(batch: Any, _step: int) -> dict[str, Tensor]:
            logits = logits_of(model(batch[0]))
            total = F.cross_entropy(logits, batch[1])
            if teacher is not None:
                with torch.no_grad():
                    wanted = logits_of(teacher(batch[0]))
                total = total + self.recipe.losses.teacher * teacher_loss(logits, wanted)
            return {"loss": total}

        return self._kept(name, model, lambda batches, steps, folder: fit(
            name=name, model=model.train(), loss=loss, batches=batches, steps_per_epoch=steps,
            config=self._loop(epochs), checkpoint=folder, resume=True,
        ))  # fmt: skip

    def static(self, dense: nn.Module) -> Any:
        """The adaptive plan from the same start, every token alike, trained like phase 3."""
        path = self.args.output / "models" / "static.safetensors"
        return training.static_(path, self.bench, self.recipe, self.start_of(dense))

    def start_of(self, dense: nn.Module) -> Any:
        """What phase 3 started from: the conversion after distillation."""
        recipe = resolve({**self.recipe.to_dict(), "phases": ("distill", "gates")})
        folder = self.args.output / "models" / "before-finetune"
        return common.converted(folder, dense, self.bench.data, recipe, {} if self.args.smoke else SIZE)

    def _kept(self, name: str, model: nn.Module, run: Any) -> nn.Module:
        folder = self.args.output / "models"
        path = folder / f"{name}.safetensors"
        if not path.exists():
            images = self.bench.images
            run(*images.epochs(images.augmented, self.recipe.seed + 1), folder / "checkpoints")
            save_tensors(path, model.state_dict())
        model.load_state_dict(load_tensors(path))
        return model.eval()


def fewer_blocks(dense: Any, budget: float) -> tuple[nn.Module, float]:
    """Evenly spaced blocks of the dense model, as many as the budget allows, and its share of the MACs."""
    example, whole = example_input(dense), len(dense.blocks)
    for depth in range(whole, 0, -1):
        small = copy.deepcopy(dense)
        kept = torch.linspace(0, whole - 1, depth).round().long().tolist()
        small.blocks = nn.Sequential(*(small.blocks[i] for i in kept))
        ratio = count_macs(small, example) / count_macs(dense, example)
        if ratio <= budget + 0.01:
            break
    return small, ratio


def main() -> None:
    """Train what is missing, print the table."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 (default: that of ACMIZE_ASSETS)")
    parser.add_argument("--images", type=int, default=10_000, help="training images, the held-out ones included")
    parser.add_argument("--full", action="store_true", help="all training images of the folder")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12, help="of phase 3 and of both controls")
    args = parser.parse_args()
    options, budgets = common.start(args, __file__), tuple(args.budgets)
    epochs = (1, 1) if args.smoke else (args.dense_epochs, args.epochs)
    low = min(budgets)
    more = {"budget": low, "budgets": budgets, "gates": {**options.get("gates", {}), "budgets": (low, 0.9)}}
    more |= {"train": {**options.get("train", {}), "lr": 1e-4, "epochs": epochs[1]}}
    more |= {"losses": {"task": 0.25, "entropy": 0.05, "diversity": 0.05, "budgets": (low, 0.95)}}
    recipe, data = resolve(options, {"batch_size": 64} if not args.smoke else {}, more), cifar10(args)
    dense = pretrained(args)
    trained = Training(args, recipe, common.Bench(dense, data, recipe))
    dense = trained.plain("dense", dense, epochs[0])
    bench = trained.bench

    @cache
    def adaptive() -> Any:
        folder, kwargs = args.output / "models" / "adaptive", {} if args.smoke else SIZE
        return common.converted(folder, dense, data, recipe, kwargs)

    static = cache(lambda: trained.static(dense))

    def static_row(budget: float) -> common.Row:
        set_schedule(static(), adaptive().plan.schedule(budget))
        return bench.static(static(), adaptive().plan, budget)

    def small_row(budget: float) -> common.Row:
        model, ratio = fewer_blocks(dense, budget)
        small = trained.plain(f"blocks-{len(model.blocks)}", model, epochs[1], dense)
        return {"budget": budget, "blocks": len(model.blocks), **bench.plain(small, ratio)}

    rows = common.Rows(args, __file__)
    rows.measure("dense", lambda: common.dense_row(bench))
    rows_of = {"adaptive": lambda b: bench.gated(adaptive(), b), "fewer blocks": small_row, "static width": static_row}
    for name, measure in rows_of.items():
        for budget in budgets:
            rows.measure(f"{name} @ {budget:g}", lambda m=measure, b=budget: m(b))
    rows.show(common.columns())


if __name__ == "__main__":
    main()
