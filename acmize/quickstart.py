"""`acmize quickstart`: the whole way offline, on the small ViT of the package and scikit-learn's digits."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize.api import convert
from acmize.cost import evaluating
from acmize.hub import base_of, save_pretrained
from acmize.models import load_model
from acmize.quickstart_model import digits, digits_dataset
from acmize.recipe import resolve
from acmize.timing import Call, draws, interleaved

BUDGETS = (0.9, 0.75, 0.6, 0.5)
BATCH = 256


def run(output: Path) -> dict[str, Any]:
    """Convert, train, calibrate, measure and save.

    Args:
        output: folder for the converted model.

    Returns:
        Results as of `evaluate`, with measured `latency_ms` an image.
    """
    dense = load_model("acmize_vit_digits")
    recipe = resolve(
        {
            "budget": 0.5,
            "budgets": BUDGETS,
            "batch_size": 64,
            "acm": {"gate_hidden": 8},
            "distill": {"epochs": 1},
            "train": {"epochs": 8, "lr": 3e-4, "crop_scale": (0.8, 1.0), "hflip": 0.0},
        }
    )
    model = convert(dense, data=digits_dataset(), recipe=recipe, base=base_of(dense))
    images, _ = digits("test")
    model.results["dense"]["latency_ms"] = latency_ms(dense, images)
    for row in model.results["results"]:
        model.set_budget(row["budget"])
        row["latency_ms"] = latency_ms(model, images)
    model.set_budget(recipe.budget)
    save_pretrained(model, output)
    return model.results


def latency_ms(model: nn.Module, images: Tensor, rounds: int = 15) -> float:
    """Median milliseconds an image in batches of `BATCH` real images, in a new order each round."""
    generator, warmup = torch.Generator().manual_seed(0), 3
    batches = (images[index] for index in draws(len(images), BATCH, rounds + warmup, generator))
    with evaluating(model), torch.inference_mode():
        seconds = interleaved({"model": Call(model)}, batches, warmup=warmup)["model"]
    return 1e3 * statistics.median(seconds) / BATCH
