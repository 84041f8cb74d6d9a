"""The report of a speech model: what each frame ran, and how it is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from test_report import Reader
from tiny_speech import HOSTS, adapted
from torch import nn

from acmize.evaluate_speech import mean_choices
from acmize.gates import gates_of
from acmize.hf_models import Processor
from acmize.hub import base_of, make_adaptive
from acmize.inputs import forward
from acmize.phases.calibrate import Calibration
from acmize.recording import record
from acmize.report import write_report
from acmize.report.survey import LEVELS
from acmize.report.survey_speech import envelope, fewer
from acmize.speech import Listener, Utterance

RATE = 8000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    (root / "test").mkdir()
    rows = ["file_name,transcription"]
    for i in range(3):
        wave = rng.normal(size=4000 + 800 * i) * np.where(np.arange(4000 + 800 * i) % 2000 < 1000, 0.2, 1e-3)
        soundfile.write(root / "test" / f"{i}.flac", wave.clip(-1, 1), RATE)
        rows.append(f"{i}.flac,A B")
    (root / "test" / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny CTC model whose random gates choose differently for different frames."""
    torch.manual_seed(0)
    dense = HOSTS["wav2vec2"]()
    made, plan = adapted(dense)
    for gate in gates_of(made):
        for name, p in gate.named_parameters():
            nn.init.normal_(p, std=1.0 if "weight" in name else 0.3)
        gate.fc2.bias.data -= 10  # damages of about the price of the learners
    table = Calibration(budgets=(1.0, round(plan.budget_range[0], 3)), dials=(0.6, 0.72))
    made = make_adaptive(made.eval(), plan, table, base_of(dense), {"dense": {"wer": 1.0, "macs": plan.macs_dense}})
    vocab = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: 3 + i for i, letter in enumerate("ABCDEFGHI")}}
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.json"
    path.write_text(json.dumps(vocab))
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(path), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None)
    made.processor = Processor(tf.Wav2Vec2FeatureExtractor(sampling_rate=RATE), tokenizer)
    return made


def stops(model: Any) -> list[float]:
    """A small budget and a large one."""
    return [round(model.plan.budget_range[0] + 0.02, 3), 0.97]


@pytest.fixture(scope="module")
def page(model: Any, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(model, path, str(recordings), budgets=stops(model)[::-1])
    return path


def values(letters: str) -> torch.Tensor:
    return torch.tensor([LEVELS.index(letter) / 63 for letter in letters])


def test_frames_and_costs_are_those_of_the_model(model: Any, page: Path, recordings: Path) -> None:
    made = json.loads(Reader(page.read_text("utf-8")).block("script application/json"))["survey"]
    assert (made["samples"], made["split"], made["dense_is"]) == (3, "test", "full width")
    assert [level["budget"] for level in made["levels"]] == stops(model)
    wave = torch.from_numpy(soundfile.read(recordings / "test" / "0.flac", dtype="float32")[0])
    batch = Listener(model).inputs([Utterance(wave, None, ("test", 0))])
    shown = made["recordings"][0]
    assert shown["seconds"] == len(wave) / RATE
    for stop, budget in enumerate(stops(model)):
        model.set_budget(budget)
        with torch.no_grad(), record(model, 1) as seen:
            forward(model, batch)
        shares = mean_choices(seen, model.plan, 0)
        assert shares.std() > 0.01
        assert (values(shown["frames"][stop]) - shares).abs().max() < 0.01
        with torch.no_grad():
            cost = model.with_compute(batch)[1].item()
        assert shown["cost"][stop] == pytest.approx(cost, abs=1e-4)
        whole = sum(r["cost"][stop] * r["seconds"] for r in made["recordings"])
        assert made["levels"][stop]["macs_ratio"] == pytest.approx(whole / 1.8, abs=0.02)
    assert shown["frames"][0] != shown["frames"][1]
    assert max(values(shown["wave"])) == 1


def test_envelopes_and_frames_are_no_longer_than_can_be_seen() -> None:
    wave = torch.zeros(10_000)
    wave[5_010] = -0.5
    found = envelope(wave)
    assert len(found) == 400
    assert found.argmax() == 200
    assert found.max() == 1
    assert torch.equal(fewer(torch.tensor([0.25, 0.5])), torch.tensor([0.25, 0.5]))
    assert fewer(torch.rand(1000)).shape == (400,)


def test_the_slider_colours_the_waveform(browser: Any, page: Path) -> None:
    tab, said = browser.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    drawn = 'document.querySelector("#recordings canvas").toDataURL()'
    low = tab.evaluate(drawn)
    tab.focus("#budget")
    tab.keyboard.press("End")
    high = tab.evaluate(drawn)
    tab.keyboard.press("Home")
    assert tab.evaluate(drawn) in (low, high)
    assert {tab.evaluate(drawn), high} != {high}
    assert tab.is_hidden("#inputs")
    assert "recordings" in tab.inner_text("#budget-note")
    assert said == []
    tab.close()
