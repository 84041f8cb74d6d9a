"""Verify: passes on a sound model, fails where a path is wrong, says which, and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from short import converted, image_folder, refused
from timm.models.vision_transformer import VisionTransformer

import acmize
from acmize import bench, console, ops
from acmize import verify as verify_module
from acmize.gates import Gate, gates_of
from acmize.hub import from_pretrained, save_pretrained
from acmize.methods.token_merging import schedule_of, set_schedule
from acmize.verify import Check, noise, verify, verify_saved

PACKAGED = Path(acmize.__file__).parent / "assets" / "vit_digits.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(converted({"phases": []}), tmp_path_factory.mktemp("verify") / "saved")


@pytest.fixture
def model(saved: Path) -> Any:
    return from_pretrained(saved)


@pytest.fixture
def run(run_command: Any) -> Any:
    return partial(run_command, "verify")


def check(model: Any, **options: Any) -> list[Check]:
    found = verify(model, noise(model, 3, 0), compiler=None, **options)
    checks = [Check(**c) for c in found["checks"]]
    assert found["ok"] == all(c.ok for c in checks)
    return checks


def failed(model: Any, **options: Any) -> set[tuple[str, str]]:
    return {(c.check, c.what) for c in check(model, **options) if not c.ok}


def without_merging(model: Any) -> Any:
    set_schedule(model, ())
    return model


def test_a_sound_model_passes_every_check(model: Any) -> None:
    assert schedule_of(model), "the digits model merges tokens at its budget"
    checks = check(model, dense=bench.dense_of(model, PACKAGED))
    assert [c for c in checks if not c.ok] == []
    done = {(c.check, c.what) for c in checks}
    for backend in ("masked", "sorted"):
        assert backend in ops.BACKENDS
        assert (f"{backend}, alone", "random") in done
    whole = ("random", "least", "middle", "full", "gates", "one token", "no token", "merged tokens, median")
    assert done >= {("sorted", what) for what in whole}
    assert not any("triton" in name for name, _ in done), "there is no GPU"
    assert done >= {("dense", "full"), ("saved and loaded", "tensors that differ"), ("saved and loaded", "gates")}
    assert all(c.difference is not None and c.tolerance is not None and c.difference <= c.tolerance for c in checks)
    assert 0 < max(c.tolerance or 0 for c in checks if c.what == "random") < 0.01


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before, schedule = {k: v.clone() for k, v in model.state_dict().items()}, schedule_of(model)
    drawn = torch.get_rng_state()
    check(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert schedule_of(model) == schedule
    assert all(g.choose is None for g in gates_of(model))
    assert torch.equal(drawn, torch.get_rng_state())


# --- each wrong path is found ----------------------------------------------------------------------------------


def spoiled(function: Callable[..., Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def run(*args: Any, out: torch.Tensor | None = None, **options: Any) -> Any:
        y = change(function(*args, **options))
        return y if out is None else out.copy_(y)

    return run


@pytest.mark.parametrize("name", ["mlp_sorted", "expand_sorted", "contract_sorted"])
def test_a_wrong_backend_is_found(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(ops, name, spoiled(getattr(ops, name), lambda y: y * 1.01))
    found = failed(without_merging(model))
    whole = {("sorted", what) for what in ("random", "middle", "full", "gates", "one token")}
    assert found >= whole | {("sorted, alone", "gates")}
    assert not any(name.startswith("masked") for name, _ in found)


def test_a_choice_that_is_off_by_one_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the released code: the last learner of the batch's highest choice does not run."""
    sort = ops.sort_tokens

    def one_less(order: ops.Order) -> ops.Order:
        most = int(order.choice.max()) if len(order.choice) else 0
        return order._replace(counts=[0 if n + 1 == most else count for n, count in enumerate(order.counts)])

    def guarded(choice: torch.Tensor, num_learners: int) -> list[ops.Order]:
        return [one_less(order) for order in sort(choice, num_learners)]

    monkeypatch.setattr(ops, "sort_tokens", guarded)
    found = failed(without_merging(model))
    assert {("sorted", "random"), ("sorted", "full"), ("sorted", "middle"), ("sorted", "one token")} <= found
    assert ("sorted", "least") not in found


def test_batch_mates_that_matter_are_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends alike, so that only the check of single samples can see it."""
    own = VisionTransformer.forward_head
    monkeypatch.setattr(
        VisionTransformer, "forward_head", lambda self, x, **options: own(self, x + 0.1 * x.mean(0), **options)
    )
    found = failed(without_merging(model))
    assert found == {(f"{b}, alone", what) for b in ("masked", "sorted") for what in ("random", "gates")}


def test_gates_that_would_choose_otherwise_are_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = type(gates_of(model)[0]).energies

    def energies(gate: Gate, x: torch.Tensor) -> torch.Tensor:
        found = own(gate, x)
        return found.flip(-1) if ops.pick_backend(x) == "sorted" else found

    monkeypatch.setattr(type(gates_of(model)[0]), "energies", energies)
    found = failed(without_merging(model))
    assert ("sorted", "share of choices") in found
    assert ("sorted", "gates") not in found, "the noted choices are repeated"


def test_a_path_that_does_not_run_is_a_failure_and_not_a_crash(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, "mlp_sorted", broken)
    rows = [c for c in check(model) if c.check == "sorted"]
    assert rows
    assert all(not c.ok and c.difference is None and c.note == "RuntimeError: no kernel image" for c in rows)


def test_not_a_number_is_a_failure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "mlp_sorted", spoiled(ops.mlp_sorted, lambda y: y * float("nan")))
    rows = {c.what: c for c in check(without_merging(model)) if c.check == "sorted"}
    assert not rows["random"].ok
    assert rows["random"].difference is None
    json.dumps(rows["random"].difference, allow_nan=False)


def test_a_tensor_lost_in_saving_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(source: Any) -> Any:
        made = from_pretrained(source)
        with torch.no_grad():
            made.blocks[0].mlp.fc1.weight.mul_(1.5)
        return made

    monkeypatch.setattr(verify_module, "from_pretrained", rounded)
    rows = {c.what: c for c in check(without_merging(model)) if c.check == "saved and loaded"}
    assert rows["tensors that differ"].difference == 1
    assert not rows["tensors that differ"].ok
    assert not rows["gates"].ok


def test_another_dense_model_is_found_unless_weights_were_trained(model: Any) -> None:
    other = bench.dense_of(model)  # random weights
    assert failed(without_merging(model), dense=other) == {("dense", "full")}
    model.recipe["phases"] = ["distill", "gates", "finetune"]
    (row,) = [c for c in check(model, dense=other) if c.check == "dense"]
    assert row.ok
    assert row.tolerance is None
    assert row.note == "not judged: trained (distill, finetune)"


def test_a_wrong_merge_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from acmize.methods import token_merging

    merge = token_merging.merge

    def wrong(x: torch.Tensor, *rest: Any) -> Any:
        tokens, sizes = merge(x, *rest)
        return (tokens * 1.05 if ops.pick_backend(x) == "sorted" else tokens), sizes

    monkeypatch.setattr(token_merging, "merge", wrong)
    assert failed(model) == {("sorted", "merged tokens, median")}


def test_a_model_that_merges_tokens_and_nothing_else() -> None:
    merging = converted({"phases": [], "exclude": ["blocks.*"]})
    assert gates_of(merging) == []
    checks = check(merging)
    assert [c for c in checks if not c.ok] == []
    assert ("sorted", "merged tokens, median") in {(c.check, c.what) for c in checks}


def test_compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone, which is what reads the gates; the rest takes minutes."""
    del model.blocks[2:]
    model.base["library"] = "module"  # what is cut like this cannot be loaded
    found = verify(without_merging(model), noise(model, 2, 0), compiler="eager")
    rows = [c for c in found["checks"] if c["check"] == "compiled (eager)"]
    assert [c["what"] for c in rows] == ["random", "gates", "share of choices"]
    assert found["ok"], rows
    run = verify_module.plain(model, noise(model, 2, 0), "full", verify_module.full_width)
    with torch.no_grad():
        wrong = verify_module._again(model, noise(model, 2, 0), run, None, lambda x: 1.01 * model(x))
    assert not verify_module.compared("compiled", run, lambda: wrong)[0].ok


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command(run: Any, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console.out, "width", 140)
    folder = image_folder(tmp_path / "d", {"train": 4, "test": 4})
    words = (saved, "--no-compile", "--limit", 2)
    status, captured = run(*words, "--data", folder, "--weights", PACKAGED)
    assert status == 0, captured.err
    for text in ("max abs difference", "saved and loaded", "dense", "2 samples of images on cpu"):
        assert text in captured.out
    assert "NO" not in captured.out
    status, captured = run(*words, "--json")
    found = json.loads(captured.out)
    assert (status, found["ok"], found["samples"], found["inputs"]) == (0, True, 2, "noise")
    assert {tuple(c) for c in found["checks"]} == {("check", "what", "difference", "tolerance", "ok", "note")}


def test_a_failure_is_in_the_exit_status(run: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 140)
    found = {"ok": False, "device": "cpu", "samples": 2, "inputs": "noise"}
    found["checks"] = [asdict(verify_module.judged("sorted", "full", d, 0.1)) for d in (0.05, 0.2, float("nan"))]
    monkeypatch.setattr(verify_module, "verify_saved", lambda *_, **__: found)
    status, captured = run(saved)
    assert status == 1
    assert [line.split()[4] for line in captured.out.splitlines()[1:4]] == ["yes", "NO", "NO"]
    assert "2 of 3 checks failed" in captured.err
    status, captured = run(saved, "--json")
    assert (status, json.loads(captured.out)) == (1, found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--limit", 1), "limit: found 1"),
        (("--device", "tpu"), "device: found 'tpu'"),
        (("--data", "absent/folder/here"), "no such folder"),
        (("--weights", "absent.safetensors"), "no such file"),
    ],
)
def test_wrong_options(run: Any, saved: Path, words: tuple[object, ...], said: str) -> None:
    status, captured = run(saved, "--no-compile", *words)
    assert (status, captured.out) == (2, "")
    line = refused(captured)
    assert said in line
    assert ";" in line


def test_an_unknown_folder(run: Any, tmp_path: Path) -> None:
    status, captured = run(tmp_path / "absent")
    assert status == 2
    assert "no such folder" in refused(captured)


def test_noise_depends_on_the_seed_alone(model: Any) -> None:
    assert torch.equal(noise(model, 2, 5), noise(model, 2, 5))
    assert not torch.equal(noise(model, 2, 5), noise(model, 2, 6))
    assert verify_saved(model, limit=2, compiler=None)["inputs"] == "noise"
