"""Phase 1: every learner of every site at once, from inputs and outputs captured from a frozen model.

The layers are independent: each sees the captured input and target of its own place, no gradient crosses a site, so
memory stays that of one site beyond the captured activations and any site could be trained elsewhere.
(arXiv 2312.10193, sect. 3.3: mean over sites and over every k of ||h(x, k) - dense(x)||^2.) Learners made from the
pretrained weights are exact at full width and stay so: each choice's error then counts relative to where it started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize.gates import AdaptiveModule, choosing, full_width
from acmize.inputs import forward
from acmize.layers import Contract
from acmize.losses import anchored, distillation
from acmize.phases._capture import capture, tokens_of
from acmize.phases._loop import FitConfig, History, fit


def distillable(model: nn.Module) -> dict[str, AdaptiveModule]:
    """Sites with something to learn locally: whatever sums learners into an output.

    A rotated q, k or v only leaves dimensions out, so its error is fixed by the rotation.
    """
    adaptive = {path: m for path, m in model.named_modules() if isinstance(m, AdaptiveModule)}
    return {path: m for path, m in adaptive.items() if any(isinstance(part, Contract) for part in m.modules())}


def distill(
    model: nn.Module,
    source: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    *,
    steps_per_epoch: int,
    config: FitConfig,
    tokens: int = 1024,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> History:
    """Train the learners of every site.

    Args:
        model: converted; gates take no part.
        source: frozen model that inputs and targets come from: the dense one (random learners), or a copy of the
            converted one as it comes in, which runs at full width and anchors the errors.
        batches: epoch -> batches of inputs, or of (inputs, labels).
        steps_per_epoch: batches in an epoch.
        config: of the loop.
        tokens: tokens drawn from each batch for each site.
        checkpoint: folder for checkpoints.
        resume: go on from the checkpoint there.

    Returns:
        History; its last log has the error of each site under "site/PATH".
    """
    sites, start = distillable(model), distillable(source)
    source.eval()
    for module in sites.values():
        module.train()
    holders = nn.ModuleList(sites.values())
    parameters = [p for m in holders for n, p in m.named_parameters() if not n.startswith("gate.")]

    def loss(batch: Any, step: int) -> dict[str, Tensor]:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        with torch.no_grad(), choosing(source, full_width), capture(source, list(sites)) as seen:
            forward(source, inputs)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        terms, losses = {}, []
        for path, module in sites.items():
            x, y = tokens_of(module, *seen[path])
            pick = torch.randperm(len(x), generator=generator)[:tokens].to(x.device)
            errors = _errors(module, x[pick], y[pick])
            with torch.no_grad():
                before = [] if path not in start else _errors(start[path], x[pick], y[pick])
            losses += [anchored(*pair) for pair in zip(errors, before, strict=True)] if before else errors
            terms[f"site/{path}"] = torch.stack(errors).mean()
        return {"loss": torch.stack([each.mean() for each in losses]).mean(), **terms}

    return fit(
        name="distill", model=holders, loss=loss, batches=batches, steps_per_epoch=steps_per_epoch, config=config,
        params=parameters, checkpoint=checkpoint, resume=resume,
    )  # fmt: skip


def _errors(module: AdaptiveModule, x: Tensor, y: Tensor) -> list[Tensor]:
    """Errors (N,) of each group of a site."""
    pairs = zip(module.all_choices(x), module.split_output(y), strict=True)  # pyright: ignore[reportCallIssue]
    return [distillation(outputs, target) for outputs, target in pairs]
