"""Phase 1: every learner of every site at once, from inputs and outputs captured from a frozen model.

The layers are independent: each sees the captured input and target of its own place, no gradient crosses a site, so
memory stays that of one site beyond the captured activations and any site could be trained elsewhere.
(arXiv 2312.10193, sect. 3.3: mean over sites and over every k of ||h(x, k) - dense(x)||^2.) Learners made from the
pretrained weights are exact at full width and stay so: each choice's error then counts relative to where it started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.errors import AcmizeError
from acmize.gates import choosing, full_width
from acmize.inputs import forward
from acmize.layers import Contract
from acmize.losses import anchored, distillation
from acmize.phases._capture import capture, tokens_of
from acmize.phases._loop import FitConfig, History, fit
from acmize.recording import AdaptiveModule


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
    by_site: bool = False,
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
        by_site: with several processes, each learns some of the sites, from the tokens of all (see `docs/scale.md`);
            otherwise all learn every site.
        checkpoint: folder for checkpoints.
        resume: go on from the checkpoint there.

    Returns:
        History; its last log has the error of each site under "site/PATH".
    """
    sites, start = distillable(model), distillable(source)
    source.eval()
    for module in sites.values():
        module.train()
    owner = dict.fromkeys(sites, parallel.rank())
    if apart := by_site and parallel.processes() > 1:
        if len(sites) < parallel.processes():
            found = f"{len(sites)} sites for {parallel.processes()} processes"
            raise AcmizeError(f"distill: found {found}, expected one a process; start fewer, or divide by samples")
        costs = [sum(p.numel() for p in m.parameters()) for m in sites.values()]  # of products: MACs a token
        owner = dict(zip(sites, parallel.owners(costs), strict=True))
    holders = nn.ModuleList(m for path, m in sites.items() if owner[path] == parallel.rank())
    parameters = [p for m in holders for n, p in m.named_parameters() if not n.startswith("gate.")]

    def picked(rows: parallel.Rows, step: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Site -> inputs and outputs of the tokens that are learned from, where it is learned."""
        with rows.counted() as batch:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            with torch.no_grad(), choosing(source, full_width), capture(source, list(sites)) as seen:
                forward(source, inputs)
            pairs = {path: tokens_of(module, *seen.pop(path)) for path, module in sites.items()}
            lengths = [len(x) for x, _ in pairs.values()]
            places = parallel.offsets(lengths, inputs.device)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            for (path, (x, y)), length, (before, everything) in zip(pairs.items(), lengths, places, strict=True):
                pick = torch.randperm(everything, generator=generator)[:tokens]
                own = parallel.places(pick, before, length)[0].to(x.device)
                x, y = x[own], y[own]
                if apart:
                    x, y = parallel.to_owner(x, owner[path]), parallel.to_owner(y, owner[path])
                if x is not None and y is not None:
                    yield path, x, y

    def loss(rows: parallel.Rows, step: int) -> dict[str, Tensor]:
        terms, losses = {f"site/{path}": torch.zeros((), device=parameters[0].device) for path in sites}, []
        for path, x, y in picked(rows, step):
            with parallel.apart() if apart else nullcontext():
                errors = _errors(sites[path], x, y)
                with torch.no_grad():
                    before = [] if path not in start else _errors(start[path], x, y)
            losses += [anchored(*pair) for pair in zip(errors, before, strict=True)] if before else errors
            terms[f"site/{path}"] = torch.stack(errors).mean()
        total, count = torch.stack([each.mean() for each in losses]).sum(), torch.tensor(float(len(losses)))
        if apart:
            terms = {name: parallel.total(term.detach()) for name, term in terms.items()}
            total, count = parallel.total(total), parallel.total(count)
        return {"loss": total / count, **terms}

    share = f"-{parallel.rank()}-of-{parallel.processes()}" if apart else ""
    history = fit(
        name=f"distill{share}", model=holders, loss=loss, batches=lambda epoch: parallel.in_step(batches(epoch)),
        steps_per_epoch=steps_per_epoch, config=config, params=parameters, checkpoint=checkpoint, resume=resume,
        apart=apart,
    )  # fmt: skip
    if apart:
        for path, module in sites.items():
            parallel.from_owner_(module, owner[path])
    return history


def _errors(module: AdaptiveModule, x: Tensor, y: Tensor) -> list[Tensor]:
    """Errors (N,) of each group of a site."""
    pairs = zip(module.all_choices(x), module.split_output(y), strict=True)  # pyright: ignore[reportCallIssue]
    return [distillation(outputs, target) for outputs, target in pairs]
