"""Files are whole or absent, and what cannot be used says which file and what to do."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import acmize.checkpoint as checkpoint
from acmize.errors import AcmizeError


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensors_round_trip_tied_and_strided(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base, "tied": base, "transposed": base.T, "row": base[1], "none": torch.zeros(0, 3),
        "half": base.bfloat16(), "yes": torch.tensor(True), "grad": nn.Parameter(base.clone()),
    }  # fmt: skip
    checkpoint.save_tensors(tmp_path / "new" / "t.safetensors", tensors, {"made": "here"})
    back = checkpoint.load_tensors(tmp_path / "new" / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert names(tmp_path / "new") == {"t.safetensors"}


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_file_has_the_usual_rights(tmp_path):
    checkpoint.save_tensors(tmp_path / "t", {"a": torch.zeros(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_round_trip_and_refusals(tmp_path):
    value = {"a": [1, 2.5, None, "é"]}
    checkpoint.write_json(tmp_path / "v.json", value)
    assert checkpoint.read_json(tmp_path / "v.json") == value
    for bad in (float("nan"), {1, 2}):
        with pytest.raises(AcmizeError, match="expected finite numbers"):
            checkpoint.write_json(tmp_path / "v.json", bad)
    assert checkpoint.read_json(tmp_path / "v.json") == value
    with pytest.raises(AcmizeError, match=r"x: found int, expected a dense tensor"):
        checkpoint.save_tensors(tmp_path / "t", {"x": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("read", [checkpoint.load_tensors, checkpoint.read_json])
def test_missing_and_damaged_files(tmp_path, read):
    with pytest.raises(AcmizeError, match=r"no_such: found nothing, expected .*; check the path"):
        read(tmp_path / "no_such")
    (tmp_path / "bad").write_bytes(b"\xff\xfe{{{{{{{{{{")
    with pytest.raises(AcmizeError, match=r"bad: found .* expected a whole .* file; copy or save it again"):
        read(tmp_path / "bad")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    checkpoint.write_json(tmp_path / "v", 1)
    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(AcmizeError, match=r"No space left on device.*free some space"):
        checkpoint.write_json(tmp_path / "v", 2)
    with pytest.raises(AcmizeError, match=r"No space left on device.*free some space"):
        checkpoint.save_tensors(tmp_path / "v", {"a": torch.zeros(2)})
    assert checkpoint.read_json(tmp_path / "v") == 1
    assert names(tmp_path) == {"v"}


def test_the_full_disk_of_safetensors_is_understood(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(AcmizeError, match=r"No space left on device.*free some space"):
        checkpoint.save_tensors(tmp_path / "t", {})
    assert not names(tmp_path)


def test_atomic_dir_replaces_the_whole_folder(tmp_path):
    for number in (1, 2):
        with checkpoint.atomic_dir(tmp_path / "a" / "d") as new:
            (new / f"file{number}").touch()
    assert names(tmp_path / "a") == {"d"}
    assert names(tmp_path / "a" / "d") == {"file2"}
    (tmp_path / "file").touch()
    with pytest.raises(AcmizeError, match="found a file"), checkpoint.atomic_dir(tmp_path / "file"):
        pass


def test_atomic_dir_keeps_the_old_folder_at_failure(tmp_path, monkeypatch):
    target = tmp_path / "d"
    with checkpoint.atomic_dir(target) as new:
        (new / "old").touch()

    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_dir(target) as new:
        interrupted(new)
    with pytest.raises(AcmizeError, match="free some space"), checkpoint.atomic_dir(target):
        full()

    rename = Path.rename

    def only_the_first(self, to):
        return rename(self, to) if not self.name.endswith(".new") else full()

    monkeypatch.setattr(Path, "rename", only_the_first)  # fails between the two renames
    with pytest.raises(AcmizeError, match="free some space"), checkpoint.atomic_dir(target) as new:
        (new / "half").touch()
    assert names(target) == {"old"}
    assert names(tmp_path) == {"d"}


def test_a_kill_between_the_renames_is_recovered(tmp_path):
    (tmp_path / ".d.old").mkdir()
    (tmp_path / ".d.old" / "kept").touch()
    (tmp_path / ".d.new").mkdir()
    assert checkpoint.recover_dir(tmp_path / "d")
    assert names(tmp_path / "d") == {"kept"}
    with checkpoint.atomic_dir(tmp_path / "d"):
        pass
    assert names(tmp_path) == {"d"}
    assert not checkpoint.recover_dir(tmp_path / "none")


def trained(seed: int, width: int = 3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, width))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_training_state_round_trip(tmp_path):
    model, optimizer = trained(0)
    ema = {"0": torch.ones(2)}
    checkpoint.save_training_state(
        tmp_path / "s", model=model, optimizer=optimizer, step=7, epoch=2, extra={"a": 1}, ema=ema
    )
    drawn = random.random(), np.random.rand(), torch.rand(1)
    other, other_optimizer = trained(1)
    other_ema = {"0": torch.zeros(2)}
    rest = checkpoint.load_training_state(tmp_path / "s", model=other, optimizer=other_optimizer, ema=other_ema)
    assert rest == {"step": 7, "epoch": 2, "extra": {"a": 1}}
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert torch.equal(other_ema["0"], ema["0"])
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index, values in mine["state"].items():
        assert all(torch.equal(values[k], v) for k, v in theirs["state"][index].items())
    assert {p.suffix for p in (tmp_path / "s").iterdir()} == {".json", ".safetensors"}


def test_a_tied_model(tmp_path):
    model, optimizer = trained(0)
    model[2].weight = model[2].weight
    model.add_module("tied", model[2])
    checkpoint.save_training_state(tmp_path, model=model, optimizer=optimizer, step=0, epoch=0, extra={})
    checkpoint.load_training_state(tmp_path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_a_damaged_or_foreign_state_changes_nothing(tmp_path, file):
    model, optimizer = trained(0)
    checkpoint.save_training_state(tmp_path / "s", model=model, optimizer=optimizer, step=7, epoch=2, extra={})
    path = tmp_path / "s" / file
    path.write_bytes(path.read_bytes()[:-20])
    other, other_optimizer = trained(1)
    before = [v.clone() for v in other.state_dict().values()]
    with pytest.raises(AcmizeError, match=f"{file}: found .* expected a whole .*; copy"):
        checkpoint.load_training_state(tmp_path / "s", model=other, optimizer=other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))


def test_a_state_of_another_model_or_optimizer(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training_state(tmp_path / "s", model=model, optimizer=optimizer, step=7, epoch=2, extra={})
    wide, wide_optimizer = trained(0, width=5)
    with pytest.raises(AcmizeError, match=r"model\.safetensors: 0.bias: found \[3\], expected \[5\]; remove"):
        checkpoint.load_training_state(tmp_path / "s", model=wide, optimizer=wide_optimizer)
    for params in (model.parameters(), [*reversed(list(model[0].parameters())), *model[2].parameters()]):
        with pytest.raises(AcmizeError, match="expected the state of this optimizer; remove"):
            checkpoint.load_training_state(tmp_path / "s", model=model, optimizer=torch.optim.AdamW(params))
    state = json.loads((tmp_path / "s" / "state.json").read_text())
    del state["extra"]
    (tmp_path / "s" / "state.json").write_text(json.dumps(state))
    with pytest.raises(AcmizeError, match=r"state\.json: found 'extra'"):
        checkpoint.load_training_state(tmp_path / "s", model=model, optimizer=optimizer)
