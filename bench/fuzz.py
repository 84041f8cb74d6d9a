"""Fuzzing: mutated checkpoints, configurations and media files; each is read or refused by a typed error, nothing else.

    python bench/fuzz.py                                   # 20,000 + 5,000 cases
    python bench/fuzz.py --smoke                           # a few hundred
    python bench/fuzz.py --only media --case 4711          # one case again, with its traceback

A case is decided by its kind and number alone. Cases run in one child process after another (a fork of this one), under
a limit of 2 GB beyond what was mapped before and an alarm each; a child that dies or hangs is replaced. Exit status 1
where a defect was found. The seeds lie in tests/corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "corpus"
MEMORY, SECONDS, SILENCE = 2 << 30, 20, 600  # bytes of a child; CPU seconds of a case; seconds without a word of it

Outcome = str  # "read", "refused" or "defect: ..."


class Late(BaseException):
    """The alarm of a case."""


# --- mutations ------------------------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    None, True, False, "", "x", "0", 0, 1, -1, 2, 3, 255, 65_536, 2**31, 2**63, 10**12, 10**400, 0.0, -0.5, 1e-300,
    1e300, float("nan"), float("inf"), [], {}, [None], ["x"], [[]], {"a": 1}, [1] * 1000, [0.5, 0.5],
    "../../etc/passwd", "/dev/zero", "\x00", "\ud800", "\x1b[2J", "x" * 5000, "hf-hub:someone/else", "blocks.0", "head",
    "__class__", "self", "norm", "mlp", "qkv", "pretrained",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value, itself included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, inner in items for p in places(inner, (*path, key)))]


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with one thing wrong."""
    path = draw.choice(places(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    now = parent[path[-1]] if path else value
    new = draw.choice(WRONG)
    what = draw.randrange(8)
    if what == 0 and isinstance(now, int | float):
        new = draw.choice((now * -1, now * 1000, now + 1, now - 1, now / 3, str(now), now * 2))
    elif what == 1 and isinstance(now, list):
        new = draw.choice((now * 2, now[:-1], now[::-1], [*now, draw.choice(WRONG)], now[:1] * 10_000))
    elif what == 2 and isinstance(now, dict) and now:
        key = draw.choice(list(now))
        new = {k: v for k, v in now.items() if k != key} | draw.choice(({}, {key + "x": now[key]}, {"evil": 1}))
    elif what == 3:
        other = value
        for key in draw.choice(places(value)):
            other = other[key]
        new = json.loads(json.dumps(other))
    elif what == 4:
        new = now
        for _ in range(draw.choice((3, 30))):
            new = draw.choice(([new], {"a": new}))
    elif what == 5 and path and isinstance(parent, dict):
        del parent[path[-1]]
        return value
    if not path:
        return new
    parent[path[-1]] = new
    return value


def spelled(value: Any, draw: random.Random) -> bytes:
    """JSON text, now and then with what a dictionary cannot hold: a key twice, a deep nest, an endless number."""
    text = json.dumps(value)
    what = draw.randrange(20)
    if what == 0 and '": ' in text:
        start = draw.choice([i for i in range(len(text)) if text.startswith('"', i)])
        text = text[:start] + '"schema": 7, ' * draw.randrange(1, 3) + text[start:]
    elif what == 1:
        depth = draw.choice((1000, 100_000))
        text = text.replace("null", "[" * depth + "]" * depth, 1)
    elif what == 2:
        text = text.replace("1", draw.choice(("1e999", "-1e999", "1" * 5000, "1e-999", "0x1", "01")), 1)
    elif what == 3:
        return text.encode(draw.choice(("utf-16", "utf-8-sig", "utf-32")), errors="surrogatepass")
    return text.encode("utf-8", errors="surrogatepass")


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them wrong, missing or added."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, size = draw.randrange(len(made) + 1), draw.choice((1, 4, 64))
        what = draw.randrange(8)
        if what == 0 and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            made[at : at + size] = draw.randbytes(size)
        elif what == 2:
            del made[at:]
        elif what == 3:
            made[at:at] = draw.randbytes(size)
        elif what == 4:
            del made[at : at + size]
        elif what == 5:
            made[at : at + size] = bytes([draw.choice((0, 255))]) * size
        elif what == 6:
            width, number = draw.choice((("<I", 2**31), (">I", 2**32 - 1), ("<Q", 2**62), (">H", 65_535), ("<H", 1)))
            made[at : at + struct.calcsize(width)] = struct.pack(width, number)
        else:
            made = bytearray(made[at:]) if draw.random() < 0.2 else made + made[:size]
    return bytes(made)


def wrong_json(text: bytes, draw: random.Random) -> bytes:
    """A JSON file changed in its values, or in its bytes."""
    if draw.random() < 0.15:
        return damaged(text, draw)
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = changed(value, draw)
    try:
        return spelled(value, draw)
    except ValueError:  # a value was put into itself
        return damaged(text, draw)


def wrong_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    if draw.random() < 0.4:
        return damaged(data, draw)
    size = struct.unpack("<Q", data[:8])[0]
    header = wrong_json(data[8 : 8 + size], draw)
    told = draw.choice((len(header), len(header), len(header), size, len(header) + 1, 0, 2**40, 2**63))
    return struct.pack("<Q", told) + header + data[8 + size :]


# --- cases ----------------------------------------------------------------------------------------------------


class Checkpoints:
    """Saved models, training states, recipes and dense folders, one file wrong in each."""

    def __init__(self, folder: Path) -> None:
        import torch

        from acmize.checkpoint import save_training_state
        from acmize.hub import from_pretrained

        self.model, self.dense, self.state = folder / "model", folder / "dense", folder / "state"
        self.shards = folder / "shards"
        shutil.copytree(CORPUS / "schema1", self.model)
        from_pretrained(self.model).save_pretrained(self.shards, max_shard_size="10KB")
        config = json.loads((self.model / "config.json").read_text())["base"]
        self.dense.mkdir()
        dense = {"architecture": config["architecture"], "model_args": config["kwargs"], "num_classes": 5}
        (self.dense / "config.json").write_text(json.dumps({**dense, "pretrained_cfg": config["pretrained_cfg"]}))
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.net(torch.ones(2, 3)).square().sum().backward()
        self.optimizer.step()
        self.ema = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        held: dict[str, Any] = {"model": self.net, "optimizer": self.optimizer, "ema": self.ema}
        save_training_state(self.state, step=1, epoch=0, extra={"logs": []}, **held)
        self.held = held
        folders = (self.model, self.shards, self.dense, self.state)
        self.kept = {p: p.read_bytes() for f in folders for p in f.iterdir()}
        self.names = sorted(str(p) for p in folder.rglob("*"))
        self.folder = folder

    def __call__(self, draw: random.Random) -> str:
        """Read one wrong file; returns which kind it was."""
        kinds = (self._saved, self._weights, self._sharded, self._training, self._recipe, self._dense)
        kind = draw.choices(kinds, (45, 15, 10, 15, 10, 5))
        try:
            kind[0](draw)
        finally:
            for path, data in self.kept.items():
                if path.stat().st_size != len(data) or path.read_bytes() != data:
                    path.write_bytes(data)
        assert sorted(str(p) for p in self.folder.rglob("*")) == self.names, "something was written"
        return kind[0].__name__.strip("_")

    def _load(self, draw: random.Random, folder: Path | None = None) -> None:
        import torch

        import acmize
        from acmize.hub import model_card
        from acmize.report.page import content, render

        model = acmize.from_pretrained(folder or self.model)
        if draw.random() < 0.1:
            model_card(model)
            render(content(model))
            size = model.base["pretrained_cfg"].get("input_size", ())
            if list(size) == [3, 16, 16]:
                with torch.no_grad():
                    model(torch.zeros(1, *size))

    def _saved(self, draw: random.Random) -> None:
        from acmize.saved import read_saved

        path = self.model / draw.choice(("config.json", "plan.json", "plan.json", "results.json", "recipe.json"))
        path.write_bytes(wrong_json(self.kept[path], draw))
        if path.name in ("results.json", "recipe.json") and draw.random() < 0.8:
            read_saved(self.model)  # the model itself is whole
        else:
            self._load(draw)

    def _weights(self, draw: random.Random) -> None:
        path = self.model / "model.safetensors"
        path.write_bytes(wrong_tensors(self.kept[path], draw))
        self._load(draw)

    def _sharded(self, draw: random.Random) -> None:
        """An index or a shard that is wrong, or one shard in the place of another."""
        files = sorted(self.shards.glob("model*"))
        path, other = draw.choice(files), draw.choice(files)
        if path.suffix == ".json":
            path.write_bytes(wrong_json(self.kept[path], draw))
        else:
            path.write_bytes(self.kept[other] if draw.random() < 0.2 else wrong_tensors(self.kept[path], draw))
        self._load(draw, self.shards)

    def _training(self, draw: random.Random) -> None:
        from acmize.checkpoint import load_training_state

        path = draw.choice([p for p in sorted(self.state.iterdir())])
        wrong = wrong_json if path.suffix == ".json" else wrong_tensors
        path.write_bytes(wrong(self.kept[path], draw))
        load_training_state(self.state, **self.held)

    def _recipe(self, draw: random.Random) -> None:
        from acmize.recipe import read_config, resolve

        path = self.model / "recipe.json"  # JSON is YAML
        path.write_bytes(wrong_json(self.kept[path], draw))
        found = read_config(path)
        resolve({k: v for k, v in found.items() if k not in ("seconds", "data")})

    def _dense(self, draw: random.Random) -> None:
        from acmize.models import architecture

        path = self.dense / "config.json"
        path.write_bytes(wrong_json(self.kept[path], draw))
        architecture(str(self.dense))


class Media:
    """Images through a model's preprocessing, recordings at its rate, and tables that name recordings."""

    def __init__(self, folder: Path) -> None:
        from timm.data.transforms_factory import create_transform

        seeds = sorted((CORPUS / "media").iterdir())
        self.audio = [p.read_bytes() for p in seeds if p.suffix in (".wav", ".flac", ".ogg")]
        self.images = [p.read_bytes() for p in seeds if p.suffix not in (".wav", ".flac", ".ogg", ".jsonl", ".csv")]
        self.transform = create_transform((3, 16, 16), is_training=False)
        self.folder = folder / "recordings"
        self.folder.mkdir()
        for number, data in enumerate(self.audio[:2]):
            (self.folder / f"{number}.wav").write_bytes(data)
        self.table = b"file_name,transcription\n0.wav,one\n1.wav,two\n"
        self.lines = b'{"file_name": "0.wav", "transcription": "one"}\n{"file_name": "1.wav", "transcription": "two"}\n'

    def __call__(self, draw: random.Random) -> str:
        """Read one wrong file; returns which kind it was."""
        kind = draw.choices((self._image, self._recording, self._table), (60, 37, 3))[0]
        kind(draw)
        return kind.__name__.strip("_")

    def _image(self, draw: random.Random) -> None:
        from acmize.data import decode_image

        stored = {"bytes": damaged(draw.choice(self.images), draw), "path": None}
        self.transform(decode_image(stored, draw.choice(("RGB", "L", "RGB")), "image 0").convert("RGB"))

    def _recording(self, draw: random.Random) -> None:
        from acmize.audio import decode_audio

        decode_audio({"bytes": damaged(draw.choice(self.audio), draw), "path": None}, "recording 0", 16_000)

    def _table(self, draw: random.Random) -> None:
        from acmize.audio import open_audio

        name, text = draw.choice((("metadata.csv", self.table), ("metadata.jsonl", self.lines)))
        path = self.folder / name
        path.write_bytes(damaged(text, draw))
        try:
            splits = open_audio(self.folder)
            heard = splits.audio(splits.split("train"), "train", 16_000)
            _ = [u.text for u in heard.some(range(len(heard)))], heard.has_transcripts
        finally:
            path.unlink()


CASES: dict[str, tuple[Callable[[Path], Any], int, int]] = {  # kind -> cases, how many, how many in a smoke run
    "checkpoints": (Checkpoints, 20_000, 150),
    "media": (Media, 5_000, 250),
}


# --- running --------------------------------------------------------------------------------------------------


def run_case(cases: Any, kind: str, number: int, loud: bool = False) -> tuple[str, Outcome]:
    """One case: what it was, and how it ended."""
    from acmize.errors import AcmizeError

    draw, what, start = random.Random(f"{kind} {number}"), "?", time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        what = cases(draw)
        outcome = "read"
    except AcmizeError as error:
        outcome = "refused" if len(str(error)) < 4000 else f"defect: a message of {len(str(error))} characters"
        if loud:
            print(error)
    except BaseException as error:
        if loud:
            traceback.print_exc()
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "acmize/" in f.filename] or [None]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours[-1] else "?"
        took = f" after {time.process_time() - start:.0f} s" if isinstance(error, Late) else ""
        outcome = f"defect: {type(error).__name__}{took} at {where}: {str(error)[:160]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > MEMORY:
        outcome = f"defect: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB in memory"
    return what, outcome


def child(make: Callable[[Path], Any], kind: str, first: int, count: int, pipe: int) -> None:
    """Runs cases and writes a line for each; never returns."""

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGPROF, late)
    mapped = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = (int(mapped.split()[1]) << 10) + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as name, os.fdopen(pipe, "w") as out:
        cases = make(Path(name))
        for number in range(first, count):
            what, outcome = run_case(cases, kind, number)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            out.write(json.dumps([number, what, outcome, peak]) + "\n")
            out.flush()
            if outcome.startswith("defect"):
                break  # what it left behind may not be whole
    os._exit(0)


def fuzz(kind: str, first: int, count: int) -> dict[str, Any]:
    """The cases of a kind from `first` to before `count`."""
    make, _, _ = CASES[kind]
    begun, done, seen, defects, peak = time.perf_counter(), first, Counter[str](), [], 0
    while done < count:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(make, kind, done, count, write)
        os.close(write)
        hung = False
        with os.fdopen(read) as lines:
            while True:
                ready, _, _ = select.select([lines], [], [], SILENCE)
                hung = not ready
                line = "" if hung else lines.readline()
                if not line:
                    break
                number, what, outcome, mb = json.loads(line)
                done, peak = number + 1, max(peak, mb)
                seen[outcome.partition(":")[0]] += 1
                if outcome.startswith("defect"):
                    defects.append(f"{kind} {number} ({what}): {outcome}")
                    print(defects[-1], flush=True)
                elif done % 1000 == 0:
                    print(f"{kind} {done}: {dict(seen)}, {time.perf_counter() - begun:.0f} s", flush=True)
        if hung:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status:
            defects.append(f"{kind} {done}: defect: {'no word' if hung else f'ended with status {status}'}")
            print(defects[-1], flush=True)
            seen["defect"] += 1
            done += 1
    return {"cases": count - first, **seen, "peak_mb": peak, "seconds": time.perf_counter() - begun, "defects": defects}


def main() -> int:
    """The command line; 1 where a defect was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, help="number behind the last case")
    parser.add_argument("--case", type=int, help="run this one alone, in this process")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON of the counts")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    import acmize
    import acmize.audio
    import acmize.hub

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind, (make, full, smoke) in CASES.items():
        if args.only not in (None, kind):
            continue
        if args.case is not None:
            with tempfile.TemporaryDirectory() as name:
                print(*run_case(make(Path(name)), kind, args.case, loud=True))
            continue
        found[kind] = fuzz(kind, args.first, args.count or (smoke if args.smoke else full))
        print(kind, json.dumps({k: v for k, v in found[kind].items() if k != "defects"}))
    if args.output is not None:
        args.output.write_text(
            json.dumps({"acmize": acmize.__version__, "torch": torch.__version__, **found}, indent=2)
        )
    return int(any(part["defects"] for part in found.values()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
