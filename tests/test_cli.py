"""The command: tables, JSON, exit status, and one line with a remedy for everything the user can mend."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from short import MODEL, config_file, converted, image_folder, picture, refused

import acmize
from acmize.hub import from_pretrained, save_pretrained

PACKAGED = Path(acmize.__file__).parent / "assets" / "vit_digits.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(converted({"phases": []}), tmp_path_factory.mktemp("cli") / "saved")


@pytest.fixture
def run(run_command: Any) -> Any:
    """Run the command in this process: (exit status, stdout, captured)."""

    def call(*words: object) -> Any:
        status, captured = run_command(*words)
        return status, captured.out, captured

    return call


def says(run: Any, said: str, *words: object) -> str:
    """The command refuses with exit status 2 and one line that has `said` and a remedy."""
    status, out, captured = run(*words)
    assert status == 2, captured
    assert out == ""
    line = refused(captured)
    assert said in line
    assert ";" in line, f"no remedy: {line}"
    return line


# --- plan -----------------------------------------------------------------------------------------------------


def test_plan_json(run: Any) -> None:
    status, out, _ = run("plan", "deit_tiny_patch16_224", "--json")
    plan = json.loads(out)
    assert status == 0
    assert 1.2e9 < plan["macs_dense"] < 1.3e9
    kinds = [e["kind"] for e in plan["entries"]]
    assert (kinds.count("mlp"), len(kinds) - kinds.count("mlp")) == (12, 48)
    for entry in plan["entries"]:
        assert entry.keys() >= {"fqn", "kind", "num_learners", "macs"}
        assert entry["num_learners"] >= 1
        assert entry["macs"] > 0
    assert all(r.keys() >= {"fqn", "reason"} for r in plan["refused"])


def test_plan_as_a_table(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = run("plan", "deit_tiny_patch16_224", "--budget", "0.5")
    assert status == 0
    for text in ("12 MLPs, 48 projections", "GMACs", "blocks.11.mlp", "budgets 0."):
        assert text in out


def test_plan_names_sites_that_are_too_small(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("acm: {gate_hidden: 350}\n")
    _, out, _ = run("plan", MODEL, "--config", config)
    assert "too small" in out or "hardly pays" in out


def test_plan_takes_options_from_flags_and_from_the_file(run: Any, tmp_path: Path) -> None:
    def sites(*words: object) -> list[str]:
        return [e["fqn"] for e in json.loads(run("plan", MODEL, "--json", *words)[1])["entries"]]

    config = tmp_path / "c.yaml"
    config.write_text("exclude: ['blocks.0.*']\nacm: {num_learners: 2}\n")
    everything, less = sites(), sites("--exclude", "blocks.0.*")
    assert less == [s for s in everything if not s.startswith("blocks.0.")]
    assert sites("--config", config) == less
    assert sites("--target-modules", "blocks.*.mlp") == [s for s in everything if s.endswith(".mlp")]
    made = json.loads(run("plan", MODEL, "--json", "--config", config, "--num-learners", 3)[1])
    assert {e["num_learners"] for e in made["entries"]} == {3}
    assert json.loads(run("plan", MODEL, "--json", "--preset", "paper")[1])["config"]["init"] == "random"


def test_version(run: Any) -> None:
    assert run("--version")[:2] == (0, f"acmize {acmize.__version__}\n")


def test_the_module_is_the_command() -> None:
    """`python -m acmize`, which is how launchers start it."""
    done = subprocess.run([sys.executable, "-m", "acmize", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"acmize {acmize.__version__}\n")


# --- convert and eval -----------------------------------------------------------------------------------------


def test_convert_then_eval(run: Any, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", {"limit": None})
    out = tmp_path / "out"
    words = ("convert", MODEL, "--data", data, "-o", out, "--config", config, "--seed", 3, "--limit", 30, "--json")
    status, printed, _ = run(*words)
    results = json.loads(printed)
    assert status == (1 if any(r["missed"] for r in results["results"]) else 0)
    assert results == json.loads((out / "results.json").read_text())
    assert results["dense"].keys() >= {"accuracy", "macs"}
    assert all(r.keys() >= {"budget", "macs_ratio", "accuracy"} for r in results["results"])
    assert results["samples"] == 20
    stored = json.loads((out / "recipe.json").read_text())
    assert (stored["seed"], stored["limit"], stored["config"]["num_learners"]) == (3, 30, 3)
    assert stored["data"] == str(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml", "out"], "the work folder is removed"

    status, printed, _ = run(
        "eval", out, "--data", data, "--budget", 0.8, "--budget", 0.7, "--json", "--weights", PACKAGED
    )
    again = json.loads(printed)
    assert [r["budget"] for r in again["results"]] == [0.8, 0.7]
    assert again["dense"]["accuracy"] == results["dense"]["accuracy"]
    status, printed, _ = run("eval", out, "--data", data)
    assert "top-1 %" in printed
    assert "dense" in printed


def test_phases_none_and_gate_labels(run: Any, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml")
    words = ("convert", MODEL, "--data", data, "--config", config)
    assert run(*words, "-o", tmp_path / "none", "--phases", "none")[0] in (0, 1)
    assert set(from_pretrained(tmp_path / "none").recipe["seconds"]) == {"init", "gates"}
    assert run(*words, "-o", tmp_path / "t", "--phases", "gates", "--gate-labels", "threshold")[0] in (0, 1)
    assert from_pretrained(tmp_path / "t").plan.config.gate == "classification"
    first = load_file(tmp_path / "none" / "model.safetensors")
    assert run(*words, "-o", tmp_path / "none", "--phases", "none")[0] in (0, 1), "its own result may be replaced"
    again = load_file(tmp_path / "none" / "model.safetensors")
    assert all((first[k] == again[k]).all() for k in first)


def test_a_missed_budget_is_loud_and_shows_in_the_exit_status(
    run: Any, data: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acmize.phases.calibrate.TOLERANCE", 1e-9)
    status, out, captured = run("eval", saved, "--data", data, "--budget", 0.7)
    assert status == 1
    assert "top-1 %" in out
    assert "acmize: budget 0.7: realised" in " ".join(captured.err.split())
    status, out, captured = run("eval", saved, "--data", data, "--budget", 0.7, "--json")
    assert status == 1
    assert json.loads(out)["results"][0]["missed"]
    assert "budget 0.7" in captured.err
    monkeypatch.setattr("acmize.phases.calibrate.TOLERANCE", 1.0)
    assert run("eval", saved, "--data", data, "--budget", 0.7)[0] == 0


def test_the_log_is_quiet(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", {"gates": {"steps": 100}})
    done = subprocess.run(
        [sys.executable, "-m", "acmize.cli", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    code = "import sys; from acmize.cli import main; sys.argv[0] = 'acmize'; main()"
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", MODEL, "--data", str(data), "-o", "out", "--config", str(config)],
        capture_output=True, text=True, cwd=tmp_path, env=env, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    lines = done.stderr.splitlines()
    for phase in ("distill", "gates", "finetune"):
        assert 1 <= sum(line.startswith(phase) for line in lines) <= 14
    assert len(lines) < 40
    assert "Warning" not in done.stderr


# --- what the user can mend -----------------------------------------------------------------------------------


@pytest.fixture
def convert(data: Path, tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "out").mkdir()
    return ("convert", MODEL, "--data", data, "-o", tmp_path / "out" / "model")


def nothing_left(tmp_path: Path) -> bool:
    return list((tmp_path / "out").iterdir()) == []


def test_unknown_model(run: Any, data: Path, tmp_path: Path) -> None:
    says(run, "found 'deit_tinny', expected a timm model", "plan", "deit_tinny")
    (tmp_path / "out").mkdir()
    says(run, "expected a timm model", "convert", "deit_tinny", "--data", data, "-o", tmp_path / "out" / "m")
    assert nothing_left(tmp_path)


def test_no_network_for_weights(run: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    says(run, "--weights FILE.safetensors", "convert", "test_vit", "--data", data, "-o", tmp_path / "out" / "m")
    assert nothing_left(tmp_path)


def test_weights_of_another_model(run: Any, convert: Any, tmp_path: Path) -> None:
    says(run, "no such file", *convert, "--weights", tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"a": load_file(PACKAGED)["cls_token"]}, other)
    says(run, f"does not fit {MODEL}", *convert, "--weights", other)
    assert nothing_left(tmp_path)


def test_wrong_image_folder(run: Any, convert: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    with_data = ("convert", MODEL, "-o", tmp_path / "out" / "model", "--data")
    says(run, "no such folder", *with_data, wrong)
    wrong.mkdir()
    says(run, "expected images", *with_data, wrong)
    (wrong / "train").mkdir()
    (wrong / "train" / "notes.txt").write_text("x")
    says(run, "data", *with_data, wrong)
    says(run, "not on the Hub either", *with_data, "nobody/nothing")
    for number in range(6):
        picture(level=number).save(wrong / "train" / f"{number}.png")
    (wrong / "train" / "notes.txt").unlink()
    (wrong / "train" / "3.png").write_bytes(b"no picture")
    says(run, "3.png", *with_data, wrong, "--phases", "none", "--max-corrupt", "0")
    assert nothing_left(tmp_path)


def test_labels_that_are_missing_or_of_other_classes(run: Any, convert: Any, tmp_path: Path) -> None:
    bare = image_folder(tmp_path / "bare", {"train": 12, "test": 6}, labels=False)
    with_data = ("convert", MODEL, "-o", tmp_path / "out" / "model", "--data")
    says(run, "found no labels, but finetune", *with_data, bare, "--preset", "paper")
    for name in ("ape", "bee"):
        (tmp_path / "two" / "train" / name).mkdir(parents=True)
        picture().save(tmp_path / "two" / "train" / name / "0.png")
    says(run, "found 2 classes, expected the 10 of the model", *with_data, tmp_path / "two")
    assert nothing_left(tmp_path)


def test_a_budget_below_the_floor(run: Any, convert: Any, saved: Path, data: Path, tmp_path: Path) -> None:
    line = says(run, "cannot go below 0.", *convert, "--budget", 0.02)
    assert "ask for 0." in line
    says(run, "cannot go below 0.", "plan", MODEL, "--budget", 0.02)
    says(run, "cannot go below 0.", "eval", saved, "--data", data, "--budget", 0.0001)
    says(run, "budget: found 1.5", *convert, "--budget", 1.5)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("count", [0, -3, 1_000_000])
def test_impossible_learner_counts(run: Any, convert: Any, tmp_path: Path, count: int) -> None:
    for words in (("plan", MODEL), convert):
        status, _, captured = run(*words, "--num-learners", count)
        assert status == 2
        refused(captured)
    status, out, captured = run("plan", MODEL, "--json", "--learner-dim", count)
    if count < 1:
        assert status == 2
        refused(captured)
    else:  # the projections, which keep their learners, are still converted
        plan = json.loads(out)
        assert {e["kind"] for e in plan["entries"]} == {"q", "k", "v", "out"}
        assert any("--learner-dim" in r["reason"] for r in plan["refused"])
    assert nothing_left(tmp_path)


def test_options_that_do_not_exist(run: Any, convert: Any, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("bugdet: 0.5\n")
    for words in (("--config", config), ("--phases", "distil"), ("--preset", "best"), ("--gate-labels", "x")):
        status, _, captured = run(*convert, *words)
        assert status == 2
        refused(captured)
    for words in (
        ("--epochs", 0),
        ("--limit", 0),
        ("--batch-size", 0),
        ("--merge", "some"),
        ("--exclude", "nothing.*"),
    ):
        status, _, captured = run(*convert, *words)
        assert status == 2
        refused(captured)
    assert nothing_left(tmp_path)


def test_a_damaged_checkpoint(run: Any, data: Path, saved: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copy / "plan.json").write_text('{"plan": {"schema": 99}}')
    says(run, "found schema 99", "eval", copy, "--data", data)
    (copy / "model.safetensors").unlink()
    says(run, "model.safetensors is missing", "eval", copy, "--data", data)
    says(run, "no such folder", "eval", tmp_path / "absent", "--data", data)


def test_a_full_disk_keeps_the_work_and_nothing_half_done(
    run: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(tmp_path / "c.yaml", {"phases": []})

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("acmize.hub.model_card", full)
        says(run, "No space left on device", *convert, "--config", config)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.work"]
    with monkeypatch.context() as patch:
        patch.setattr("acmize.checkpoint.save_file", full)
        says(run, "No space left on device", *convert, "--config", config)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(*convert, "--config", config, "--resume")[0] in (0, 1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]


def test_an_output_that_is_someone_elses(run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    words = ("convert", MODEL, "--data", data, "-o")
    says(run, "is not a saved acmize model", *words, tmp_path / "thesis")
    says(run, "is a file", *words, tmp_path / "thesis" / "a.tex")
    monkeypatch.chdir(tmp_path)
    says(run, "current folder", *words, ".")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_errors_outside_python_are_one_line_too(tmp_path: Path) -> None:
    code = "import sys; from acmize.cli import main; sys.argv[0] = 'acmize'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "no_such_model"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("acmize: model: found 'no_such_model'")
