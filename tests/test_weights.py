"""Weights in one file or in shards: every way of loading them, indices that lie, and how much memory it takes."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import tiny_speech
import torch
from safetensors.torch import load_file, save_file
from short import command, converted, refused, same_state
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from acmize import AcmizeError, weights
from acmize.hosts import make_plan
from acmize.hub import base_of, from_pretrained, make_adaptive, save_pretrained
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.models import architecture, load_model
from acmize.phases.calibrate import Calibration
from acmize.quickstart_model import digits
from acmize.weights import INDEX, WEIGHTS, Weights, lean, save_weights

SIZE = "100KB"  # of a shard; the model takes some 600


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": []})


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(model, tmp_path_factory.mktemp("weights") / "saved", max_shard_size=SIZE)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


# --- there and back -------------------------------------------------------------------------------------------


def test_the_layout_is_that_of_transformers(model: Any, saved: Path) -> None:
    index = json.loads((saved / INDEX).read_text())
    state, files = model.state_dict(), shards(saved)
    assert len(files) > 3
    assert not (saved / WEIGHTS).exists()
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())
    assert index["weight_map"].keys() == state.keys()
    largest = max(t.numel() * t.element_size() for t in state.values())
    assert all(file.stat().st_size < max(100_000, largest) + 20_000 for file in files)


def by_acmize(folder: Path) -> Any:
    return from_pretrained(folder)


def by_timm(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    made: Any = AutoModelForImageClassification.from_pretrained(folder)
    return made.model


@pytest.mark.parametrize("load", [by_acmize, by_timm, by_transformers])
def test_every_way_of_loading_gives_the_same_bits(model: Any, saved: Path, load: Any) -> None:
    x = digits("test")[0][:16]
    loaded, mine = load(saved), copy.deepcopy(model)
    assert same_state(loaded, model)
    for budget in (0.6, 0.9):
        loaded.set_budget(budget)
        mine.set_budget(budget)
        with torch.no_grad():
            assert torch.equal(loaded(x), mine(x))


def test_saved_again_no_shard_is_left_over(saved: Path, folder: Path, model: Any) -> None:
    (folder / "report.html").write_text("mine")
    loaded = from_pretrained(folder)
    loaded.save_pretrained(folder, max_shard_size="200KB")
    assert 1 < len(shards(folder)) < len(shards(saved))
    assert same_state(from_pretrained(folder), model)
    loaded.save_pretrained(folder)
    assert (folder / WEIGHTS).is_file()
    assert not shards(folder)
    assert not (folder / INDEX).exists()
    assert (folder / "report.html").read_text() == "mine"
    assert same_state(from_pretrained(folder), model)
    by_transformers(folder).save_pretrained(folder, max_shard_size=SIZE)
    assert [f.read_bytes() for f in shards(folder)] == [f.read_bytes() for f in shards(saved)]


@pytest.mark.parametrize("size", [0, -1, "much", "5 XB", "1e400GB"])
def test_sizes_that_are_none(model: Any, tmp_path: Path, size: Any) -> None:
    with pytest.raises(AcmizeError, match=r"max_shard_size: found .*, expected bytes, or text such as '5GB'"):
        save_pretrained(model, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_no_more_files_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_SHARDS", 3)
    state = {str(i): torch.randn(10) for i in range(4)}
    with pytest.raises(AcmizeError, match="makes 4 files, expected 3 at most; make it larger"):
        save_weights(tmp_path, state, 40)
    save_weights(tmp_path, state, 80)
    assert len(shards(tmp_path)) == 2
    read = Weights.open(tmp_path / INDEX).tensors()
    assert all(torch.equal(read[name] + 0, tensor) for name, tensor in state.items())


def test_tied_tensors_have_each_name(tmp_path: Path) -> None:
    tied = torch.randn(10)
    save_weights(tmp_path, {"a": tied, "b": torch.randn(10), "c": tied}, 40)
    read = Weights.open(tmp_path / INDEX)
    assert read.files["a"] == read.files["c"] != read.files["b"]
    assert torch.equal(read.tensors()["c"] * 1, tied)


# --- hostile --------------------------------------------------------------------------------------------------


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def refuses(folder: Path, said: str) -> None:
    with pytest.raises(AcmizeError) as caught:
        from_pretrained(folder)
    assert said in str(caught.value)
    assert ";" in str(caught.value), "no remedy"
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors", "/dev/zero", "/etc/passwd", "..", ".", "", "shard.bin", "a/b.safetensors",
        "a\\b.safetensors", "\x00.safetensors", ".hidden.safetensors", "x" * 5000 + ".safetensors", "ä.safetensors",
        "C:model.safetensors", "model.safetensors\n",
    ],
)  # fmt: skip
def test_a_file_elsewhere_is_never_opened(folder: Path, saved: Path, name: str) -> None:
    (folder.parent / "other").mkdir()
    shutil.copy(shards(saved)[0], folder.parent / "other" / WEIGHTS)  # what the first case leads to is a whole shard
    index = index_of(folder)
    first = shards(folder)[0].name
    index["weight_map"] = {k: name if v == first else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, "expected a .safetensors file beside it")


def test_an_index_that_is_none(folder: Path) -> None:
    whole = (folder / INDEX).read_bytes()
    for text in (whole[:200], b"", b"\xff\xfe", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}'):
        (folder / INDEX).write_bytes(text)
        refuses(folder, INDEX)
    for value in (None, 3, ["model-00001-of-00002.safetensors"], {"a": 1}):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**index_of_bytes(whole), "head.weight": value}}))
        refuses(folder, "found no weight_map of names")
    name = next(iter(index_of_bytes(whole)))
    twice = whole.replace(b'"weight_map": {', f'"weight_map": {{"{name}": "x.safetensors",'.encode())
    assert twice != whole
    (folder / INDEX).write_bytes(twice)
    refuses(folder, "twice")


def index_of_bytes(text: bytes) -> dict[str, Any]:
    return json.loads(text)["weight_map"]


def test_a_missing_cut_or_foreign_shard(folder: Path, saved: Path) -> None:
    first, second, *_ = shards(folder)
    whole = first.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        first.write_bytes(content)
        refuses(folder, first.name)
    first.write_bytes(second.read_bytes())  # holds what belongs to another, and lacks its own
    refuses(folder, first.name)
    first.unlink()
    refuses(folder, f"{first.name} is missing")
    first.mkdir()
    refuses(folder, f"{first.name} is missing")


def test_names_that_the_index_and_the_shards_do_not_share(folder: Path) -> None:
    first, second, *_ = shards(folder)
    good, name = load_file(first), next(iter(load_file(second)))
    save_file({**good, name: torch.zeros(3)}, first)  # one name in two shards
    refuses(folder, f"holds '{name}' as well")
    save_file({**good, "evil": torch.zeros(3)}, first)
    refuses(folder, "holds 'evil' as well")
    save_file(dict(list(good.items())[1:]), first)
    refuses(folder, "lacks")
    save_file(good, first)
    index = index_of(folder)
    index["weight_map"]["evil"] = first.name
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, "lacks 'evil'")


def test_other_shapes_are_refused_before_any_memory_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shards(folder)[0]
    good = load_file(first)
    name = next(iter(good))
    save_file({**good, name: torch.zeros(7, 7)}, first)

    def no(*_args: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(weights._Reader, "read", no)
    refuses(folder, f"1 shapes, 0 missing, 0 extra; first: {name}")
    save_file({**good, name: torch.zeros(good[name].shape, dtype=torch.complex64)}, first)
    monkeypatch.undo()
    refuses(folder, "complex64")


@pytest.mark.parametrize("size", [-1, 10**400, "much", None, [], 0])
def test_sizes_that_lie_decide_nothing(folder: Path, model: Any, size: Any) -> None:
    (folder / INDEX).write_text(json.dumps({**index_of(folder), "metadata": {"total_size": size}}))
    assert same_state(from_pretrained(folder), model)


def test_thousands_of_files(folder: Path) -> None:
    names = [f"{i}.safetensors" for i in range(5000)]
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))
    refuses(folder, "names 5000 files, expected 1000 at most")


def test_the_command_refuses_them_with_status_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"head.weight": "../evil.safetensors"}}))
    assert command(monkeypatch, "eval", folder, "--data", folder) == 2
    assert "'../evil.safetensors'" in refused(capfd.readouterr())


# --- dense models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_vit", num_classes=7).eval()


def test_a_sharded_folder_as_timm_lays_it_out(dense: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 7}))
    save_weights(tmp_path, dense.state_dict(), "200KB")
    assert len(shards(tmp_path)) > 2
    loaded: Any
    for loaded in (
        load_model(str(tmp_path)),
        load_model("test_vit", tmp_path / INDEX, num_classes=7),
        load_model("test_vit", tmp_path, num_classes=7),
    ):
        assert same_state(loaded, dense)
        assert "state_dict" not in loaded.pretrained_cfg
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 4_000_000}))
    with pytest.raises(AcmizeError, match="numbers for weights of"):
        architecture(str(tmp_path))
    shards(tmp_path)[0].unlink()
    with pytest.raises(AcmizeError, match=r"model-00001-of-\d{5}\.safetensors is missing"):
        load_model("test_vit", tmp_path / INDEX)


def test_a_sharded_folder_as_transformers_lays_it_out(tmp_path: Path) -> None:
    dense: Any = tiny_speech.HOSTS["moonshine"]()
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(shards(tmp_path)) > 2
    assert same_state(load_model(str(tmp_path)), dense)
    index = json.loads((tmp_path / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../evil.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(AcmizeError, match=r"names '\.\./evil\.safetensors', expected a \.safetensors file beside it"):
        load_model(str(tmp_path))


def test_half_precision_files_make_float32_models(dense: nn.Module, tmp_path: Path) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in dense.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded = load_model("test_vit", tmp_path / "half.safetensors", num_classes=7).state_dict()
    assert all(t.dtype == torch.float32 for t in loaded.values())
    assert all(torch.equal(t, half[name].float()) for name, t in loaded.items())


def test_weights_that_timm_fits_to_a_model(dense: nn.Module, tmp_path: Path) -> None:
    """Another size of images and one channel: positions are resampled, the first convolution is summed, as by timm."""
    file = tmp_path / "w.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in dense.state_dict().items()}, file)  # as DDP names them
    options: dict[str, Any] = {"num_classes": 7, "img_size": 192, "in_chans": 1}
    overlay = {"file": str(file), "num_classes": 7}
    theirs = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert theirs.state_dict()["pos_embed"].shape != dense.state_dict()["pos_embed"].shape
    assert same_state(load_model("test_vit", file, **options), theirs)


def test_an_empty_file_is_no_reason_to_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({}, tmp_path / "none.safetensors")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_a, **_k: pytest.fail("asked"))
    with pytest.raises(AcmizeError, match="no tensors in it"):
        load_model("test_vit", tmp_path / "none.safetensors")


# --- memory ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two names for one parameter, a parameter that is a part of no layer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.free = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("computed", torch.arange(4.0) ** 2, persistent=False)


BUILT: dict[str, Any] = {
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)
    ),
    "eva02": lambda: Eva(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, qkv_fused=False, use_rot_pos_emb=True
    ),
    "tied": Tied,
}  # fmt: skip


def reloaded(build: Callable[[], nn.Module], folder: Path, strict: bool = True) -> tuple[nn.Module, int]:
    """A model from the weights in a folder, and how often it was built."""
    built = []

    def load() -> nn.Module:
        built.append(build())
        built[-1].load_state_dict(Weights.open(folder / WEIGHTS).tensors(), strict=strict)
        return built[-1]

    return lean(load), len(built)


def same_buffers(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", BUILT)
def test_what_is_not_in_the_file_is_right(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SMALL", 200 if kind == "swin" else 0)  # its buffers lie where its norms do
    plain = BUILT[kind]()
    hidden = dict(plain.named_buffers()).keys() - plain.state_dict().keys()
    assert hidden, "nothing that could be lost"
    save_weights(tmp_path, plain.state_dict())
    before = torch.get_rng_state()
    loaded, times = reloaded(BUILT[kind], tmp_path)
    assert times == 1
    assert kind == "swin" or torch.equal(torch.get_rng_state(), before), "weights were drawn only to be overwritten"
    assert same_state(loaded, plain)
    assert same_buffers(loaded, plain)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in plain.named_parameters()]
    flags = [(p.requires_grad, p.stride(), type(p)) for p in plain.parameters()]
    assert [(p.requires_grad, p.stride(), type(p)) for p in loaded.parameters()] == flags
    assert not any(m._load_state_dict_pre_hooks for m in loaded.modules())


def test_where_buffers_follow_parameters_the_model_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SMALL", 0)
    plain = BUILT["swin"]()
    save_weights(tmp_path, plain.state_dict())
    loaded, times = reloaded(BUILT["swin"], tmp_path)
    assert times == 2
    assert same_state(loaded, plain)
    assert same_buffers(loaded, plain)


def test_weights_that_do_not_fill_a_model_leave_nothing_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SMALL", 0)
    plain = Tied()
    save_weights(tmp_path, {"a.weight": plain.a.weight.detach(), "b.weight": plain.b.weight.detach()})
    loaded, times = reloaded(Tied, tmp_path, strict=False)
    assert times == 2
    assert torch.equal(loaded.state_dict()["free"], torch.ones(2))
    assert torch.equal(loaded.state_dict()["b.weight"], plain.a.weight)


@pytest.mark.parametrize("kind", ["vit", "eva02", "swin", "convnext"])
def test_converted_families(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = tiny.adapted(tiny.HOSTS[kind]())
    same_when_loaded(made, lambda: convert_(tiny.HOSTS[kind](), plan), tmp_path, monkeypatch)
    x = tiny.inputs_for(made)
    loaded, _ = reloaded(lambda: convert_(tiny.HOSTS[kind](), plan), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), made.eval()(x))


@pytest.mark.parametrize("kind", ["wav2vec2 pre-norm", "wavlm", "whisper", "moonshine"])
def test_converted_families_of_speech(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = tiny_speech.adapted(tiny_speech.HOSTS[kind]())
    same_when_loaded(made, lambda: convert_(tiny_speech.HOSTS[kind](), plan), tmp_path, monkeypatch)


def same_when_loaded(
    made: nn.Module, build: Callable[[], nn.Module], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SMALL", 200)
    save_weights(folder, made.state_dict())
    assert not same_state(build(), made)
    loaded, times = reloaded(build, folder)
    assert times == 1
    assert same_state(loaded, made)
    assert same_buffers(loaded, made)


PROBE = """
import gc, sys
from pathlib import Path
import torch
from acmize import from_pretrained
from acmize.environment import fresh_peak_bytes, peak_bytes
from acmize.models import load_model
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = None
    gc.collect()
    before = fresh_peak_bytes()
    model = load_model(folder) if Path(folder).name.startswith("dense") else from_pretrained(folder)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    print(size, (peak_bytes() - before) / size)
"""


def wide(width: int) -> tuple[nn.Module, dict[str, Any]]:
    options: dict[str, Any] = {"embed_dim": width, "num_heads": 4, "depth": 4}
    return timm.create_model("test_vit", **options), options


def kept(folder: Path, kind: str, width: int, size: str) -> Path:
    """A model of 4 blocks, dense or converted, with random weights."""
    made, options = wide(width)
    if kind == "dense":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "model_args": options}))
        save_weights(folder, made.state_dict(), size)
        return folder
    plan = make_plan(made, AcmConfig(num_learners=4, gate_hidden=2))
    calibration, base = Calibration(dials=(0.0,), budgets=(1.0,)), base_of(made, options)
    return save_pretrained(make_adaptive(convert_(made, plan), plan, calibration, base), folder, max_shard_size=size)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")
def test_loading_takes_the_model_and_hardly_more(tmp_path: Path) -> None:
    sizes = ((64, "5GB"), (768, "5GB"), (768, "20MB"))
    cases = [(kind, *size) for kind in ("dense", "adaptive") for size in sizes]
    folders = [kept(tmp_path / f"{kind}{width}{size}", kind, width, size) for kind, width, size in cases]
    assert [bool(shards(folder)) for folder in folders] == [size == "20MB" for _, _, size in cases]
    done = subprocess.run([sys.executable, "-c", PROBE, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    large = [line for line, (_, width, _) in zip(found, cases, strict=True) if width > 64]  # the small ones warm it up
    assert len(large) == 4
    assert all(size > 95e6 for size, _ in large)
    assert all(0.9 < ratio < 1.5 for _, ratio in large), large


FREED = """
from pathlib import Path
import torch
from acmize.environment import release_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
held = [torch.ones(16_000) for _ in range(2000)]  # 128 MB in pieces that come from the heap
last = torch.ones(16_000)  # keeps its top in use
del held
before = resident()
release_memory()
print((before - resident()) / 128e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.8
