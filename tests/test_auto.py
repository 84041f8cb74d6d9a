"""Adaptive models through the Auto classes and pipelines of transformers, in either order of import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_speech import OPTIONS, recordings, saved  # noqa: F401 - fixtures

import acmize
from acmize import AcmizeError
from acmize.api import convert
from acmize.hub import Adaptive
from acmize.models import load_model


@pytest.fixture(scope="module")
def folder(saved: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An adaptive model, saved."""
    dense: Any = load_model(str(saved))
    if dense.config.is_encoder_decoder:
        dense.generation_config.max_length = 7
    out = tmp_path_factory.mktemp("auto") / "out"
    convert(dense, data=str(recordings), phases=(), output=out, **OPTIONS)
    return out


def test_auto_classes_and_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = acmize.from_pretrained(folder)
    seq2seq = ours.config.is_encoder_decoder
    right, wrong = tf.AutoModelForSpeechSeq2Seq, tf.AutoModelForCTC
    right, wrong = (right, wrong) if seq2seq else (wrong, right)
    made: Any = right.from_pretrained(folder)
    assert isinstance(made, Adaptive)
    assert isinstance(made, tf.MoonshineForConditionalGeneration if seq2seq else tf.Wav2Vec2ForCTC)
    assert made.budget == ours.budget
    with pytest.raises(AcmizeError, match="does not open"):
        wrong.from_pretrained(folder)
    with pytest.raises(AcmizeError, match="found dtype"):
        right.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(AcmizeError, match="device_map"):
        right.from_pretrained(folder, device_map="auto")

    pipe: Any = tf.pipeline("automatic-speech-recognition", model=str(folder))
    assert isinstance(pipe.model, Adaptive)
    assert pipe.type == ("seq2seq" if seq2seq else "ctc")
    wave = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    options = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 5}} if seq2seq else {}
    text = pipe(wave.numpy(), **options)["text"]
    features = ours.processor.features(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        if seq2seq:
            ids = ours.generate(input_values=features, max_new_tokens=5, num_beams=1)[0]
        else:
            ids = ours(features).logits.argmax(-1)[0]
    assert text == ours.processor.tokenizer.decode(ids, skip_special_tokens=seq2seq)  # as the pipeline does
    assert text


def test_defaults_of_generation_are_kept(folder: Path) -> None:
    loaded = acmize.from_pretrained(folder)
    if loaded.config.is_encoder_decoder:
        assert loaded.generation_config.max_length == 7


def test_an_adaptive_folder_is_no_dense_model(folder: Path) -> None:
    with pytest.raises(AcmizeError):
        load_model(str(folder))


SCRIPT = """
import sys
{first}
{second}
model = AutoModelForCTC.from_pretrained({folder!r})
print(type(model).__name__, model.budget)
"""
IMPORTS = "import acmize; print('transformers' in sys.modules)", "from transformers import AutoModelForCTC; print('-')"


@pytest.mark.parametrize("reverse", [False, True])
def test_either_order_of_import(folder: Path, reverse: bool) -> None:
    if json.loads((folder / "config.json").read_text())["base"]["architecture"] != "Wav2Vec2ForCTC":
        pytest.skip("once is enough")
    first, second = reversed(IMPORTS) if reverse else IMPORTS
    script = SCRIPT.format(first=first, second=second, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == ("-" if reverse else "False")
    assert done.stdout.split("\n")[2] == "Wav2Vec2ForCTC 0.9"
    alone = SCRIPT.format(first="", second=IMPORTS[1], folder=str(folder))
    refused = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "acmize" in refused.stderr
