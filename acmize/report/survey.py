"""What a report shows of a model on real images: choices of every site, cost of every image, and where it fails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from acmize.api import answers_of
from acmize.cost import evaluating
from acmize.data import data_config
from acmize.evaluate import Reference, answers, top1
from acmize.images import Batches, images_to_test
from acmize.report.maps import compute_maps, map_grid

EXAMPLES, EXTREMES, FAILURES = 6, 6, 12
BATCH = 32
LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LARGEST_SIDE = 224  # pixels of a picture


def survey(
    model: Any, data: Any, budgets: Sequence[float], *, dense: Any = None, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Run a model over test images at each budget; it is left at the last one.

    Args:
        model: adaptive, of images.
        data: anything `datasets.load_dataset` opens.
        budgets: to run it at.
        dense: the dense model; without it the adaptive one at full width stands for it.
        limit: images at most.
        seed: of the choice of those.

    Returns:
        JSON values. "samples", "split", "dense_is", "dense_accuracy"; "levels": for each budget macs_ratio, accuracy,
        agreement, histograms (one a plan entry), lost (images that the dense model alone has right) and gained (the
        adaptive one alone), failures (the pictures among the lost); "grid" of the maps, or None; "pictures": source,
        names, and for each budget its cost, guess and maps; "examples", "dearest" and "cheapest": indices of pictures.

    Raises:
        AcmizeError: data that cannot be opened or does not fit the model.
    """
    images, which, splits = images_to_test(data, model, limit=limit, seed=seed)
    batches = Batches(images, BATCH, next(model.parameters()).device)
    known = answers_of(model, dense, batches)
    levels = [_level(model, batches, known, budget) for budget in budgets]
    cost = torch.stack([level.pop("cost") for level in levels])  # (budgets, N)
    guess = torch.stack([level.pop("guess") for level in levels])
    lost = torch.stack([level.pop("is_lost") for level in levels])
    chosen = _chosen(cost.mean(0), lost)
    order = sorted({n for group in chosen.values() for n in group})
    place = {n: i for i, n in enumerate(order)}
    for level, row in zip(levels, lost, strict=True):
        level["failures"] = [place[n] for n in chosen["failures"] if row[n]]
    names = _class_names(model, splits, which)
    pictures = [
        {
            "source": picture(images[n][0], data_config(model)),
            "label": names(int(known.labels[n])),
            "dense": names(int(known.logits[n].argmax())),
            "guess": [names(int(g)) for g in guess[:, n]],
            "cost": [round(c, 4) for c in cost[:, n].tolist()],
        }
        for n in order
    ]
    grid = _add_maps(model, torch.stack([images[n][0] for n in order]), budgets, pictures)
    return {
        "samples": len(known),
        "split": which,
        "dense_is": "base weights" if dense is not None else "full width",
        "dense_accuracy": known.accuracy,
        "levels": levels,
        "grid": grid,
        "pictures": pictures,
        **{name: [place[n] for n in chosen[name]] for name in ("examples", "dearest", "cheapest")},
    }


def _level(model: Any, batches: Batches, known: Reference, budget: float) -> dict[str, Any]:
    """All images at one budget: what is summed for the page, and `cost`, `guess` and `is_lost` (N,) of each image."""
    model.set_budget(budget)
    found = answers(model, model.plan, batches)
    guess, dense = found.logits.argmax(-1), known.logits.argmax(-1)
    right, was_right = guess == known.labels, dense == known.labels
    return {
        "budget": budget,
        "macs_ratio": found.executed.mean().item(),
        "accuracy": top1(found.logits, known.labels),
        "agreement": (guess == dense).double().mean().item(),
        "histograms": [found.choices[e.fqn].tolist() for e in model.plan.entries],
        "lost": int((was_right & ~right).sum()),
        "gained": int((right & ~was_right & (known.labels >= 0)).sum()),
        "cost": found.executed,
        "guess": guess,
        "is_lost": was_right & ~right,
    }


def _chosen(cost_N: Tensor, lost_LN: Tensor) -> dict[str, list[int]]:
    """Which images are shown: some from all over the set, the dearest and cheapest, those lost at most budgets."""
    count = len(cost_N)
    spread = torch.linspace(0, count - 1, min(EXAMPLES, count)).round().int().tolist()
    order = cost_N.argsort(descending=True, stable=True).tolist()
    times = lost_LN.sum(0)
    failures = times.argsort(descending=True, stable=True)[:FAILURES].tolist()
    half = min(EXTREMES, count // 2)
    return {
        "examples": spread,
        "dearest": order[:half],
        "cheapest": order[::-1][:half],
        "failures": [n for n in failures if times[n]],
    }


def _class_names(model: Any, splits: Any, which: Any) -> Any:
    """Class index -> what to call it: as the data says, else as ImageNet does; "" where it is unknown (-1)."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    feature = splits.split(which).features.get(splits.label_column)
    names = getattr(feature, "names", None)
    subset = infer_imagenet_subset(model) if names is None else None
    info = ImageNetInfo(subset) if subset else None

    def name(index: int) -> str:
        if index < 0:
            return ""
        if info is not None:
            return info.index_to_description(index)
        return names[index] if names is not None and index < len(names) else f"class {index}"

    return name


def _add_maps(
    model: Any, x: Tensor, budgets: Sequence[float], pictures: list[dict[str, Any]]
) -> tuple[int, int] | None:
    """Give each picture "maps" and, where tokens merge, "sizes", for each budget as of `levels`; returns their grid."""
    grid = map_grid(model)
    if grid is None:
        return None
    for made in pictures:
        made |= {"maps": [], "sizes": []}
    for budget in budgets:
        model.set_budget(budget)
        with evaluating(model):
            parts = [compute_maps(model, part.to(next(model.parameters()).device), grid) for part in x.split(BATCH)]
        for number, made in enumerate(pictures):
            spent, sizes = parts[number // BATCH]
            made["maps"].append(levels_of(spent[number % BATCH]))
            if sizes is not None:
                made["sizes"].append(levels_of(sizes[number % BATCH] / 63))
    return grid


def levels_of(values: Tensor) -> str:
    """Numbers in [0, 1] as one letter of 64 each, larger ones as the last: a map in a few hundred bytes."""
    return "".join(LEVELS[i] for i in (63 * values.flatten()).round().clamp(0, 63).int().tolist())


def picture(x_CHW: Tensor, config: dict[str, Any]) -> str:
    """A model's input as the image it was made of: a data URI, JPEG, or PNG where pixels are few enough to be seen."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = ((x_CHW.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    array = (pixels[0] if len(pixels) == 1 else pixels.movedim(0, -1)).numpy()
    image, buffer = Image.fromarray(array), io.BytesIO()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    kind = "PNG" if max(image.size) <= 64 else "JPEG"
    image.save(buffer, kind, **({} if kind == "PNG" else {"quality": 75, "optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


__all__ = ["levels_of", "picture", "survey"]
