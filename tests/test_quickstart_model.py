"""The packaged digits model: weights, split, and that timm's preprocessing changes nothing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from acmize.quickstart_model import WEIGHTS, Split, _digits_uint8, digits, digits_dataset

pytest.importorskip("sklearn")

ACCURACY_FLOOR = 0.98  # the recipe's figure less a margin for other CPUs' rounding


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Return the model with the packaged weights."""
    return timm.create_model("acmize_vit_digits", pretrained=True).eval()


@torch.inference_mode()
def _logits(model: torch.nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in x_BCHW.split(128)])


def test_packaged_weights_are_small_fp16_and_loaded_as_fp32(model: torch.nn.Module) -> None:
    """The file is fp16 and small; loading it gives exactly its values in fp32."""
    assert WEIGHTS.stat().st_size < 1_500_000
    with safe_open(WEIGHTS, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float16
        assert loaded[name].dtype == torch.float32
        assert torch.equal(tensor.float(), loaded[name])


def test_without_pretrained_the_weights_are_random(model: torch.nn.Module) -> None:
    """`pretrained=False` does not load the file."""
    fresh = timm.create_model("acmize_vit_digits")
    assert not torch.equal(fresh.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_another_head_can_be_asked_for() -> None:
    """Another number of classes replaces the classifier, as for timm's own models."""
    other = timm.create_model("acmize_vit_digits", pretrained=True, num_classes=3).eval()
    assert other(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_accuracy_on_test(model: torch.nn.Module) -> None:
    """The weights are those that the recipe reports."""
    images_NCHW, labels_N = digits("test")
    correct = (_logits(model, images_NCHW).argmax(1) == labels_N).float().mean().item()
    assert correct >= ACCURACY_FLOOR


def test_split_is_disjoint_stratified_and_complete() -> None:
    """No image is in both splits; each class is split 2:1."""
    (train, train_labels), (test, test_labels) = _digits_uint8("train"), _digits_uint8("test")
    assert (len(train), len(test)) == (1195, 602)
    train_set, test_set = ({image.tobytes() for image in part} for part in (train, test))
    assert not train_set & test_set
    per_class = np.bincount(train_labels) / np.bincount(test_labels)
    np.testing.assert_allclose(per_class, 2, atol=0.06)


@pytest.mark.parametrize(("split", "digest"), [("train", "f8496376d623f013"), ("test", "fea83b57716c2056")])
def test_split_is_always_the_same(split: Split, digest: str) -> None:
    """The split does not depend on library versions."""
    images_NHW, labels_N = _digits_uint8(split)
    assert hashlib.sha256(images_NHW.tobytes() + labels_N.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_normalised_training_pixels_are_standard() -> None:
    """`MEAN` and `STD` are those of the training split."""
    images_NCHW, labels_N = digits("train")
    assert images_NCHW.shape == (1195, 1, 8, 8)
    assert (images_NCHW.dtype, labels_N.dtype) == (torch.float32, torch.int64)
    assert abs(images_NCHW.mean().item()) < 1e-3
    assert abs(images_NCHW.std().item() - 1) < 1e-3


def test_unknown_split_is_refused() -> None:
    """A misspelled split is an error, not an empty set."""
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        digits("validation")  # pyright: ignore[reportArgumentType]


def test_timm_path_equals_tensor_path(model: torch.nn.Module) -> None:
    """PIL images through timm's own transform give the tensors of `digits`."""
    dataset = digits_dataset()
    assert set(dataset) == {"train", "test"}
    rows = dataset["test"]
    assert (rows[0]["image"].mode, rows[0]["image"].size) == ("L", (8, 8))
    transform = create_transform(**resolve_data_config({}, model=model))
    assert callable(transform)
    through_timm = torch.stack([torch.as_tensor(transform(image)) for image in rows["image"]])
    images_NCHW, labels_N = digits("test")
    torch.testing.assert_close(through_timm, images_NCHW, rtol=0, atol=1e-6)
    assert list(rows["label"]) == labels_N.tolist()
    assert torch.equal(_logits(model, through_timm).argmax(1), _logits(model, images_NCHW).argmax(1))
