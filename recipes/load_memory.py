"""How much memory a model takes while it is loaded, against its own size.

Command:   python recipes/load_memory.py --output runs/load_memory
           python recipes/load_memory.py --against FOLDER    loading by another checkout of this package, beside it
           python recipes/load_memory.py --smoke             a tiny ViT, a minute
Shows:     for a dense and a converted model, in one file and in shards of 50 MB: by how much the largest resident
           memory rose over what it was before loading, in MB and in sizes of the model. Weights are random.
Data:      none.
Seed:      0.
Hardware:  CPU, one thread.
Time:      see docs/scale.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common as common
import timm
import torch

from acmize.hosts import make_plan
from acmize.hub import base_of, make_adaptive
from acmize.insert import convert_
from acmize.methods.acm import AcmConfig
from acmize.phases.calibrate import Calibration
from acmize.weights import save_weights

# In a process of its own, by the checkout that it is told to import; the first folder is there to import all there is.
WORKER = """
import json, sys
import torch
from acmize import from_pretrained
from acmize.environment import fresh_peak_bytes, peak_bytes
from acmize.models import load_model
torch.set_num_threads(1)
load = from_pretrained if sys.argv[1] == "adaptive" else load_model
for folder in sys.argv[2:]:
    before = fresh_peak_bytes()
    model = load(folder)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    print(json.dumps([size, peak_bytes() - before]))
"""


def save(name: str, kind: str, shard: str, folder: Path) -> Path:
    """A model with random weights, dense or converted."""
    model = timm.create_model(name)
    if kind == "dense":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": name}))
        save_weights(folder, model.state_dict(), shard)
        return folder
    plan, base = make_plan(model, AcmConfig()), base_of(model)
    made = make_adaptive(convert_(model, plan), plan, Calibration(dials=(0.0,), budgets=(1.0,)), base)
    return made.save_pretrained(folder, max_shard_size=shard)


def measured(kind: str, folder: Path, first: Path, package: Path) -> tuple[int, int]:
    """Bytes of a model, and by how many the peak rose while it was loaded."""
    words = [sys.executable, "-c", WORKER, kind, str(first), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(words, cwd=package, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    size, rise = json.loads(done.stdout.splitlines()[-1])
    return size, rise


def main() -> None:
    """The command line."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--against", type=Path, help="root of another checkout, for models in one file")
    args = parser.parse_args()
    common.start(args, __file__)
    torch.manual_seed(args.seed)
    name, rows = "vit_tiny_patch16_224" if args.smoke else args.model, []
    packages = {"here": common.ROOT} | ({} if args.against is None else {"against": args.against.resolve()})
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("dense", "adaptive"):
            first = save("test_vit", kind, "5GB", Path(temporary) / "first")
            for shard in ("5GB", "5MB" if args.smoke else "50MB"):
                folder = save(name, kind, shard, Path(temporary) / "folder")
                for which, package in packages.items():
                    if which == "here" or shard == "5GB":
                        size, rise = measured(kind, folder, first, package)
                        row: dict[str, Any] = {"model": kind, "shards of": shard, "by": which}
                        rows.append({**row, "mb": size / 1e6, "peak_mb": rise / 1e6, "ratio": rise / size})
                        print(json.dumps(rows[-1]), flush=True)
                shutil.rmtree(folder)
            shutil.rmtree(first)
    (args.output / "load_memory.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
