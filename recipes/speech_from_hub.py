"""Speech models and data sets of the Hub: the settings of the papers, for machines with a network and a GPU.

Command:   python recipes/speech_from_hub.py wav2vec2-base --device cuda --output runs/wav2vec2
           python recipes/speech_from_hub.py xlsr-300m --device cuda --output runs/xlsr
           python recipes/speech_from_hub.py xlsr-300m --model FOLDER --data FOLDER ...    from local copies
           python recipes/speech_from_hub.py wav2vec2-base --smoke                         random weights, FSDD
Settings:  wav2vec2-base   facebook/wav2vec2-base-960h, LibriSpeech train-clean-100 and test-clean: MLPs and
                           projections, three phases, CTC and the teacher
           xlsr-300m       the speech experiment of arXiv 2312.10193: XLS-R-300M finetuned on Common Voice Spanish, MLPs
                           alone, 5 + 1 + 4 epochs; the paper publishes a plot, no numbers
Beside:    dense, static width with the same merging, merging alone.
Result:    not yet run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _common import Rows, assets, parser, start
from _speech import COLUMNS, SpeechBench
from fsdd_wav2vec2 import MODEL, untrained

from acmize.models import load_model
from acmize.recipe import resolve

SETTINGS: dict[str, dict[str, Any]] = {
    "wav2vec2-base": {
        "model": "facebook/wav2vec2-base-960h",
        "data": "openslr/librispeech_asr:clean",
        "options": {"train": {"epochs": 4, "mask_time": 0.05, "mask_channels": 0.1}, "losses": {"task": 0.25}},
    },
    "xlsr-300m": {
        "model": "jonatasgrosman/wav2vec2-large-xlsr-53-spanish",
        "data": "mozilla-foundation/common_voice_17_0:es",
        "options": {
            "acm": {"num_learners": 4, "projections": "none"},
            "distill": {"epochs": 5},
            "gates": {"rounds": 1},
            "train": {"epochs": 4},
            "losses": {"task": 1.0},
        },
    },
}


def main() -> None:
    """Convert, table."""
    made = parser(__doc__ or "", __file__, budgets=(0.75, 0.5, 0.25))
    made.add_argument("setting", choices=SETTINGS, nargs="?", default="wav2vec2-base")
    made.add_argument("--model", help="folder or repository, in place of the setting's")
    made.add_argument("--data", help="folder or data set, in place of the setting's")
    args = made.parse_args()
    options, setting = start(args, __file__), SETTINGS[args.setting]
    limit, more = (12, {"train": {"epochs": 1}, "distill": {"epochs": 1}}) if args.smoke else (args.limit, {})
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            dense: Any = untrained(Path(folder), args.seed, {**MODEL, "num_hidden_layers": 2})
        data = str(assets() / "data" / "fsdd")
    else:
        dense, data = load_model(args.model or setting["model"]), args.data or setting["data"]
    rows = Rows(args, __file__)
    bench = SpeechBench(rows, dense.to(args.device), data, limit, size=8)
    recipe = resolve(
        options, setting["options"], more, {"budget": 0.5, "budgets": args.budgets, "limit": limit, "batch_size": 8}
    )
    bench.adaptive("adaptive", args.output / "adaptive", recipe, args.budgets, controls=True)
    rows.show(COLUMNS)


if __name__ == "__main__":
    main()
