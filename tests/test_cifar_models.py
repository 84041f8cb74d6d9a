"""The CIFAR models: sizes as published, known to timm and to the conversion, real weights where they are."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import timm
import torch

import acmize
from acmize.cifar_models import PadShortcut
from acmize.cost import count_macs
from acmize.data import ImageSet, open_images
from acmize.evaluate import top1
from acmize.models import load_model

# parameters in millions as the papers state them (arXiv 1512.03385, table 6), MACs in millions
SIZES = {
    "acmize_resnet20_cifar": (0.27, 40.6),
    "acmize_resnet32_cifar": (0.46, None),
    "acmize_resnet44_cifar": (0.66, None),
    "acmize_resnet56_cifar": (0.85, None),
    "acmize_resnet18_cifar": (11.2, None),
    "acmize_vgg11_cifar": (9.2, None),
    "acmize_fasternet_tiny_cifar": (None, 154.3),
}


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_sizes(name: str) -> None:
    parameters, macs = SIZES[name]
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    count = sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6
    assert parameters is None or abs(count - parameters) <= 0.05 * parameters
    ten = timm.create_model(name).eval()
    assert macs is None or abs(count_macs(ten, x[:1]) / 1e6 - macs) < 0.05
    ten.reset_classifier(3)
    assert ten(x).shape == (2, 3)


def test_half_the_channels_make_the_published_larger_model() -> None:
    half = timm.create_model("acmize_fasternet_tiny_cifar", n_div=2)
    assert abs(count_macs(half, torch.zeros(1, 3, 32, 32)) / 1e6 - 196.8) < 0.05


def test_option_a_shortcut() -> None:
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    y = PadShortcut(2, 4)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[0, 1:3], x[0, :, ::2, ::2])
    assert not y[0, 0].any()
    assert not y[0, 3].any()


@pytest.mark.assets
@torch.no_grad()
def test_given_weights_reach_their_accuracy_before_and_after_insertion(assets: Path) -> None:
    dense = load_model("acmize_resnet20_cifar", assets / "models" / "resnet20_cifar10" / "model.safetensors")
    test = datasets.load_dataset(str(assets / "data" / "cifar10"), split="test").select(range(1000))
    images = ImageSet.of(open_images(datasets.DatasetDict(train=test, test=test)), "test", dense)
    x, labels = (torch.stack(part) for part in zip(*((a, torch.tensor(b)) for a, b in images), strict=True))
    logits = dense(x)
    assert 0.90 < (top1(logits, labels) or 0) < 0.94  # 91.73 % on all 10,000
    plan = acmize.make_plan(dense, acmize.Recipe(method="cosine-gate").config)
    torch.testing.assert_close(acmize.convert_(dense, plan)(x), logits, rtol=0, atol=1e-4)
