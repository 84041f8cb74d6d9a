"""The losses, against values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from acmize.losses import (
    anchored,
    budget_loss,
    classification,
    distillation,
    diversity_loss,
    entropy_loss,
    gamma_deviance,
    teacher_loss,
    threshold_labels,
)


@pytest.mark.parametrize(
    ("errors", "label"),
    [
        ([10.0, 9.5, 9.0, 8.9], 0),  # no learner is worth its work
        ([10.0, 5.0, 4.9, 4.8], 1),
        ([10.0, 5.0, 2.0, 1.9], 2),
        ([10.0, 5.0, 2.0, 1.0], 3),  # every learner is: N, not the "no match" that is mistaken for 0
        ([10.0, 5.0, 4.9, 1.0], 1),  # the first one, though a later one improves again
        ([10.0, 5.0, 2.0, 0.0], 3),  # exact at full width
        ([0.0, 0.0, 0.0, 0.0], 0),
        ([12.0, 10.0, 1.0, 0.1], 3),  # 12 / 10 is tau itself: an improvement by tau is worth it
    ],
)
def test_threshold_labels(errors: list[float], label: int) -> None:
    assert threshold_labels(torch.tensor([errors]), 1.2).tolist() == [label]


def test_classification_is_cross_entropy_on_logits() -> None:
    logits, labels = torch.randn(7, 4, requires_grad=True), torch.randint(0, 4, (7,))
    by_hand = -(logits.softmax(-1)[torch.arange(7), labels]).log().mean()
    torch.testing.assert_close(classification(logits, labels), by_hand)
    assert torch.equal(classification(logits, labels), classification(logits, labels))  # nothing is sampled


def test_distillation() -> None:
    target = torch.tensor([[1.0], [3.0]])  # variance 2
    outputs = torch.tensor([[[9.0], [1.0], [1.0]], [[9.0], [3.0], [1.0]]])  # k = 0, which has no learner, is not scored
    torch.testing.assert_close(distillation(outputs, target), torch.tensor([0.0, 4 / 2 / 2]))


def test_an_error_counts_relative_to_its_start() -> None:
    start = torch.tensor([0.99, 0.0])
    torch.testing.assert_close(anchored(start, start), torch.tensor(0.99 / 2))
    worse_at_full_width = anchored(torch.tensor([0.49, 0.02]), start)  # half of the error at k = 1 for 0.02 at k = 2
    assert worse_at_full_width > anchored(start, start)


def test_gamma_deviance_is_least_at_the_mean() -> None:
    damage = torch.tensor([1e-4, 2.0, 0.0, 6.0])
    eta = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([eta], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = gamma_deviance(eta.expand(4), damage)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(eta.exp().item(), damage.mean().item(), rtol=1e-3, atol=0)


def test_budget() -> None:
    assert budget_loss(torch.tensor([0.2, 0.6]), 0.5).item() == pytest.approx(0.1)
    assert budget_loss(torch.tensor([0.2, 0.6]), 0.3).item() == pytest.approx(0.1)


def test_entropy() -> None:
    one, even = torch.zeros(1, 4, 4), torch.eye(4)[None]
    one[..., 2] = 1
    assert entropy_loss([one]).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy_loss([even]).item() == pytest.approx(-1.0)
    half = torch.eye(4)[None, [0, 0, 3, 3]]
    assert entropy_loss([half]).item() == pytest.approx(-math.log(2) / math.log(4))
    assert entropy_loss([one, even]).item() == pytest.approx(-0.5)
    # within a sample: two samples that each use one choice have no entropy, though together they use two
    apart = torch.stack([torch.eye(2)[[0, 0]], torch.eye(2)[[1, 1]]])
    assert entropy_loss([apart]).item() == pytest.approx(0.0, abs=1e-6)


def test_diversity() -> None:
    assert diversity_loss(torch.tensor([0.4, 0.4])).item() == 0
    assert diversity_loss(torch.tensor([0.0, 1.0])).item() == pytest.approx(
        -0.5
    )  # over all pairs, each with itself too


def test_teacher() -> None:
    logits, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(teacher_loss(logits, teacher), (p * (p / q).log()).sum(-1).mean())
    assert teacher_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert teacher_loss(logits, teacher, temperature=2.0) > 0
