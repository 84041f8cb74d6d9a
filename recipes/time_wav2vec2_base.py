"""Time of wav2vec2-base, label-free, at half of its encoder's budget: 10 seconds of speech on a CPU.

Command:   python recipes/time_wav2vec2_base.py --output runs/wav2vec2_time
           python recipes/time_wav2vec2_base.py --output runs/wav2vec2_merged --merge budget    with frames merged
           python recipes/time_wav2vec2_base.py --smoke            two narrow layers, 1 second, under a minute
Shows:     as `acmize bench` for speech: milliseconds of the whole model and of its encoder (the blocks), dense and at
           each budget, and the bound that the front end, which is never cut, puts on the whole.
           The weights are random: time does not depend on them, accuracy means nothing here and is not printed.
Data:      LibriSpeech of ACMIZE_ASSETS, cut to 10 seconds: 8 recordings to fit on, 8 to time on.
Seed:      0.
Hardware:  2 cores of a shared x86-64 machine (AVX-512), nothing beside it.
Versions:  in results.json.

Result:    docs/performance.md, "Speech".
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import _common as common
import soundfile
from fsdd_wav2vec2 import MODEL, untrained

from acmize.api import convert
from acmize.audio import open_audio
from acmize.bench_speech import bench_speech
from acmize.recipe import resolve
from acmize.timing import Setting

BASE: dict[str, Any] = {"vocab_size": 13, "pad_token_id": 0}  # wav2vec2-base is what transformers has as its default
RATE = 16000
WANTED, SECONDS = 8, 10


def cut(source: Path, folder: Path, seconds: float, count: int) -> str:
    """An audio folder with the first `seconds` of `count` recordings a split that are as long."""
    splits = open_audio(source)
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
        waves = (u.wave for u in splits.audio(splits.split(name), name, RATE))
        long = (wave for wave in waves if len(wave) >= seconds * RATE)
        for i, wave in enumerate(islice(long, count)):
            soundfile.write(folder / name / f"{i}.flac", wave[: int(seconds * RATE)].numpy(), RATE)
    return str(folder)


def main() -> None:
    """Convert, time, table."""
    parser = common.parser(__doc__ or "", __file__, budgets=(1.0, 0.5))
    parser.add_argument("--merge", default="auto", help="auto (a CTC model's frames stay apart), or budget")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    options = common.start(args, __file__)
    rows = common.Rows(args, __file__)
    narrow = {**MODEL, "num_hidden_layers": 2}
    seconds, count, repeats = (0.5, 4, 2) if args.smoke else (SECONDS, WANTED, args.repeats)
    source = common.assets() / "data" / ("fsdd" if args.smoke else "librispeech_mini")
    recipe = resolve(
        options, {"phases": (), "budget": 0.5, "budgets": args.budgets, "merge": args.merge, "limit": None}
    )
    setting = Setting(device=args.device, seed=args.seed, repeats=repeats, threads=args.threads)
    with tempfile.TemporaryDirectory() as folder:
        dense = untrained(Path(folder) / "model", args.seed, narrow if args.smoke else BASE, RATE)
        data = cut(source, Path(folder) / "data", seconds, count)
        made = convert(dense, data=data, recipe=recipe)
        found = bench_speech(made, data, budgets=args.budgets, setting=setting)
    for row in found["results"]:
        rows.measure(f"{row['budget']:g}", lambda row=row: row)
    shown = {"whole": lambda r: r, "encoder": lambda r: r["encoder"]}
    columns: dict[str, Any] = {"budget": lambda key, _: key, "MACs": lambda _, r: f"{r['macs_ratio']:.3f}"}
    for name, part in shown.items():
        columns |= {
            f"{name}, ms": lambda _, r, p=part: f"{p(r)['latency_ms']['p50']:.0f}",
            f"{name}, dense ms": lambda _, r, p=part: f"{p(r)['dense_latency_ms']['p50']:.0f}",
            f"{name}, speedup": lambda _, r, p=part: f"{p(r)['speedup']:.2f}",
        }
    rows.show({**columns, "bound of the whole": lambda _, r: f"{r['bound']:.2f}"})


if __name__ == "__main__":
    main()
