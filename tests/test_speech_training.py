"""Phase 3 on speech: what transcripts teach, what stays frozen, what is masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers as tf
from datasets import DatasetDict
from test_speech import OPTIONS, _tokenizer
from tiny_speech import HOSTS, SIZES, _ctc, inputs_for, logits
from torch import nn

from acmize import AcmizeError
from acmize.api import convert
from acmize.audio import Utterance, open_audio
from acmize.hf_models import Processor
from acmize.hosts_speech import front_end
from acmize.losses import ctc_loss
from acmize.phases.finetune import undisturbed
from acmize.recipe import TrainOptions, resolve
from acmize.speech import Listener, Speech
from acmize.speech_training import masks_of, training


def heard(name: str, folder: Path) -> Any:
    """A tiny model with a processor."""
    model = _ctc("Wav2Vec2", **SIZES, do_stable_layer_norm=True)() if name == "ctc" else HOSTS["moonshine"]()
    features = tf.Wav2Vec2FeatureExtractor(sampling_rate=8_000, return_attention_mask=True, do_normalize=False)
    model.processor = Processor(features, _tokenizer(folder, name))
    return model


def utterances(*texts: str | None) -> list[Utterance]:
    generator = torch.Generator().manual_seed(0)
    return [
        Utterance(torch.randn(3000 + 500 * i, generator=generator), text, ("train", i)) for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with transcripts in train, one of them unknown."""
    root, rng = tmp_path_factory.mktemp("told"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        (root / split).mkdir()
        rows = ["file_name,transcription"]
        for i in range(count):
            soundfile.write(root / split / f"{i}.flac", 0.2 * rng.normal(size=3000 + 300 * i).clip(-4, 4), 8000)
            rows.append(f"{i}.flac," + ("" if i == 3 else "a bad cab"))
        (root / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


# --- losses and labels ----------------------------------------------------------------------------------------


def test_ctc_counts_real_frames_and_known_transcripts_alone() -> None:
    x = torch.randn(3, 10, 5)
    frames, labels = torch.tensor([10, 6, 8]), torch.tensor([[1, 2, 3], [4, 4, -1], [-1, -1, -1]])
    parts = [
        F.ctc_loss(x[i, :n].log_softmax(-1), torch.tensor(ids), torch.tensor(n), torch.tensor(len(ids)))
        for i, n, ids in ((0, 10, [1, 2, 3]), (1, 6, [4, 4]))
    ]
    found = ctc_loss(x, frames, labels, 0)
    assert found == pytest.approx(float(sum(parts)) / 2, rel=1e-5)  # each already a label
    noisy = x.clone()
    noisy[1, 6:], noisy[2] = 9.0, -9.0
    assert not torch.equal(noisy, x)
    assert ctc_loss(noisy, frames, labels, 0) == pytest.approx(float(found))
    assert ctc_loss(x, frames, torch.full((3, 2), -1), 0) == 0


def test_labels_of_a_ctc_model(tmp_path: Path) -> None:
    listener = Listener(heard("ctc", tmp_path))
    inputs, labels = listener.taught(utterances("a b!", None, "C"))
    assert labels is not None
    assert labels.tolist() == [[3, 2, 4], [-1, -1, -1], [5, -1, -1]]  # upper-cased for this vocabulary, "!" left out
    assert inputs.counts is not None
    assert listener.taught(utterances(None))[1] is None


def test_a_decoder_is_fed_the_transcript_and_learns_it(tmp_path: Path) -> None:
    model = heard("seq2seq", tmp_path)
    listener = Listener(model)
    one, _ = utterances("w5", None)
    (inputs, labels) = listener.taught([one])
    end, start = model.config.eos_token_id, model.config.decoder_start_token_id
    assert labels is not None
    assert labels.tolist() == [[5, end]]
    assert inputs.tensors["decoder_input_ids"].tolist() == [[start, 5]]
    silent = listener.taught(utterances(None))
    assert silent[1] is None
    said = listener.said(utterances(None)[0])
    assert silent[0].tensors["decoder_input_ids"].tolist() == [[start, *said[:-1].tolist()]]
    with pytest.raises(AcmizeError, match="found no token of it"):
        Listener(heard("ctc", tmp_path)).target(utterances("???")[0])


@pytest.mark.parametrize("kind", ["ctc", "seq2seq"])
def test_the_task_of_transcripts(kind: str, tmp_path: Path, recordings: Path) -> None:
    model = heard(kind, tmp_path)
    recipe = resolve({**OPTIONS, "losses": {"task": 1.0}})
    speech = Speech(str(recordings), model, recipe)
    assert speech.has_labels
    if kind == "seq2seq":
        texts = "w3", "w4"
        inputs, labels = Listener(model).taught(utterances(*texts)[:1])
    else:
        epoch, _ = speech.epochs(speech.augmented, 0)
        inputs, labels = next(iter(epoch(0)))
    found = logits(model, inputs)
    loss = speech.task(found, inputs, labels)
    assert loss > 0
    if kind == "seq2seq":
        assert labels is not None
        expected = F.cross_entropy(found[0], labels[0])
    else:
        given = labels.masked_fill(labels < 0, -100)
        known = (labels >= 0).any(1)
        assert known.any()
        model.config.ctc_loss_reduction = "mean"
        expected = model(**inputs[known].tensors, labels=given[known]).loss
    torch.testing.assert_close(loss, expected)
    assert speech.task(found, inputs, None) == 0


# --- what training leaves alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav2vec2", "hubert pre-norm", "wavlm", "data2vec", "moonshine", "whisper", "ast"])
def test_front_ends(name: str) -> None:
    """Frozen inside, trained as before after it; masks in train mode alone; nothing is dropped."""
    model = HOSTS[name]()
    front = front_end(model)
    layers = [model.get_submodule(path) for path in front.modules]
    parameters = [p for layer in layers for p in layer.parameters()]
    assert parameters
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    for place in (model.config, *model.modules()):
        for drop in ("layerdrop", "dropout", "attention_dropout", "activation_dropout"):
            if drop in vars(place) and isinstance(getattr(place, drop), float):
                setattr(place, drop, 1.0 if drop == "layerdrop" else 0.5)
    batch = inputs_for(model)
    with torch.no_grad():
        plain = logits(model, batch)
        model.train()
        with training(model, TrainOptions(), whole=True):
            assert not torch.allclose(logits(model, batch), logits(model, batch))
        with training(model, TrainOptions()), undisturbed(model):
            assert all(p.requires_grad is front.trained for p in parameters)
            torch.testing.assert_close(logits(model, batch), plain)
        with training(model, TrainOptions(mask_time=0.5, mask_channels=0.3)), undisturbed(model):
            torch.manual_seed(0)
            masked, other = logits(model, batch), logits(model, batch)
            assert not torch.allclose(masked, plain)
            assert not torch.allclose(masked, other)
            model.eval()
            torch.testing.assert_close(logits(model, batch), plain)
        model.train()
        assert all(p.requires_grad for p in parameters)
        assert all(m.layerdrop == 1.0 for m in model.modules() if hasattr(m, "layerdrop"))
        assert not model.get_submodule(front.tap)._forward_hooks
        assert not model.get_submodule(front.tap)._forward_pre_hooks


def test_masks_are_stretches_of_bounded_length() -> None:
    torch.manual_seed(0)
    x = 5 + torch.rand(64, 20, 100)
    hidden = (masks_of(TrainOptions(mask_time=0.3, masks=1))(x) != x).float().mean((1, 2))
    assert 0 < hidden.mean() < 0.3
    assert hidden.max() <= 0.3
    y = masks_of(TrainOptions(mask_channels=0.2, masks=1))(x) != x
    assert (y.any(1) == y.any(1)[:, :1]).all()  # whole channels
    assert 0 < y[:, :, 0].float().mean(1).max() <= 0.2


def test_finetuning_with_transcripts_alone(tmp_path: Path, recordings: Path) -> None:
    dense = heard("ctc", tmp_path)
    losses = {"task": 1.0, "teacher": 0.0, "features": 0.0}
    train = {"epochs": 2, "interpolate": False, "mask_time": 0.2, "mask_channels": 0.2}
    made = convert(
        dense, data=str(recordings), phases=("gates", "finetune"), **{**OPTIONS, "losses": losses, "train": train}
    )
    before, after = dense.state_dict(), made.state_dict()
    front = tuple(f"{path}." for path in front_end(dense).modules)
    same = {k: torch.equal(v, after[k]) for k, v in before.items() if k in after and v.is_floating_point()}
    assert all(same[k] for k in same if k.startswith(front))
    assert not same["lm_head.weight"]
    silent = DatasetDict(train=open_audio(recordings).split("train").remove_columns("transcription"))
    with pytest.raises(AcmizeError, match="found no labels"):
        convert(dense, data=silent, phases=("finetune",), **{**OPTIONS, "losses": losses})
