"""The losses of the three phases, each a few lines.

Shapes: M tokens, N learners, G groups, K = N + 1 choices, O output width, B samples, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from acmize import parallel


def distillation(outputs_MKO: Tensor, target_MO: Tensor) -> Tensor:
    """Squared error of each choice against the dense output (arXiv 2312.10193, sect. 3.3, phase 1): (N,), k = 1..N.

    Relative to the target's own variance, so that layers of different scale weigh alike.
    """
    errors = parallel.mean((outputs_MKO[:, 1:] - target_MO[:, None]).square(), (0, 2))
    return errors / parallel.variance(target_MO.detach()).clamp_min(1e-12)


def anchored(errors_N: Tensor, start_N: Tensor, floor: float = 0.01) -> Tensor:
    """Mean over choices of the error relative to where it started: what was exact at first stays so.

    The plain mean buys a little at small k with the exactness at full width, where the important tokens are.

    Args:
        errors_N: from `distillation`.
        start_N: the same of the learners before training.
        floor: added to the start.
    """
    return (errors_N / (start_N + floor)).mean()


def gamma_deviance(log_damage: Tensor, damage: Tensor, floor: float = 1e-9) -> Tensor:
    """Regression of a positive, long-tailed target with a log link: y exp(-eta) + eta, up to a constant.

    Args:
        log_damage: predictions eta, any shape.
        damage: targets y >= 0, the same shape.
        floor: added to y.

    Returns:
        Mean; least where exp(eta) is the conditional mean of y.
    """
    return ((damage + floor) * (-log_damage).exp() + log_damage).mean()


def threshold_labels(errors_MK: Tensor, tau: float) -> Tensor:
    """The published gate labels: the smallest k after which one more learner improves the error by less than tau.

    Args:
        errors_MK: d(k) = ||h(x, k) - dense(x)|| for k = 0..N.
        tau: improvement factor, > 1.

    Returns:
        (M,) labels in 0..N; N where every learner improves by tau or more. 0 and 1 can occur.
    """
    small = errors_MK[:, :-1] < tau * errors_MK[:, 1:].clamp_min(1e-30)
    found = small.any(1)
    return torch.where(found, small.float().argmax(1), errors_MK.shape[1] - 1)


def classification(logits_MK: Tensor, labels_M: Tensor) -> Tensor:
    """Cross-entropy on the gate's logits (the released code scores a sampled one-hot instead)."""
    return F.cross_entropy(logits_MK, labels_M)


def task_loss(logits: Tensor, labels: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels (B,), -1 unknown, or soft ones (B, C); 0 where nothing is known."""
    if labels is None:  # mixed images whose labels are unknown
        return logits.new_zeros(())
    if labels.dtype.is_floating_point:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    if (labels < 0).all():
        return logits.new_zeros(())
    return F.cross_entropy(logits.float(), labels, ignore_index=-1, label_smoothing=smoothing)


def ctc_loss(logits_BTC: Tensor, frames_B: Tensor, labels_BU: Tensor, blank: int) -> Tensor:
    """CTC a label, mean over the samples whose labels are known; 0 where none are.

    Args:
        logits_BTC: of every frame.
        frames_B: how many frames are real.
        labels_BU: -1 behind the last one; all -1: unknown.
        blank: index of the blank.
    """
    lengths = (labels_BU >= 0).sum(1)
    known = lengths > 0
    if not known.any():
        return logits_BTC.new_zeros(())
    logp_TBC = logits_BTC[known].float().log_softmax(-1).transpose(0, 1)
    labels = labels_BU[known].clamp_min(0)
    return F.ctc_loss(logp_TBC, labels, frames_B[known], lengths[known], blank=blank, zero_infinity=True)


def budget_loss(compute_B: Tensor, budget: float) -> Tensor:
    """L_b = |mean compute fraction - budget| (eq. 6)."""
    return (compute_B.mean() - budget).abs()


def entropy_loss(soft_choices: list[Tensor]) -> Tensor:
    """L_e: minus the normalised entropy of each site's choices within a sample, mean over sites and samples (eq. 7).

    Args:
        soft_choices: a site each, (B, tokens, K) probabilities of the choices (hard forward, soft backward).
    """
    terms = []
    for p in soft_choices:
        mean = p.mean(1).clamp_min(1e-9)
        terms.append((mean * mean.log()).sum(-1) / math.log(p.shape[-1]))
    return torch.stack([t.mean() for t in terms]).mean()


def diversity_loss(compute_B: Tensor) -> Tensor:
    """L_d: minus the mean pairwise difference of the samples' compute fractions (eq. 8)."""
    return -(compute_B[:, None] - compute_B[None]).abs().mean()


def teacher_loss(logits_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """KL from the dense model's class distribution to the adaptive one's, times temperature^2."""
    student = (logits_BC.float() / temperature).log_softmax(-1)
    teacher = (teacher_BC.float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
