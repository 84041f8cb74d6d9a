"""Saving, loading, publishing; and every way in which a folder can be damaged or tampered with."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from short import converted, same_state
from torch import nn

from acmize.after import after
from acmize.errors import AcmizeError
from acmize.hosts import make_plan
from acmize.hub import Adaptive, base_of, from_pretrained, make_adaptive, save_pretrained
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.models import load_model
from acmize.phases.calibrate import Calibration
from acmize.quickstart_model import digits

FILES = {"README.md", "config.json", "model.safetensors", "plan.json", "recipe.json", "results.json"}


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": []})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return digits("test")[0][:32]


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(model, tmp_path_factory.mktemp("hub") / "saved")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.75, 0.6, 1.0])
def test_outputs_are_bitwise_the_same(model: Any, saved: Path, images: torch.Tensor, budget: float) -> None:
    loaded = from_pretrained(saved)
    assert not loaded.training
    loaded.set_budget(budget)
    mine = copy.deepcopy(model)
    mine.set_budget(budget)
    with torch.no_grad():
        assert torch.equal(loaded(images), mine(images))
    assert (loaded.plan, loaded.calibration) == (mine.plan, mine.calibration)
    assert loaded.results == json.loads(json.dumps(mine.results))


def test_it_comes_at_the_budget_it_was_saved_with(model: Any, saved: Path, images: torch.Tensor) -> None:
    loaded = from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        loaded.set_budget(0.95)
        assert not torch.equal(loaded(images), model(images))


def test_a_new_process_needs_neither_network_nor_data_nor_weights(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    code = (
        "import socket, acmize, torch\n"
        "def no(*a): raise OSError('network')\n"
        "socket.socket.connect = no\n"
        "m = acmize.from_pretrained('m'); m.set_budget(0.6)\n"
        "print(tuple(m(torch.zeros(2, 1, 8, 8)).shape), isinstance(m, __import__('timm').models.VisionTransformer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "(2, 10) True", done.stderr


AUTO = "from transformers import AutoModelForImageClassification as Auto"
LOADERS = {
    "timm": "import acmize, timm; m = timm.create_model('local-dir:m', pretrained=True)",
    "transformers first": f"{AUTO}; import acmize; m = Auto.from_pretrained('m')",
    "transformers last": f"import acmize; {AUTO}; m = Auto.from_pretrained('m')",
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_new_process_loads_it_by_the_library_of_its_base(
    model: Any, saved: Path, images: torch.Tensor, tmp_path: Path, loader: str
) -> None:
    shutil.copytree(saved, tmp_path / "m")
    code = (
        f"{LOADERS[loader]}\n"
        "import torch; from acmize.quickstart_model import digits\n"
        "torch.set_num_threads(1); m.set_budget(0.6)\n"
        "with torch.no_grad(): y = m(digits('test')[0][:32])\n"
        "y = getattr(y, 'logits', y)\n"
        "print(m.training, y.double().numpy().tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    training, bits = done.stdout.split()
    mine = copy.deepcopy(model)
    mine.set_budget(0.6)
    with torch.no_grad():
        assert bytes.fromhex(bits) == mine(images).double().numpy().tobytes()
    assert training == "False"


def test_by_transformers_it_has_a_loss_and_is_saved_as_ever(saved: Path, images: torch.Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    loaded: Any = AutoModelForImageClassification.from_pretrained(saved)
    labels = torch.arange(len(images)) % 10
    out = loaded(images, labels=labels)
    assert torch.equal(out.loss, nn.functional.cross_entropy(out.logits, labels))
    assert loaded.config.num_labels == 10
    loaded.save_pretrained(tmp_path / "again")
    assert (saved / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_timm_takes_no_options_for_it(saved: Path) -> None:
    with pytest.raises(AcmizeError, match=r"drop_rate: found an option, expected none; convert"):
        timm.create_model(f"local-dir:{saved}", drop_rate=0.1)
    with pytest.raises(AcmizeError, match="found no source"):
        timm.create_model("acmize_adaptive")


def test_a_converted_model_is_not_converted_again(saved: Path) -> None:
    with pytest.raises(AcmizeError, match="is converted already; give the dense model"):
        load_model(str(saved))


def test_after_waits_for_a_module_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("first_one", ""), ("second_one", "import first_one; first_one.seen = True")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    after("first_one", then="second_one")
    assert "second_one" not in sys.modules
    import first_one  # pyright: ignore[reportMissingImports]

    assert first_one.seen
    assert sys.meta_path == before
    del sys.modules["second_one"], first_one.seen
    after("first_one", then="second_one")
    assert first_one.seen


def test_deepcopies_are_independent(model: Any, images: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    assert isinstance(twin, Adaptive)
    assert isinstance(twin, type(load_model("acmize_vit_digits")))
    before = model(images)
    assert torch.equal(twin(images), before)
    twin.set_budget(0.9)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert torch.equal(model(images), before)


def test_state_dict_round_trip(model: Any, saved: Path, images: torch.Tensor) -> None:
    other = from_pretrained(saved)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert not same_state(model, other)
    other.load_state_dict(model.state_dict())
    assert same_state(model, other)
    assert torch.equal(other(images), model(images))


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    again = from_pretrained(saved).save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (saved / name).read_bytes() == (again / name).read_bytes(), name


class Net(nn.Module):
    """A module that timm does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    dense, x = Outer(), torch.randn(3, 7, 32)
    plan = make_plan(
        dense, AcmConfig(num_learners=2, gate_hidden=2), target_modules=("net:mlp(fc1,fc2)",), example=(x[:1],)
    )
    calibration = Calibration(dials=(0.0,), budgets=(1.0,))
    made = make_adaptive(convert_(copy.deepcopy(dense), plan), plan, calibration, base_of(dense))
    made.eval().save_pretrained(tmp_path / "net")
    with pytest.raises(AcmizeError, match=r"'Outer' is not of timm; .*model=\.\.\."):
        from_pretrained(tmp_path / "net")
    loaded = from_pretrained(tmp_path / "net", model=Outer())
    assert torch.equal(loaded(x), made(x))
    with pytest.raises(AcmizeError, match="not in this Linear"):
        from_pretrained(tmp_path / "net", model=nn.Linear(2, 2))


def test_the_size_a_model_was_built_with_is_kept() -> None:
    base = base_of(timm.create_model("test_vit", img_size=96, in_chans=1, num_classes=3))
    assert base["kwargs"] == {"img_size": [96, 96], "in_chans": 1, "num_classes": 3}


# --- what lies in the folder ----------------------------------------------------------------------------------


def test_only_safetensors_json_and_the_card_readable_by_all(model: Any, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = save_pretrained(model, tmp_path / "new" / "model")
    finally:
        os.umask(before)
    assert {p.name for p in folder.iterdir()} == FILES
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_the_model_card(saved: Path, model: Any) -> None:
    card = (saved / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "acmize"
    assert meta["base_model"] == "timm/acmize_vit_digits"
    assert meta["license"] == "apache-2.0"
    assert 'acmize.from_pretrained("' in body
    assert "model.set_budget(" in body
    for row in model.results["results"]:
        assert f"| {row['budget']:g} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.1f} |" in body
    assert f"Measured on {model.results['samples']} " in body


def test_an_old_model_is_replaced_and_what_is_not_ours_is_kept(model: Any, folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "report.html").write_text("mine")
    (folder / "results.json").write_text("{}")
    save_pretrained(model, folder)
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    assert (folder / "report.html").read_text() == "mine"
    assert json.loads((folder / "results.json").read_text())["results"]


def test_other_folders_are_never_replaced(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(AcmizeError, match="is not a saved acmize model; choose another folder"):
        save_pretrained(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "x"
    with pytest.raises(AcmizeError, match="is a file"):
        save_pretrained(model, tmp_path / "thesis" / "chapter1.tex")
    with pytest.raises(AcmizeError, match="choose another"):
        save_pretrained(model, tmp_path / "thesis" / "chapter1.tex" / "below")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AcmizeError, match="current folder"):
        save_pretrained(model, ".")


@pytest.mark.parametrize("what", ["json", "tensors"])
def test_a_full_disk(model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr("acmize.checkpoint.save_file", full)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with pytest.raises(AcmizeError, match=r"No space left on device.*; free"):
            save_pretrained(model, target)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, model: Any) -> None:
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["allow_patterns"]))
        return str(saved)

    with pytest.raises(AcmizeError, match="neither a folder here nor to be had from the Hub"):
        from_pretrained("me/absent")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(from_pretrained("me/model", revision="v1")(images), model(images))
    assert asked == [("me/model", "v1", ["*.json", "model*.safetensors"])]


# --- damaged and tampered -------------------------------------------------------------------------------------


def refuses(folder: Path, said: str = "") -> None:
    with pytest.raises(AcmizeError) as caught:
        from_pretrained(folder)
    assert said in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def edit(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    whole = json.loads(path.read_text())
    part = whole
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("name", ["config.json", "plan.json", "model.safetensors"])
def test_a_missing_empty_or_cut_file(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff\xfe\x00garbage"):
        (folder / name).write_bytes(content)
        refuses(folder, name)
    (folder / name).unlink()
    refuses(folder, f"{name} is missing")


def test_no_such_folder(tmp_path: Path) -> None:
    for source in (tmp_path / "absent", tmp_path):
        with pytest.raises(AcmizeError, match="written by acmize"):
            from_pretrained(source)


@pytest.mark.parametrize("schema", [2, 0, "1", None, True, [1]])
@pytest.mark.parametrize("file", ["config.json", "plan.json"])
def test_another_schema(folder: Path, file: str, schema: Any) -> None:
    edit(folder / file, ("schema",) if file == "config.json" else ("plan", "schema"), schema)
    refuses(folder, "schema")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("base",), None),
        (("base",), []),
        (("base", "architecture"), 3),
        (("base", "architecture"), "no_such_model"),
        (("base", "architecture"), "hf-hub:someone/else"),
        (("base", "architecture"), "test_vit"),
        (("base", "library"), "torch"),
        (("base", "kwargs"), [1]),
        (("base", "kwargs"), {"embed_dim": "wide"}),
        (("base", "kwargs"), {"embed_dim": 3_000_000}),
        (("base", "kwargs"), {"num_classes": 10**12}),
        (("base", "kwargs"), {"depth": 2}),
        (("base", "kwargs"), {"no_such_option": 2}),
        (("base", "kwargs"), {"checkpoint_path": "/tmp/evil.pth"}),
        (("base", "kwargs"), {"pretrained": True}),
        (("base", "pretrained_cfg"), [1]),
        (("base", "pretrained_cfg"), {"file": "/tmp/evil.pth"}),
        (("budget",), "half"),
        (("budget",), 0.0001),
    ],
)
def test_a_tampered_config(folder: Path, keys: tuple[Any, ...], value: Any) -> None:
    edit(folder / "config.json", keys, value)
    refuses(folder)


WRONG: tuple[Any, ...] = (None, "x", -1, 10**12, 1.5, math.nan, True, [], {}, [None], ["x"], {"a": 1}, 10**400)


def test_no_value_in_a_plan_leads_to_anything_but_a_clear_refusal(saved: Path, folder: Path) -> None:
    """Each value of the plan in turn is replaced by each wrong one: it loads, or it is refused in one line."""
    path, whole = folder / "plan.json", json.loads((saved / "plan.json").read_text())

    def places(part: Any, keys: tuple[Any, ...]) -> Any:
        if keys:
            yield keys
        if isinstance(part, dict):
            items = list(part.items())
        else:
            items = list(enumerate(part))[:1] if isinstance(part, list) else []
        for key, inner in items:
            yield from places(inner, (*keys, key))

    kinds = {e["kind"]: number for number, e in reversed(list(enumerate(whole["plan"]["entries"])))}
    found = [k for k in places(whole, ()) if k[:2] != ("plan", "entries") or len(k) < 4]
    found += [("plan", "entries", n, *k) for n in kinds.values() for k in places(whole["plan"]["entries"][n], ())]
    refused = 0
    for number, keys in enumerate(dict.fromkeys(found)):
        for shift in range(2):  # two of the wrong values at each place, others at the next
            edit(path, keys, WRONG[(2 * number + shift) % len(WRONG)])
            try:
                from_pretrained(folder)
            except AcmizeError as error:
                refused += len(str(error)) < 2000
            except Exception as error:
                raise AssertionError(f"{keys} = {WRONG[(2 * number + shift) % len(WRONG)]!r}") from error
            path.write_text(json.dumps(whole))
    assert refused > len(found)


@pytest.mark.parametrize("field", ["num_learners", "tokens", "macs", "kind", "roles", "options", "bounds"])
def test_a_field_that_is_missing_or_unknown(folder: Path, field: str) -> None:
    path = folder / "plan.json"
    whole = json.loads(path.read_text())
    if field != "num_learners":
        del whole["plan"]["entries"][0][field]
        path.write_text(json.dumps(whole))
        refuses(folder, "plan")
    whole["plan"]["entries"][1]["extra"] = 1
    path.write_text(json.dumps(whole))
    refuses(folder, "plan")


def test_tampered_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = load_file(path)
    for name, change in (("shapes", {"head.weight": torch.zeros(11, 96)}), ("extra", {"evil": torch.zeros(1)})):
        save_file({**good, **change}, path)
        refuses(folder, f"1 {name}")
    save_file({k: v for k, v in good.items() if k != "head.weight"}, path)
    refuses(folder, "1 missing")
    save_file({**good, "head.weight": torch.zeros(10, 96, dtype=torch.complex64)}, path)
    refuses(folder)


@pytest.mark.parametrize("name", ["results.json", "recipe.json"])
def test_what_only_informs(folder: Path, name: str) -> None:
    (folder / name).write_text("[1]")
    refuses(folder, name)
    (folder / name).unlink()
    from_pretrained(folder)


def test_safetensors_alone_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_args: Any, **_options: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", no)
    assert load_file(folder / "model.safetensors").keys() == from_pretrained(folder).state_dict().keys()
