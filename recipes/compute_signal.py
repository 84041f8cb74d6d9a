"""Compute as a signal: does what the gates spend on a photograph say how hard, or how strange, it is?

Command:   python recipes/compute_signal.py --model out --output runs/compute_signal
           python recipes/compute_signal.py --smoke            the digits model, under a minute
Shows:     for each budget and each score, higher = harder or stranger:
             compute       share of the dense MACs that the photograph took (`with_compute`)
             confidence    1 - largest softmax probability of the adaptive model's own answer
             token norm    minus the mean L2 norm of the tokens behind the last block
           three questions:
             rank correlation (Spearman) with the dense model's cross-entropy on the label
             AUROC for the adaptive model being wrong
             AUROC for telling corrupted photographs from clean ones: Gaussian noise (standard deviation .3 of the
             pixels' range), Gaussian blur (a thirty-second of the side), a constant (each photograph's mean colour)
           0.5 is chance; below it the score points the other way. The standard error is that of 500 bootstrap draws.
           Directions were fixed beforehand, nothing is fitted.
Data:      the 600 test photographs of imagenet_mini of ACMIZE_ASSETS, or --limit of them.
Seed:      0 (noise, bootstrap).
Hardware:  one core of a shared x86-64 machine, no GPU.
Time:      about 10 minutes on one core, beside other work.
Versions:  in results.json.

Result:    docs/signal.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from acmize.data import data_config
from acmize.recipe import resolve

BUDGETS = (0.75, 0.5)
SCORES = ("compute", "confidence", "token norm")
NOISE = 0.3
DRAWS = 500
Scores = dict[str, Tensor]
Corrupt = Callable[[Tensor], Tensor]


def corruptions(model: Any, seed: int) -> dict[str, Corrupt]:
    """Name -> what is done to a batch of inputs (B, C, H, W); "clean" does nothing."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    generator = torch.Generator().manual_seed(seed)

    def noise(x: Tensor) -> Tensor:
        pixels = x * std + mean
        return ((pixels + NOISE * torch.randn(x.shape, generator=generator)).clamp(0, 1) - mean) / std

    def blur(x: Tensor) -> Tensor:
        sigma = x.shape[-1] / 32
        return gaussian_blur(x, 2 * round(2 * sigma) + 1, sigma)

    def constant(x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True).expand_as(x).contiguous()

    return {"clean": lambda x: x, "noise": noise, "blur": blur, "constant": constant}


@torch.no_grad()
def scored(model: Any, batches: Any, corrupt: Corrupt) -> tuple[Scores, Tensor]:
    """Score -> (N,) of all photographs, higher = harder or stranger; and the logits (N, C)."""
    norms: list[Tensor] = []
    logits, spent = [], []
    handle = model.norm.register_forward_pre_hook(lambda _m, args: norms.append(args[0].norm(dim=-1).mean(1)))
    try:
        for x, _ in batches:
            output, share = model.with_compute(corrupt(x))
            logits.append(output)
            spent.append(share)
    finally:
        handle.remove()
    out = torch.cat(logits).float()
    doubt = 1 - out.softmax(-1).amax(-1)
    return dict(zip(SCORES, (torch.cat(spent), doubt, -torch.cat(norms)), strict=True)), out


def auroc(negative: Tensor, positive: Tensor, seed: int) -> list[float] | None:
    """Area under the curve of telling the positives by a higher score, with its bootstrap standard error, or None."""
    truth = np.r_[np.zeros(len(negative)), np.ones(len(positive))]
    score = torch.cat([negative, positive]).double().numpy()
    if not 0 < truth.sum() < len(truth):
        return None
    generator = np.random.default_rng(seed)
    areas = []
    while len(areas) < DRAWS:
        drawn = generator.integers(len(truth), size=len(truth))
        if 0 < truth[drawn].sum() < len(truth):
            areas.append(roc_auc_score(truth[drawn], score[drawn]))
    return [float(roc_auc_score(truth, score)), float(np.std(areas))]


def measured(model: Any, bench: common.Bench, budget: float, seed: int) -> dict[str, common.Row]:
    """Score -> its row at a budget."""
    model.set_budget(budget)
    labels = bench.dense.labels
    loss = F.cross_entropy(bench.dense.logits, labels, reduction="none")
    found = {name: scored(model, bench.test, corrupt) for name, corrupt in corruptions(model, seed).items()}
    clean, logits = found.pop("clean")
    wrong = logits.argmax(-1) != labels
    return {
        name: {
            "budget": budget,
            "macs_ratio": clean["compute"].mean().item(),
            "mean": score.mean().item(),
            "std": score.std().item(),
            "wrong": int(wrong.sum()),
            "loss": float(spearmanr(score.numpy(), loss.numpy()).statistic) if score.std() > 0 else 0.0,
            "errors": auroc(score[~wrong], score[wrong], seed),
            **{kind: auroc(score, scores[name], seed) for kind, (scores, _) in found.items()},
            "means": {kind: scores[name].mean().item() for kind, (scores, _) in found.items()},
        }
        for name, score in clean.items()
    }


def main() -> None:
    """Run every budget, print the table."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--model", type=Path, help="folder of a converted ViT")
    args = parser.parse_args()
    options = {**common.start(args, __file__), "phases": (), "budgets": tuple(args.budgets)}
    dense, data, recipe = common.deit_tiny(args), common.photographs(args.smoke), resolve(options)
    folder = args.model or args.output / "models" / "label-free"
    model = common.converted(folder, dense, data, recipe).eval()
    bench, rows = common.Bench(dense, data, recipe), common.Rows(args, __file__)
    measure = cache(lambda budget: measured(model, bench, budget, args.seed))  # all scores of a budget in one go
    for budget in args.budgets:
        for name in SCORES:
            rows.measure(f"{name} @ {budget:g}", lambda n=name, b=budget: measure(b)[n])

    def area(key: str) -> Callable[[str, common.Row], str]:
        return lambda _, r: f"{r[key][0]:.3f} ± {r[key][1]:.3f}" if r[key] else "-"

    rows.show(
        {
            "score": lambda key, _: key.split(" @ ")[0],
            "budget": lambda _, r: f"{r['budget']:g}",
            "MACs": lambda _, r: f"{r['macs_ratio']:.3f}",
            "mean ± std": lambda _, r: f"{r['mean']:.3f} ± {r['std']:.3f}",
            "loss (Spearman)": lambda _, r: f"{r['loss']:+.3f}",
            **{name: area(name) for name in ("errors", "noise", "blur", "constant")},
        }
    )


if __name__ == "__main__":
    main()
