"""`acmize quickstart`, shortened: the same way on the same data with fewer steps. The full one is a command of CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short import command, same_state

from acmize import quickstart
from acmize.hub import from_pretrained
from acmize.quickstart import BATCH, BUDGETS, latency_ms
from acmize.quickstart_model import digits
from acmize.recipe import resolve

SHORT = {"distill": {"epochs": 1, "tokens": 64}, "gates": {"steps": 20, "images": 60, "rounds": 1}, "limit": 300}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def less(options: dict[str, Any]) -> Any:
        asked.append(resolve(options))
        return resolve(options, SHORT, {"train": {"epochs": 1}})

    monkeypatch.setattr(quickstart, "resolve", less)
    return asked


def test_the_table_and_what_is_left(
    short: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "result"
    assert command(monkeypatch, "quickstart", "-o", folder) == 0
    shown = capsys.readouterr().out
    for column in ("budget", "MACs ratio", "top-1 %", "ms/image", "speedup", "dense"):
        assert column in shown
    model = from_pretrained(folder)
    rows = model.results["results"]
    assert tuple(row["budget"] for row in rows) == BUDGETS
    assert all(row["latency_ms"] > 0 for row in (model.results["dense"], *rows))
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert short[0].train.hflip == 0, "a flipped 2 is no 2"
    assert short[0].budget == 0.5


def test_other_folders_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr(quickstart, "run", lambda _folder: pytest.fail("worked"))
    assert command(monkeypatch, "quickstart", "-o", tmp_path) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


def test_latency_is_of_one_image() -> None:
    from acmize.models import load_model

    model = load_model("acmize_vit_digits")
    before = load_model("acmize_vit_digits")
    images, _ = digits("test")
    assert len(images) >= BATCH
    assert 0 < latency_ms(model, images, rounds=2) < 50
    assert same_state(model, before)
