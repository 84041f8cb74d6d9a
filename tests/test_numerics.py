"""Precisions, deterministic mode, batches of one and of none, long sequences, and the two ends of the budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import CONFIG, HOSTS, Random, adapted, images, inputs_for, noisy, vit

from acmize import gates
from acmize.errors import AcmizeError
from acmize.gates import choosing, full_width, set_dial
from acmize.hosts import make_plan
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.ops import use_backend
from acmize.phases.calibrate import Calibration, realised, set_budget
from acmize.recording import AdaptiveModule, record

IMAGE_HOSTS = ("vit", "eva02", "swin", "convnext")


@pytest.fixture(scope="module")
def pair() -> Any:
    dense = vit()
    model, plan = adapted(dense)
    return dense, model.eval(), plan


def by_reference(model: torch.nn.Module, x: torch.Tensor, seed: int) -> torch.Tensor:
    """All the work in float32, then masks, with the choices of a seed."""
    with torch.no_grad(), choosing(model, Random(seed)), use_backend("masked"):
        return model(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.08), (torch.float16, 0.02)], ids=str)
def test_precisions(pair: Any, dtype: torch.dtype | None, tolerance: float) -> None:
    """Against the plain forward in float32, relative to the spread of its outputs."""
    _, model, _ = pair
    x = images(8)
    expected = by_reference(model, x, 3)
    enabled = dtype is not None
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=enabled), choosing(model, Random(3)):
        found = model(x)
    assert expected.std() > 0.01
    assert (found.float() - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1.0)
    if enabled:
        assert not torch.equal(found.float(), expected)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode(pair: Any) -> None:
    """Every path runs where PyTorch refuses what it cannot repeat, and two runs are bit for bit alike."""
    _, model, _ = pair
    x, outputs = images(4), []
    for _ in range(2):
        copied = copy.deepcopy(model).train()
        out = copied(x)
        out.square().mean().backward()
        grads = [p.grad for p in copied.parameters() if p.grad is not None]
        with torch.no_grad(), choosing(copied.eval(), Random(1)):
            outputs.append([copied(x), out.detach(), *grads])
    assert len(outputs[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("host", IMAGE_HOSTS)
def test_a_batch_of_one_and_of_none(host: str) -> None:
    """One sample is what it is among others; none gives what the dense model gives, be it a refusal of timm's."""
    dense = HOSTS[host]()
    model, _ = adapted(dense)
    x = inputs_for(dense, 3)
    set_dial(model.eval(), 0.5)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
        assert together.std() > 0
        torch.testing.assert_close(alone, together, atol=2e-5, rtol=1e-4)
        try:
            expected = dense(x[:0]).shape
        except RuntimeError:
            assert host in ("eva02", "swin")
            return
        assert model(x[:0]).shape == expected == (0, 5)
    with pytest.raises(AcmizeError, match="found 0 samples"), record(model, 0):
        pass


def test_a_very_long_sequence() -> None:
    """4097 tokens: sorted learners against the plain forward; and 65,536 of them through one site."""
    dense = noisy(VisionTransformer(img_size=256, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5))
    plan = make_plan(dense, CONFIG, example=(images(1, size=256),))
    model = convert_(copy.deepcopy(dense), plan).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = images(1, size=256)
    expected = by_reference(model, x, 5)
    with torch.no_grad(), choosing(model, Random(5)):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    site: Any = next(m for m in model.modules() if isinstance(m, AdaptiveModule) and m.names and "mlp" in m.names[0])
    tokens = torch.randn(1, 65_536, 16)
    with torch.no_grad():
        decision = site.decide(tokens)
        torch.testing.assert_close(site(tokens), site.forward_reference(tokens, decision), atol=1e-5, rtol=1e-4)


def test_the_two_ends_of_the_budget(pair: Any) -> None:
    dense, model, plan = pair
    floor, top = plan.budget_range
    calibration = Calibration(budgets=(top, floor), dials=(0.0, 1.0))
    x = images(16)
    with torch.no_grad(), choosing(model, full_width):
        torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)
        full = realised(model, plan, [x])
    assert float(full.mean()) == pytest.approx(top, abs=1e-6)

    def least(gate: gates.Gate, z: torch.Tensor) -> torch.Tensor:
        return torch.full((*z.shape[:-1], gate.groups), gate.min_choice)

    set_budget(model, plan, calibration, max(floor, 0.01))
    with torch.no_grad(), choosing(model, least):
        low = realised(model, plan, [x])
        out = model(x)
    assert float(low.mean()) == pytest.approx(floor, abs=0.02)
    assert out.isfinite().all()
    assert not torch.allclose(out, dense(x), atol=1e-3)
    set_budget(model, plan, calibration, 1.0)
    with torch.no_grad():
        assert model(x).isfinite().all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_primitives_of_no_token_and_of_one(tokens: int) -> None:
    model, _ = adapted(vit(), AcmConfig(num_learners=3, gate_hidden=2))
    sites = [m for m in model.modules() if isinstance(m, AdaptiveModule) and m.names]
    assert len(sites) > 2
    for site in sites:
        x = torch.randn(1, tokens, 32)
        with torch.no_grad():
            decision = site.decide(x)
            out: Any = site(x)
            expected: Any = site.forward_reference(x, decision)
        assert out.shape[:2] == (1, tokens)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
