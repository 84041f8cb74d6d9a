"""A small wav2vec2 trained from scratch on spoken digits (FSDD) with CTC, then made adaptive under its own teaching.

Command:   python recipes/fsdd_wav2vec2.py            writes runs/fsdd_wav2vec2
           python recipes/fsdd_wav2vec2.py --mlp-only    only the MLPs, as in arXiv 2312.10193
           python recipes/fsdd_wav2vec2.py --smoke       48 recordings, one epoch: only that it runs
Data:      2700 training and 300 test recordings of 6 speakers, 8 kHz (takes 0 to 4 of each are the test split).
Model:     3 convolutions (a frame each 10 ms), 4 pre-norm layers, d = 128, 4 heads, letters as CTC labels.
Result:    see docs/results.md, "Speech".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _common import Rows, assets, parser, percent, start
from torch import Tensor

from acmize.api import convert
from acmize.audio import AudioSet, buckets, open_audio
from acmize.controls import gates_share, static_width, workload
from acmize.evaluate import evaluate_at, reference
from acmize.hf_models import Processor
from acmize.hub import base_of, from_pretrained
from acmize.models import load_model
from acmize.phases._loop import FitConfig, fit
from acmize.recipe import resolve
from acmize.speech import Listener, Spoken

LETTERS = sorted(set("zeroonetwothreefourfivesixseveneightnine"))
MODEL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "conv_dim": (64, 64, 64), "conv_kernel": (10, 8, 4), "conv_stride": (5, 4, 4), "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 8, "layerdrop": 0.0,
    "apply_spec_augment": False, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True, "vocab_size": len(LETTERS) + 2, "pad_token_id": 0,
}  # fmt: skip
EPOCHS, LR, BATCH = 20, 1e-3, 32


def main() -> None:
    """Train, convert, table."""
    made = parser(__doc__ or "", __file__, budgets=(0.75, 0.5, 0.25))
    made.add_argument("--mlp-only", action="store_true", help="leave the projections dense, as the paper did")
    args = made.parse_args()
    options = start(args, __file__)
    options.pop("train", None), options.pop("batch_size", None)
    data = str(assets() / "data" / "fsdd")
    limit = 48 if args.smoke else args.limit
    dense = _dense(args.output / f"dense-{args.seed}", data, args.seed, limit, 1 if args.smoke else EPOCHS)

    rows, batches = Rows(args, __file__), _test(dense, data, limit)
    answers = reference(dense, batches)
    rows.measure("dense", lambda: {"macs_ratio": 1.0, "agreement": 1.0, **answers.described})
    recipe = resolve(
        options,
        {"budget": 0.5, "budgets": args.budgets, "limit": limit, "batch_size": 16},
        {"train": {"epochs": 1 if args.smoke else 4}},
        {"acm": {"gate_hidden": 8, "projections": "none" if args.mlp_only else "rotated"}},
    )  # fmt: skip
    folder = args.output / f"adaptive-{args.seed}"
    if not (folder / "config.json").exists():
        convert(dense, data=data, recipe=recipe, base=base_of(dense), work=f"{folder}.work", resume=True, output=folder)
    model = from_pretrained(folder)
    work = workload(model, model.plan, (inputs for inputs, _ in batches))
    spare = gates_share(model, model.plan, work)  # a static width needs no gates: their MACs go to learners
    for budget in (b for b in args.budgets if b >= model.plan.budget_range[0]):
        model.set_budget(budget)
        rows.measure(f"gates @ {budget}", lambda: _row(model, batches, answers))
        static = static_width(model, model.plan, budget + spare, work)
        rows.measure(f"static @ {budget}", lambda s=static: _row(model, batches, answers, spare, s))
    rows.show(
        {
            "method": lambda key, _: key,
            "MACs": lambda _, r: f"{r['macs_ratio']:.3f}",
            "WER %": lambda _, r: percent(r["wer"]),
            "agreement %": lambda _, r: percent(r["agreement"]),
        }
    )


def _row(model: Any, batches: Spoken, answers: Any, spare: float = 0.0, choose: Any = None) -> dict[str, Any]:
    found = evaluate_at(model, model.plan, batches, answers, choose)
    found["macs_ratio"] -= spare
    return {k: v for k, v in found.items() if k != "sites"}


def _test(dense: Any, data: str, limit: int | None) -> Spoken:
    splits = open_audio(data, limit=limit)
    return Spoken(splits.audio(splits.split("test"), "test", dense.processor.rate), Listener(dense), 16)


def _dense(folder: Path, data: str, seed: int, limit: int | None, epochs: int) -> Any:
    """The trained model in `folder`, trained now where there is none."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        model = tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**MODEL))
        model.processor = _processor(folder)
        splits = open_audio(data, limit=limit)
        _train(model, splits.audio(splits.split("train"), "train", 8000), seed, epochs)
        model.save_pretrained(folder)
        model.processor.save(folder)
    return load_model(str(folder))


def _processor(folder: Path) -> Processor:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<pad>": 0, "<unk>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "word_delimiter_token": " ",
        "bos_token": None,
        "eos_token": None,
    }
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **names)
    return Processor(tf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True), tokenizer)


def _train(model: Any, data: AudioSet, seed: int, epochs: int) -> None:
    listener, size = Listener(model), min(BATCH, len(data))
    utterances = list(data)
    seconds = [len(u.wave) / data.rate for u in utterances]
    index = {letter: i + 2 for i, letter in enumerate(LETTERS)}

    def batches(epoch: int) -> Any:
        for rows in buckets(seconds, size, seed=seed, epoch=epoch):
            some = [utterances[i] for i in rows]
            labels = [torch.tensor([index[c] for c in (u.text or "").lower()]) for u in some]
            yield listener.inputs(some), torch.nn.utils.rnn.pad_sequence(labels, True, -100)

    def loss(batch: Any, _step: int) -> dict[str, Tensor]:
        return {"loss": model(**batch[0].tensors, labels=batch[1]).loss}

    config, steps = (
        FitConfig(epochs=epochs, lr=LR, weight_decay=0.01, warmup=0.1, seed=seed),
        len(buckets(seconds, size)),
    )
    model.train()
    fit(name="dense", model=model, loss=loss, batches=batches, steps_per_epoch=steps, config=config)
    model.eval()


if __name__ == "__main__":
    main()
