"""Names, weights and folders to models; every refusal says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from acmize.errors import AcmizeError
from acmize.models import architecture, load_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def test_the_weights_of_a_file_are_loaded(weights: Path) -> None:
    first, again = load_model("test_vit", weights), load_model("test_vit", weights)
    other = architecture("test_vit")
    assert not first.training
    assert torch.equal(first.state_dict()["blocks.0.mlp.fc1.weight"], again.state_dict()["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(first.state_dict()["head.weight"], other.state_dict()["head.weight"])


def test_an_unknown_model_is_named_with_what_is_close() -> None:
    with pytest.raises(AcmizeError, match=r"found 'deit_tiny_patch99', expected a timm model.*deit_tiny"):
        architecture("deit_tiny_patch99")
    with pytest.raises(AcmizeError, match="list_models"):
        load_model("no_such_thing_at_all")


def test_without_network_the_message_names_weights() -> None:
    with pytest.raises(AcmizeError, match=r"test_vit: its weights could not be had.*--weights FILE"):
        load_model("test_vit")


def test_weights_that_cannot_be_used(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(AcmizeError, match="no such file"):
        load_model("test_vit", tmp_path / "absent.safetensors")
    pickled = tmp_path / "model.pth"
    pickled.write_bytes(b"\x80\x02.")
    with pytest.raises(AcmizeError, match="pickled weights are never read"):
        load_model("test_vit", pickled)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(AcmizeError, match="does not fit test_vit or is damaged"):
        load_model("test_vit", cut)
    with pytest.raises(AcmizeError, match="does not fit test_vit2 or is damaged"):
        load_model("test_vit2", weights)


def test_a_folder_as_timm_saves_it(weights: Path, tmp_path: Path) -> None:
    dense = timm.create_model("test_vit", num_classes=7)
    config = {"architecture": "test_vit", "num_classes": 7, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    model = load_model(str(tmp_path))
    assert torch.equal(model.state_dict()["head.weight"], dense.state_dict()["head.weight"])
    assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert architecture(str(tmp_path)).num_classes == 7


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(AcmizeError, match=r"config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    assert architecture(str(tmp_path)).num_classes == 1000
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "model_args": {"depth": 10**6}}))
    with pytest.raises(AcmizeError, match="far more parameters than 5000 tensors can fill"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(AcmizeError, match=r"model\.safetensors"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "hf-hub:evil/model"}))
    with pytest.raises(AcmizeError, match="expected a timm model"):
        load_model(str(tmp_path))
