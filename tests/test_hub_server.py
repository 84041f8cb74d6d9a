"""Publishing and loading with the real client of the Hugging Face Hub, against a small server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub, Repo
from huggingface_hub import ModelCard, constants
from short import converted, refused

from acmize.errors import AcmizeError
from acmize.hub import from_pretrained, push_to_hub, save_pretrained
from acmize.quickstart_model import digits

NAME = "me/model"
FILES = {"README.md", "config.json", "model.safetensors", "plan.json", "recipe.json", "results.json"}


@pytest.fixture(scope="module")
def model() -> Any:
    made = converted({"phases": []})
    made.recipe["data"] = "someone/digits"
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return digits("test")[0][:16]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A fresh Hub and a fresh cache; the client waits for nothing between two tries."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are others
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    huggingface_hub.utils.disable_progress_bars()
    yield server
    server.shutdown()
    server.server_close()


def logits(model: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def other(model: Any) -> Any:
    """The model with its classes in another order."""
    made = converted({"phases": []})
    with torch.no_grad():
        made.head.weight.copy_(model.head.weight.flip(0))
    return made


# --- there and back -------------------------------------------------------------------------------------------


def test_pushed_and_loaded_it_is_the_same(hub: Hub, model: Any, images: torch.Tensor) -> None:
    address = model.push_to_hub(NAME, token=TOKEN)
    (commit,) = hub.repos[NAME].commits
    assert address == f"{hub.endpoint}/{NAME}/commit/{commit[0]}"
    assert set(commit[1]) == FILES
    assert not hub.repos[NAME].private
    loaded = from_pretrained(NAME)
    assert loaded.results == model.results
    for budget in (0.6, 0.75):
        loaded.set_budget(budget)
        model.set_budget(budget)
        assert torch.equal(logits(loaded, images), logits(model, images))


def test_revisions(hub: Hub, model: Any, images: torch.Tensor) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    changed = other(model)
    push_to_hub(changed, NAME, token=TOKEN)
    first, second = (oid for oid, _ in hub.repos[NAME].commits)
    hub.repos[NAME].refs["v1"] = first
    assert not torch.equal(logits(changed, images), logits(model, images))
    for revision, expected in ((None, changed), ("main", changed), (second, changed), ("v1", model), (first, model)):
        loaded = from_pretrained(NAME, revision=revision)
        expected.set_budget(loaded.budget)
        assert torch.equal(logits(loaded, images), logits(expected, images)), revision
    with pytest.raises(AcmizeError, match="v9"):
        from_pretrained(NAME, revision="v9")


def test_shards_take_the_place_of_one_file_and_the_other_way_round(hub: Hub, model: Any, images: torch.Tensor) -> None:
    """Whichever of them was left behind would be loaded in place of the new one."""
    models = [model, other(model), model]
    for made, size in zip(models, ("5GB", "100KB", "5GB"), strict=True):
        made.push_to_hub(NAME, token=TOKEN, max_shard_size=size)
        made.set_budget(from_pretrained(NAME).budget)
        assert torch.equal(logits(from_pretrained(NAME), images), logits(made, images))
    one, several, again = (set(files) for _, files in hub.repos[NAME].commits)
    assert one == again == FILES
    assert "model.safetensors" not in several
    assert len([name for name in several if name.startswith("model-0")]) > 3
    assert several - {name for name in several if name.startswith("model")} == FILES - {"model.safetensors"}


def test_what_was_loaded_once_loads_offline(
    hub: Hub, model: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    expected = logits(from_pretrained(NAME), images)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.seen)
    assert torch.equal(logits(from_pretrained(NAME), images), expected)
    assert len(hub.seen) == before
    with pytest.raises(AcmizeError, match="nor to be had from the Hub"):
        from_pretrained("me/never-seen")


def test_by_timm_and_by_transformers(hub: Hub, model: Any, images: torch.Tensor) -> None:
    import timm
    from transformers import AutoModelForImageClassification

    push_to_hub(model, NAME, token=TOKEN)
    push_to_hub(other(model), NAME, token=TOKEN)
    hub.repos[NAME].refs["v1"] = hub.repos[NAME].commits[0][0]
    expected = logits(model, images)
    assert torch.equal(logits(timm.create_model(f"hf-hub:{NAME}@v1"), images), expected)
    by_transformers = AutoModelForImageClassification.from_pretrained(NAME, revision="v1")
    assert torch.equal(logits(by_transformers, images).logits, expected)
    assert not torch.equal(logits(timm.create_model(f"hf-hub:{NAME}"), images), expected)


def test_a_fresh_process_with_the_endpoint_alone(hub: Hub, model: Any, images: torch.Tensor, tmp_path: Path) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    code = (
        "import acmize, torch; from acmize.quickstart_model import digits\n"
        f"m = acmize.from_pretrained('{NAME}')\n"
        "with torch.no_grad(): torch.set_num_threads(1); y = m(digits('test')[0][:16])\n"
        "print(m.budget, y.double().numpy().tobytes().hex())"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    budget, bits = done.stdout.split()
    model.set_budget(float(budget))
    assert bytes.fromhex(bits) == logits(model, images).double().numpy().tobytes()


def test_the_card_is_read_by_the_hub(hub: Hub, model: Any) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    card = ModelCard(hub.repos[NAME].commits[0][1]["README.md"].decode())
    assert card.data.library_name == "acmize"
    assert card.data.base_model == "timm/acmize_vit_digits"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["someone/digits"]
    assert f'acmize.from_pretrained("{NAME}")' in card.text
    found = {r.metric_name: r.metric_value for r in card.data.eval_results or []}
    assert len(found) == len(model.results["results"])
    for row in model.results["results"]:
        (name,) = [n for n in found if n is not None and f"budget {row['budget']:g} " in n]
        assert found[name] == pytest.approx(row["accuracy"], abs=1e-4)
        assert f"{row['macs_ratio']:.3f}" in name


def test_a_card_tells_no_path_of_ours(model: Any, tmp_path: Path) -> None:
    model.recipe["data"] = str(tmp_path / "photos")
    try:
        card = (save_pretrained(model, tmp_path / "m") / "README.md").read_text()
    finally:
        model.recipe["data"] = "someone/digits"
    assert "`photos`" in card
    assert str(tmp_path) not in card
    assert "datasets:" not in card


def test_the_command(hub: Hub, model: Any, run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_pretrained(model, tmp_path / "m")
    status, captured = run_command("push", saved, NAME, "--private")
    assert status == 2
    assert "nothing was published" in refused(captured)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run_command("push", saved, NAME, "--private")[0] == 0
    assert hub.repos[NAME].private
    assert len(hub.repos[NAME].commits) == 1


# --- who may --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_wrong_token_publishes_nothing(hub: Hub, model: Any, token: str | None) -> None:
    with pytest.raises(AcmizeError, match=r"401.*nothing was published.*token"):
        push_to_hub(model, NAME, token=token)
    assert hub.repos == {}


def test_private_and_gated(hub: Hub, model: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(model, NAME, private=True, token=TOKEN)
    assert hub.repos[NAME].private
    expected = logits(from_pretrained(NAME, token=TOKEN), images)
    for kind in ({"private": True}, {"gated": True}):
        hub.repos["me/closed"] = Repo(commits=hub.repos[NAME].commits, **kind)
        for token in (None, "hf_wrong"):
            with pytest.raises(AcmizeError, match="token"):
                from_pretrained("me/closed", token=token)
        assert torch.equal(logits(from_pretrained("me/closed", token=TOKEN), images), expected)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(logits(from_pretrained("me/closed"), images), expected)


# --- broken connections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/"), ("POST", "/batch")])
def test_an_interrupted_upload_publishes_nothing_and_can_be_repeated(
    hub: Hub, model: Any, images: torch.Tensor, cut: tuple[str, str]
) -> None:
    hub.cut[cut] = 99
    with pytest.raises(AcmizeError, match="nothing was published"):
        push_to_hub(model, NAME, token=TOKEN)
    assert hub.cut[cut] < 99
    assert hub.repos[NAME].commits == []
    with pytest.raises(AcmizeError):
        from_pretrained(NAME)
    hub.cut.clear()
    hub.seen.clear()
    push_to_hub(model, NAME, token=TOKEN)
    sent = sum(method == "PUT" for method, _, _ in hub.seen)
    assert sent == (0 if cut == ("POST", "/commit/") else 1)  # what had arrived is not sent again
    assert set(hub.repos[NAME].commits[0][1]) == FILES
    assert torch.equal(logits(from_pretrained(NAME), images), logits(model, images))


def test_an_interrupted_update_leaves_the_old_version(hub: Hub, model: Any, images: torch.Tensor) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    changed = other(model)
    hub.cut["POST", "/commit/"] = 99
    with pytest.raises(AcmizeError, match="nothing was published"):
        push_to_hub(changed, NAME, token=TOKEN)
    assert len(hub.repos[NAME].commits) == 1
    assert torch.equal(logits(from_pretrained(NAME), images), logits(model, images))


def test_a_download_goes_on_where_it_broke_off(
    hub: Hub, model: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept is kept by whole chunks
    push_to_hub(model, NAME, token=TOKEN)
    hub.cut["GET", "model.safetensors"] = 1
    assert torch.equal(logits(from_pretrained(NAME), images), logits(model, images))
    ranges = [asked for method, path, asked in hub.seen if method == "GET" and path.endswith("model.safetensors")]
    assert ranges[0] in (None, "bytes=0-")
    assert int(str(ranges[-1]).split("=")[1].split("-")[0]) > 0


def test_a_download_that_keeps_breaking_is_said_and_can_be_repeated(hub: Hub, model: Any, images: torch.Tensor) -> None:
    push_to_hub(model, NAME, token=TOKEN)
    hub.cut["GET", "/resolve/"] = 9999
    with pytest.raises(AcmizeError, match="nor to be had from the Hub"):
        from_pretrained(NAME)
    hub.cut.clear()
    assert torch.equal(logits(from_pretrained(NAME), images), logits(model, images))


def test_no_hub_at_all(hub: Hub, model: Any) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(AcmizeError, match="nor to be had from the Hub"):
        from_pretrained(NAME)
    with pytest.raises(AcmizeError, match="nothing was published"):
        push_to_hub(model, NAME, token=TOKEN)
