"""A small wav2vec2 trained from scratch on spoken digits (FSDD) with CTC, then made adaptive under its own teaching.

Command:   python recipes/fsdd_wav2vec2.py            writes runs/fsdd_wav2vec2
           python recipes/fsdd_wav2vec2.py --mlp-only    only the MLPs, as in arXiv 2312.10193
           python recipes/fsdd_wav2vec2.py --smoke       48 recordings, one epoch: only that it runs
Data:      2700 training and 300 test recordings of 6 speakers, 8 kHz (takes 0 to 4 of each are the test split).
Model:     2 convolutions (a frame each 20 ms), 4 pre-norm layers, d = 192, 4 heads, the ten words as CTC labels. The
           convolutions start as a spectrum, `as_spectrum_`: 2700 recordings are few to learn one from. For half of the
           epochs one CTC path is taught, the word where its energy is and blanks elsewhere (`alignment_loss`), then
           all of them: CTC alone takes long to learn that a word is said once.
Result:    see docs/results.md, "Speech".
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _common import Rows, assets, parser, start
from _speech import COLUMNS, SpeechBench
from torch import Tensor
from torch.nn import functional as F

from acmize.audio import AudioSet, Utterance, open_audio
from acmize.hf_models import Processor
from acmize.models import load_model
from acmize.phases._loop import FitConfig, fit
from acmize.recipe import TrainOptions, resolve
from acmize.speech import Listener
from acmize.speech_training import training

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODEL: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768,
    "conv_dim": (128, 128), "conv_kernel": (200, 3), "conv_stride": (80, 2), "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 8, "layerdrop": 0.0,
    "apply_spec_augment": False, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "vocab_size": len(WORDS) + 3,
    "pad_token_id": 0,
}  # fmt: skip
EPOCHS, LR, BATCH = 50, 1e-3, 16
PHASE_3 = 6  # epochs of it
FRAME = math.prod(MODEL["conv_stride"])  # samples


def main() -> None:
    """Train, convert, table."""
    made = parser(__doc__ or "", __file__, budgets=(0.75, 0.5, 0.25))
    made.add_argument("--mlp-only", action="store_true", help="leave the projections dense, as the paper did")
    args = made.parse_args()
    options = start(args, __file__)
    data = str(assets() / "data" / "fsdd")
    limit = 48 if args.smoke else args.limit
    dense = _dense(args.output / f"dense-{args.seed}", data, args.seed, limit, 1 if args.smoke else EPOCHS)
    rows = Rows(args, __file__)
    bench = SpeechBench(rows, dense, data, limit, size=16)
    recipe = resolve(
        options,
        {"budget": 0.5, "budgets": args.budgets, "limit": limit, "batch_size": 16, "merge": "none"},
        {"train": {"epochs": 1 if args.smoke else PHASE_3}},
        {"acm": {"gate_hidden": 8, "projections": "none" if args.mlp_only else "rotated"}},
    )  # fmt: skip
    bench.adaptive("adaptive", args.output / f"adaptive-{args.seed}", recipe, args.budgets, controls=True)
    rows.show(COLUMNS)


def _dense(folder: Path, data: str, seed: int, limit: int | None, epochs: int) -> Any:
    """The trained model in `folder`, trained now where there is none."""
    if not (folder / "config.json").exists():
        model = untrained(folder, seed)
        as_spectrum_(*(layer.conv.weight.data for layer in model.wav2vec2.feature_extractor.conv_layers), 8000)
        splits = open_audio(data, limit=limit)
        _train(model, splits.audio(splits.split("train"), "train", 8000), seed, epochs)
        model.save_pretrained(folder)
        model.processor.save(folder)
    return load_model(str(folder))


def as_spectrum_(first: Tensor, second: Tensor, rate: int) -> None:
    """Fill the weights (channels, 1, taps) and (out, channels, taps) of two convolutions.

    The first: windowed cosines, sines, and their negatives, of norm 1, from 80 Hz on, equally far apart in mels. Behind
    a rectifier the four of a frequency add up to its magnitude, whatever the phase: the second takes them alike.
    """
    channels, _, taps = first.shape
    low, high = (2595 * math.log10(1 + f / 700) for f in (80, 0.475 * rate))
    frequency = 700 * (10 ** (torch.linspace(low, high, channels // 4)[:, None] / 2595) - 1)
    angle = 2 * math.pi * frequency * (torch.arange(taps) - (taps - 1) / 2) / rate
    filters = F.normalize(torch.cat([angle.cos(), angle.sin()]) * torch.hann_window(taps, periodic=False), dim=1)
    first.copy_(torch.cat([filters, -filters])[:, None])
    second.copy_(second[:, : channels // 4].repeat(1, 4, 1))


def alignment_loss(logits: Tensor, valid: Tensor, wave: Tensor, words: Tensor) -> Tensor:
    """-log of the probability of one CTC path, mean over recordings of one word each.

    Args:
        logits: (B, T, C), class 0 the blank.
        valid: (B,) frames that are no padding.
        wave: (B, samples), zero where padded.
        words: (B,) classes; each belongs to the frame at the centre of its recording's energy.
    """
    energy = F.avg_pool1d(wave[:, None].square(), FRAME)[:, 0]
    centre = (energy * (torch.arange(energy.shape[1]) + 0.5)).sum(1) / energy.sum(1)
    path = torch.zeros(logits.shape[:2], dtype=torch.long)
    path[torch.arange(len(path)), centre.long().clamp_max(logits.shape[1] - 1)] = words
    lost = F.cross_entropy(logits.float().mT, path, reduction="none")
    return (lost * (torch.arange(logits.shape[1]) < valid[:, None])).sum(1).mean()


def untrained(folder: Path, seed: int, config: dict[str, Any] = MODEL, rate: int = 8000) -> Any:
    """A random model and its processor for `rate` samples a second, whose vocabulary is written into `folder`."""
    torch.manual_seed(seed)
    model: Any = tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**config)).eval()
    model.processor = _processor(folder, rate)
    return model


def _processor(folder: Path, rate: int) -> Processor:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1}))
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "word_delimiter_token": " ",
        "bos_token": None,
        "eos_token": None,
    }
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **names)
    tokenizer.add_tokens(list(WORDS))  # numbered behind those two and the space
    return Processor(tf.Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True), tokenizer)


def _varied(utterance: Utterance, draw: torch.Generator) -> Utterance:
    """Spoken up to a tenth slower or faster, louder or softer, with up to 0.1 s of silence around it."""
    speed, gain, before, after = torch.rand(4, generator=draw).tolist()
    length = round(len(utterance.wave) * (0.9 + 0.2 * speed))
    wave = F.interpolate(utterance.wave[None, None], length, mode="linear")[0, 0] * (0.5 + gain)
    return replace(utterance, wave=F.pad(wave, (round(800 * before), round(800 * after))))


def _train(model: Any, data: AudioSet, seed: int, epochs: int) -> None:
    listener, utterances = Listener(model), list(data)
    size = min(BATCH, len(utterances))
    steps = len(utterances) // size

    def batches(epoch: int) -> Any:
        # Not by length, as recordings of a kind are as long: the classes of a batch would swing.
        draw = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(len(utterances), generator=draw)[: steps * size].view(steps, size).tolist():
            some = [_varied(utterances[i], draw) for i in rows]
            labels = [torch.tensor(listener.processor.tokenizer(u.text).input_ids) for u in some]
            yield listener.inputs(some).tensors, torch.nn.utils.rnn.pad_sequence(labels, True, -100)

    def loss(batch: Any, step: int) -> dict[str, Tensor]:
        inputs, labels = batch
        if step >= epochs * steps // 2:
            return {"loss": model(**inputs, labels=labels).loss}
        frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
        return {"loss": alignment_loss(model(**inputs).logits, frames, inputs["input_values"], labels[:, 0])}

    config = FitConfig(epochs=epochs, lr=LR, weight_decay=0.01, warmup=0.1, seed=seed)
    masking = TrainOptions(mask_time=0.05, mask_channels=0.1)
    with training(model, masking, whole=True):
        model.train()
        fit(name="dense", model=model, loss=loss, batches=batches, steps_per_epoch=steps, config=config)
        model.eval()


if __name__ == "__main__":
    main()
