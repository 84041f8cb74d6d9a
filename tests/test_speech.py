"""Audio in, word error rates out: data, metric, and the whole way on tiny models and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from tiny_speech import HOSTS, MOONSHINE, SIZES, _ctc

import acmize
from acmize import AcmizeError
from acmize.api import convert, evaluate_saved
from acmize.audio import JoinedAudio, buckets, open_audio
from acmize.evaluate_speech import error_rates, normalise, silent_frames
from acmize.gates import choosing, full_width
from acmize.hf_models import Processor
from acmize.inputs import Inputs, forward
from acmize.methods.token_merging import set_schedule
from acmize.models import load_model
from acmize.recipe import resolve
from acmize.recording import record
from acmize.site_times import SiteTime
from acmize.speech import Speech

OPTIONS: dict[str, Any] = {
    "budget": 0.9,
    "budgets": [0.95],
    "moments": 8,
    "batch_size": 3,
    "holdout": 0.3,
    "acm": {"num_learners": 4, "gate_hidden": 2},
    "gates": {"rounds": 2, "draws": 1, "steps": 20},
    "distill": {"tokens": 64},
    "train": {"epochs": 1, "interpolate": False},
    "losses": {"features": 0.1},
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with pauses of unequal lengths: 8 kHz, train without transcripts, test with."""
    root, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 4)):
        (root / split).mkdir()
        rows = ["file_name,transcription" if split == "test" else "file_name"]
        for i in range(count):
            wave = rng.normal(size=1500 + 400 * i) * np.where(np.arange(1500 + 400 * i) % 1000 < 500, 0.2, 1e-4)
            soundfile.write(root / split / f"{i}.flac", wave.clip(-1, 1), 8000)
            rows.append(f"{i}.flac" + (",A B!" if split == "test" else ""))
        (root / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def _tokenizer(folder: Path, kind: str) -> Any:
    if kind == "ctc":
        vocab = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: 3 + i for i, letter in enumerate("ABCDEFGHI")}}
        (folder / "vocab.json").write_text(json.dumps(vocab))
        path = str(folder / "vocab.json")
        return tf.Wav2Vec2CTCTokenizer(path, pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None)
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(20)}
    return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


@pytest.fixture(scope="module", params=["ctc", "seq2seq"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its processor, as transformers saves it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = _ctc("Wav2Vec2", **SIZES)() if request.param == "ctc" else HOSTS["moonshine"]()
    model.save_pretrained(folder)
    features = tf.Wav2Vec2FeatureExtractor(sampling_rate=16_000, return_attention_mask=True, do_normalize=False)
    Processor(features, _tokenizer(folder, request.param)).save(folder)
    return folder


# --- data -----------------------------------------------------------------------------------------------------


def test_splits_with_different_columns_are_opened_and_resampled(recordings: Path) -> None:
    splits = open_audio(recordings)
    assert splits.train is not None
    assert (len(splits.train), len(splits.split("test"))) == (9, 4)
    test = splits.audio(splits.split("test"), "test", 16_000)
    plain = splits.audio(splits.split("test"), "test", 8_000)
    assert test[1].text == "A B!"
    assert splits.audio(splits.train, "train", 8_000)[0].text is None
    assert abs(len(test[1].wave) - 2 * len(plain[1].wave)) <= 2
    assert plain[1].wave.dtype == torch.float32
    assert torch.equal(plain[1].wave, torch.from_numpy(soundfile.read(recordings / "test/1.flac", dtype="float32")[0]))
    assert plain.seconds() == pytest.approx([(1500 + 400 * i) / 8000 for i in range(4)])


def test_broken_audio_is_named(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.flac").write_bytes(b"no audio")
    (tmp_path / "train" / "b.flac").write_bytes((recordings / "train/0.flac").read_bytes())
    rows = open_audio(tmp_path)
    with pytest.raises(AcmizeError, match=r"recording 0 of train.*readable audio"):
        rows.audio(rows.split("train"), "train", 8000)[0]
    with pytest.raises(AcmizeError, match="no test split"):
        rows.split("test")


def test_sets_joined_keep_their_keys(recordings: Path) -> None:
    splits = open_audio(recordings)
    train, test = (splits.audio(splits.split(name), name, 8_000) for name in ("train", "test"))
    joined = JoinedAudio(test, train)
    assert len(joined) == 13
    assert [joined[i].key for i in (0, 3, 4, 12)] == [("test", 0), ("test", 3), ("train", 0), ("train", 8)]
    assert torch.equal(joined[4].wave, train[0].wave)
    assert joined.seconds() == [*test.seconds(), *train.seconds()]


def test_few_recordings_held_out_are_not_all_that_budgets_are_calibrated_on(saved: Path, recordings: Path) -> None:
    model: Any = load_model(str(saved))
    few = Speech(str(recordings), model, resolve(OPTIONS))
    assert (len(few.held), len(few.calibration)) == (3, 9)
    assert {few.calibration[i].key for i in range(3)} == {("held out", i) for i in range(3)}


def test_images_are_no_audio() -> None:
    from acmize.quickstart_model import digits_dataset

    splits = open_audio(digits_dataset())
    with pytest.raises(AcmizeError, match="expected one with audio"):
        splits.audio(splits.split("train"), "train", 8000)


def test_buckets_hold_everything_once_and_similar_lengths_together() -> None:
    seconds = np.random.default_rng(0).uniform(1, 20, 200).tolist()
    first, second = (buckets(seconds, 8, seed=0, epoch=e) for e in (0, 1))
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(200))
    assert first != second
    assert first == buckets(seconds, 8, seed=0)
    spread = [max(seconds[i] for i in b) - min(seconds[i] for i in b) for b in first]
    assert sum(spread) / len(spread) < 0.2 * (max(seconds) - min(seconds))


# --- metric ---------------------------------------------------------------------------------------------------


def test_normalised_error_rates() -> None:
    assert normalise("Hello,  well-known World!") == "hello well known world"
    wer, cer = error_rates(["a b c d", "e f"], ["A b, x d", "e"])
    assert wer == pytest.approx(2 / 6)  # one substituted, one deleted
    assert 0 < cer < 1


def test_an_energy_detector() -> None:
    wave = torch.randn(1600) * torch.tensor([1.0, 1e-3]).repeat_interleave(800)
    silent = silent_frames(wave, 10)
    assert silent.tolist() == [False] * 5 + [True] * 5


# --- the whole way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [(), ("distill", "gates", "finetune")], ids=["none", "all"])
def test_convert_save_load_evaluate(saved: Path, recordings: Path, tmp_path: Path, phases: tuple[str, ...]) -> None:
    dense: Any = load_model(str(saved))
    made = convert(dense, data=str(recordings), phases=phases, output=tmp_path / "out", **OPTIONS)
    assert isinstance(made, type(dense))
    assert made.results["samples"] == 4
    rows = made.results["results"]
    assert {row["budget"] for row in rows} == {0.95, 0.9}
    assert all(0 <= row["wer"] and row["choice_speech"] is not None for row in rows)
    assert rows[1]["macs_ratio"] < rows[0]["macs_ratio"]
    assert made.results["dense"]["wer"] is not None

    loaded = acmize.from_pretrained(tmp_path / "out")
    assert loaded.plan == made.plan
    batch = Inputs({"input_values": torch.randn(1, 4000)})
    if dense.config.is_encoder_decoder:
        batch = Inputs({**batch.tensors, "decoder_input_ids": torch.tensor([[1, 5, 6]])})
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch).logits, forward(made, batch).logits)
    again = evaluate_saved(loaded, str(recordings), [0.9])
    assert again["dense_is"] == "full width"
    assert again["results"][0]["macs_ratio"] == pytest.approx(rows[1]["macs_ratio"], abs=1e-6)
    assert again["results"][0]["wer"] == pytest.approx(rows[1]["wer"])


def test_equal_words_at_full_width_and_with_a_cache(saved: Path, recordings: Path) -> None:
    dense: Any = load_model(str(saved))
    if not dense.config.is_encoder_decoder:
        pytest.skip("a CTC model does not generate")
    made = convert(dense, data=str(recordings), phases=(), **OPTIONS)
    wave = torch.randn(1, 4000)
    options = {"max_new_tokens": 8, "do_sample": False}
    set_schedule(made, ())
    with choosing(made, full_width), record(made, 1):
        ours = made.generate(input_values=wave, **options)
    assert torch.equal(ours, dense.generate(input_values=wave, **options))
    made.set_budget(0.9)
    cached, plain = (made.generate(input_values=wave, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_the_batch_that_sites_are_timed_in(saved: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense: Any = load_model(str(saved))
    asked: list[int] = []

    def none_pays(_dense: Any, plan: Any, inputs: Any, _seed: int) -> list[SiteTime]:
        asked.append(len(inputs))
        return [SiteTime((e.fqn,), 1.0, 2.0) for e in plan.entries]

    monkeypatch.setattr("acmize.stages.site_times", none_pays)
    used = 1 if dense.config.is_encoder_decoder else 5  # more than batch_size; Moonshine goes one by one
    with pytest.raises(AcmizeError, match=f"no site pays on this device in batches of {used};"):
        convert(dense, data=str(recordings), phases=(), fit_batch=5, merge="none", **OPTIONS)
    made = convert(dense, data=str(recordings), phases=(), fit_batch=5, merge="budget", **OPTIONS)
    assert asked == [used, used]
    assert not made.plan.entries  # frames are merged, and nothing else
    assert any(made.plan.schedule(0.6))


def test_commands(saved: Path, recordings: Path, tmp_path: Path, run_command: Any) -> None:
    status, told = run_command("plan", saved)
    assert status == 0
    assert "MLPs" in told.out
    options = {k: v for k, v in OPTIONS.items() if k != "budget"}
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    words = ["convert", saved, "--data", recordings, "--budget", 0.9, "--phases", "none", "-o", tmp_path / "out"]
    status, told = run_command(*words, "--config", tmp_path / "options.yaml")
    assert status in (0, 1)  # budgets of so little data may be missed
    assert "WER" in told.out
    status, told = run_command("eval", tmp_path / "out", "--data", recordings, "--budget", 0.9, "--json")
    assert json.loads(told.out)["results"][0]["budget"] == 0.9
    words = ["--data", recordings, "--weights", saved, "--no-compile", "--json"]
    status, told = run_command("verify", tmp_path / "out", *words)
    found = json.loads(told.out)
    assert (status, found["ok"], found["inputs"]) == (0, True, "recordings"), told.out
    assert {c["check"] for c in found["checks"]} >= {"sorted", "sorted, alone", "saved and loaded", "dense"}
    words = ["--data", recordings, "--limit", 3, "--repeats", 1, "--batch-size", 2, "--budget", 0.9]
    status, told = run_command("bench", tmp_path / "out", *words)
    shown = "".join(told.out.split())
    assert (status, "GMACsasecondofaudio" in shown, "timesasfast" in shown) == (0, True, True)


# --- loading --------------------------------------------------------------------------------------------------


def test_only_safetensors_and_known_classes(tmp_path: Path) -> None:
    model = tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(**MOONSHINE))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(AcmizeError, match="safetensors"):
        load_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(AcmizeError, match="expected a speech model"):
        load_model(str(tmp_path))
    with pytest.raises(AcmizeError, match="not to be had"):
        load_model("nobody/nothing")


def test_a_model_without_a_processor(recordings: Path) -> None:
    with pytest.raises(AcmizeError, match="processor"):
        convert(HOSTS["wav2vec2"](), data=str(recordings), phases=(), **OPTIONS)
