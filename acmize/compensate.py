"""Closed-form compensation: what a token leaves out is replaced by its mean among tokens that made the same choice.

With the gates on, tokens that run few learners are not like the rest, so the mean of what they leave out differs
from the mean over all tokens that `init_` starts from. For every site that sums learners and every choice k,

    table(k) = dense bias + W[:, left out] E[h_left_out | choice = k]

which is the least-squares constant of a ridge regression of the dense output on the kept units with the shared weights
held fixed: those stay exact at full width. The mean is shrunk to that of all tokens by `shrink` pseudo-tokens.
Statistics are taken from the gated model itself, so errors of earlier layers are part of them.

Shapes: M tokens, U hidden units (over heads), O output width, N learners.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.adaptive import AcmMlp, AcmOut
from acmize.cost import evaluating
from acmize.decision import Decision
from acmize.inputs import Batch, forward
from acmize.layers import Contract
from acmize.ops import unit_mask
from acmize.recording import AdaptiveModule, record


@dataclass
class _Sums:
    total: Tensor  # (N + 1, U) hidden activations summed by choice
    count: Tensor  # (N + 1,)

    def add(self, h_MU: Tensor, choice_M: Tensor) -> None:
        self.total.index_add_(0, choice_M, h_MU.to(self.total))
        self.count += torch.bincount(choice_M, minlength=len(self.count)).to(self.count)


@torch.no_grad()
def compensate_(model: nn.Module, batches: Iterable[Batch], shrink: float = 200.0) -> None:
    """Refit the biases of every contraction in place; full width stays as it is.

    Args:
        model: converted, gates fitted; each batch is run as the gates stand when it is drawn.
        batches: inputs, without labels.
        shrink: pseudo-tokens of the mean over all tokens.
    """
    sites = {m: _contraction(m) for m in model.modules() if isinstance(m, AcmMlp | AcmOut)}
    sums = {m: _empty(fc) for m, fc in sites.items()}
    inputs: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for m in sites]
    try:
        with evaluating(model):
            for batch in parallel.spread(batches):
                with record(model, len(batch), keep_inputs=True) as seen:
                    forward(model, batch)
                own = {module: decision for module, _, decision in seen.seen}
                for module in sites:
                    h, decision = _hidden(module, inputs[module], own)
                    real = slice(None) if decision.valid is None else decision.valid.flatten()
                    sums[module].add(h.flatten(0, -2)[real], decision.choice.flatten()[real])
    finally:
        for handle in handles:
            handle.remove()
    parallel.total_(each for own in sums.values() for each in (own.total, own.count))
    for module, fc in sites.items():
        _refit(fc, sums[module], shrink)


def _contraction(module: AcmMlp | AcmOut) -> Contract:
    return module.fc2 if isinstance(module, AcmMlp) else module.fc


def _empty(fc: Contract) -> _Sums:
    rows = len(fc.bounds)
    device = fc.weight.device
    return _Sums(torch.zeros(rows, fc.in_features, device=device), torch.zeros(rows, device=device))


def _hidden(module: AcmMlp | AcmOut, x: Tensor, own: dict[AdaptiveModule, Decision]) -> tuple[Tensor, Decision]:
    """What the contraction reads, whole, and the decision for it."""
    if isinstance(module, AcmMlp):
        return module.hidden(module.tokens(x)), own[module].group(0)
    decision = own[module] if module.link is None else module.link.read()
    return x, decision.group(module.group)


def _refit(fc: Contract, sums: _Sums, shrink: float) -> None:
    if sums.count.sum() == 0:
        return
    overall = sums.total.sum(0) / sums.count.sum()
    mean = (sums.total + shrink * overall) / (sums.count + shrink)[:, None]
    num = len(fc.bounds) - 1
    keep = torch.arange(num, device=mean.device) < torch.arange(num + 1, device=mean.device)[:, None]
    left_out = ~unit_mask(keep, fc.bounds).repeat(1, fc.heads)  # units of a head, for every head
    table = fc.table()[-1] + (mean * left_out).to(fc.weight) @ fc.weight.T
    fc.bias.copy_(table[0])
    fc.learner_bias.copy_(table[1:] - table[:-1])
