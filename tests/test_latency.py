"""A time as a budget: what is read, how it is searched, what is left when it cannot be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short import MODEL, command, config_file, converted, image_folder, refused

from acmize import latency
from acmize.errors import AcmizeError
from acmize.hub import from_pretrained
from acmize.latency import budget_for, parse_budget, search
from acmize.timing import Setting


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.5", (0.5, None)), (".5", (0.5, None)), ("20ms", (None, 20.0)), ("1.5 MS", (None, 1.5)), ("1", (1.0, None))],
)
def test_a_share_or_a_time(text: str, found: Any) -> None:
    assert parse_budget(text) == found


@pytest.mark.parametrize("text", ["", "ms", "fast", "-5ms", "0ms", "1.2.3", "20s", "nan"])
def test_neither_is_refused(text: str) -> None:
    with pytest.raises(AcmizeError, match=r"expected a share such as 0\.5 or a time such as 20ms"):
        parse_budget(text)


def line(budget: float) -> dict[str, float]:
    """10 ms of overhead and 40 ms of work."""
    return {"p50": 10 + 40 * budget, "p95": 99.0}


@pytest.mark.parametrize("target", [27.0, 30.0, 49.0])
def test_the_largest_budget_that_keeps_the_time(target: float) -> None:
    table = search(line, target, 0.25, 1.0)
    best = max(budget for budget, spent in table.items() if spent["p50"] <= target)
    assert 0 <= (target - 10) / 40 - best <= latency.CLOSE
    assert len(table) < 12


def test_no_search_where_an_end_decides() -> None:
    assert list(search(line, 50.0, 0.25, 1.0)) == [1.0]
    assert list(search(line, 19.0, 0.25, 1.0)) == [1.0, 0.25]


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": []})


def test_the_model_is_timed_at_the_budgets_it_is_set_to(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, before, sizes = torch.randn(6, 1, 8, 8), model.budget, []

    def fake(made: Any, images: Any, size: int, setting: Any) -> Any:
        sizes.append(size)
        return line

    real = budget_for(model, images, 1e6, batch_size=4, setting=Setting(repeats=2))
    assert real["met"]
    assert real["budget"] == 1.0
    assert real["table"][0]["latency_ms"]["p50"] > 0
    monkeypatch.setattr(latency, "_timer", fake)
    found = budget_for(model, images, 40.0, batch_size=4, setting=Setting())
    assert found["met"]
    assert 0.74 <= found["budget"] <= 0.75
    assert [row["budget"] for row in found["table"]] == sorted((r["budget"] for r in found["table"]), reverse=True)
    assert sizes == [4]
    assert model.budget == before
    missed = budget_for(model, images, 5.0, setting=Setting())
    assert not missed["met"]
    assert missed["budget"] == min(row["budget"] for row in missed["table"])
    with pytest.raises(AcmizeError, match="batch: found 7, expected 1 to 6"):
        budget_for(model, images, 5.0, batch_size=7, setting=Setting())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data"))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "short.yaml", {"phases": []})
    monkeypatch.setattr(latency, "_timer", lambda *_: line)
    words = ("convert", MODEL, "--data", data, "--config", config, "--json", "-o")
    assert command(monkeypatch, *words, tmp_path / "kept", "--budget", "40ms", "--latency-batch", 2) == 0
    results = json.loads(capsys.readouterr().out)
    found = results["latency"]
    assert (found["target_ms"], found["batch_size"], found["met"]) == (40.0, 2, True)
    assert found["budget"] in [row["budget"] for row in results["results"]]
    kept = from_pretrained(tmp_path / "kept")
    assert kept.budget == found["budget"]
    assert kept.results["latency"] == found
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "Milliseconds of a batch of 2" in card
    assert all(f"| {row['budget']:.3f} | {row['latency_ms']['p50']:.2f} |" in card for row in found["table"])
    assert command(monkeypatch, *words, tmp_path / "missed", "--budget", "1ms") == 1
    captured = capsys.readouterr()
    assert "budget 1ms: found" in captured.err
    assert not json.loads(captured.out)["latency"]["met"]
    assert command(monkeypatch, *words, tmp_path / "bad", "--budget", "soon") == 2
    assert "expected a share" in refused(capsys.readouterr())
