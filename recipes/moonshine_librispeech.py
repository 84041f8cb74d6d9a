"""Moonshine-tiny on LibriSpeech: the encoder made adaptive without transcripts, then taught by its teacher alone.

Command:   python recipes/moonshine_librispeech.py --output runs/moonshine
           python recipes/moonshine_librispeech.py --variants label-free --output runs/moonshine
           python recipes/moonshine_librispeech.py --smoke      FSDD, two layers, random weights: only that it runs
Shows:     word error rate at several budgets of the encoder, dense beside
           label-free    `--phases none`: frames merged, gates fitted on unlabelled audio; with its controls at equal
                         MACs: static width with the same merging, merging alone
           widths        the same without merging (`--merge none`): gates alone
           trained       distill, gates, finetune against the teacher alone
Data:      76 unlabelled recordings (13 min) to fit on, 100 to test on; nothing is chosen on the latter.
Seed:      0.
Result:    docs/results.md, "Speech".
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _common import Rows, assets, parser, start
from _speech import COLUMNS, SpeechBench
from fsdd_wav2vec2 import untrained

from acmize.hf_models import Processor
from acmize.models import load_model
from acmize.recipe import resolve

VARIANTS: dict[str, dict[str, Any]] = {
    "label-free": {"phases": ()},
    "widths": {"phases": (), "merge": "none"},
    "trained": {"train": {"epochs": 6, "lr": 3e-5, "accumulate": 4}, "losses": {"task": 0.0, "budgets": (0.5, 0.95)}},
}
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "vocab_size": 13, "pad_token_id": 0,
}  # fmt: skip


def main() -> None:
    """Convert each variant, table."""
    made = parser(__doc__ or "", __file__, budgets=(0.75, 0.6, 0.5))
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = made.parse_args()
    options = start(args, __file__)
    dense, data = _model_and_data(args.smoke)
    limit = 8 if args.smoke else args.limit
    rows = Rows(args, __file__)
    bench = SpeechBench(rows, dense, data, limit)
    for name in args.variants:
        fixed = {"budget": 0.9, "budgets": args.budgets, "limit": limit}
        recipe = resolve(options, VARIANTS[name], fixed, {"train": {"epochs": 1}} if args.smoke else {})
        bench.adaptive(name, args.output / name, recipe, args.budgets, controls=name == "label-free")
    rows.show(COLUMNS)


def _model_and_data(smoke: bool) -> tuple[Any, str]:
    if not smoke:
        return load_model(str(assets() / "models" / "moonshine_tiny_en")), str(assets() / "data" / "librispeech_mini")
    torch.manual_seed(0)
    dense: Any = tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(**TINY)).eval()
    with tempfile.TemporaryDirectory() as folder:
        words = untrained(Path(folder), 0).processor.tokenizer
    dense.processor = Processor(tf.Wav2Vec2FeatureExtractor(sampling_rate=16000), words)
    return dense, str(assets() / "data" / "fsdd")


if __name__ == "__main__":
    main()
