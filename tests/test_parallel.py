"""Two processes end as one does: losses, budgets, results and weights of every phase, whoever has which rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel_worker as worker
import pytest
import torch
from torch import nn

from acmize import AcmizeError, parallel
from acmize.__about__ import __version__
from acmize.checkpoint import load_tensors
from acmize.inputs import Inputs


def launched(folder: Path) -> subprocess.Popen[str]:
    """All cases in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, worker.__file__, folder]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], env=env, stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    made = tmp_path_factory.mktemp("parallel")
    worker.record_noise(made / "recordings")
    running = launched(made)
    printed, errors = running.communicate(timeout=900)
    assert running.returncode == 0, errors[-3000:]
    assert printed == ""
    return made


@pytest.mark.parametrize("case", sorted(worker.CASES))
def test_two_processes_end_as_one(case: str, folder: Path) -> None:
    one, weights = worker.run(case, folder)
    two, others = json.loads((folder / f"{case}.json").read_text()), load_tensors(folder / f"{case}.safetensors")
    assert two["processes"] == 2
    if case == "divided":
        assert 0.4 < two["held"]["distill"] / one["held"]["distill"] < 0.6  # gradients and moments of one's own sites
        assert two["held"]["finetune"] == pytest.approx(0.5, abs=0.05)
    assert one["logs"].keys() == two["logs"].keys()
    for name, rows in one["logs"].items():
        assert len(rows) > 1
        assert abs(rows[0]["loss"] - rows[-1]["loss"]) > 1e-4, "nothing was learned"
        for mine, theirs in zip(rows, two["logs"][name], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    assert one["calibration"]["budgets"] == two["calibration"]["budgets"]
    for mine, theirs in zip(one["results"], two["results"], strict=True):
        assert mine["macs_ratio"] == pytest.approx(theirs["macs_ratio"], abs=1e-3)
        assert mine["macs_ratio_std"] == pytest.approx(theirs["macs_ratio_std"], abs=2e-3)
        assert mine["kl"] == pytest.approx(theirs["kl"], abs=1e-3)
        assert mine["sites"] == pytest.approx(theirs["sites"], abs=0.02)
    assert weights.keys() == others.keys()
    if case in worker.EXACT:
        assert {name: rows[-1]["loss"] for name, rows in one["logs"].items()} == pytest.approx(
            {name: rows[-1]["loss"] for name, rows in two["logs"].items()}, rel=1e-6
        )  # a sum over gates
        assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_processes_part_before_the_interpreter_ends(folder: Path) -> None:
    """Threads of gloo that outlive it abort the process, now and then, after all work is done."""
    assert {path.name: path.read_text() for path in folder.glob("met.*")} == {"met.0": "False", "met.1": "False"}


def test_accelerate_that_starts_one_process_on_a_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.join(torch.device("cpu")) == 1
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(AcmizeError, match="torchrun"):
        parallel.join(torch.device("cpu"))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 20])
def test_every_row_and_every_whole_batch_has_one_process(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.arange(start, min(start + 3, count)) for start in range(0, count, 3)]
    parts, dealt = [], []
    monkeypatch.setattr(parallel, "processes", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts += range(count)[parallel.part(count)]
        mine = [batch.tolist() for batch in parallel.spread(batches)]
        turns = list(parallel.in_turns(batches))
        assert len(turns) == -(-len(batches) // 4), "every process is there in every turn"
        assert [batch.tolist() for batch in turns if batch is not None] == mine
        assert len(batches) // 4 <= len(mine) <= -(-len(batches) // 4)
        dealt += mine
    assert parts == list(range(count))
    assert sorted(dealt) == [batch.tolist() for batch in batches]


def test_a_process_without_rows_runs_one_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    batch = [Inputs({"x": torch.arange(1)}, torch.ones(1, 3, dtype=torch.bool)), None]
    rows = parallel.rows_of(batch)
    assert rows.idle
    with rows.counted() as (inputs, labels):
        assert parallel._state.idle
        assert (len(inputs), labels) == (1, None)
    assert not parallel._state.idle
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert not parallel.rows_of(batch).idle


def test_batches_are_begun_anywhere_without_reading_those_before() -> None:
    class Stream:
        read: tuple[int, ...] = ()

        def starting_at(self, number: int) -> Iterator[torch.Tensor]:
            for i in range(number, 4):
                self.read += (i,)
                yield torch.full((2,), i)

    stream = Stream()
    assert [int(rows.batch[0]) for rows in parallel.in_step(stream).starting_at(2)] == [2, 3]
    assert stream.read == (2, 3)
    assert [int(rows.batch) for rows in parallel.in_step([torch.tensor(i) for i in range(4)]).starting_at(3)] == [3]
    assert len(list(parallel.in_step(stream))) == 4


def test_owners_share_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    costs = [5.0, 1, 1, 1, 4, 3, 3]
    found = parallel.owners(costs)
    loads = [sum(c for c, owner in zip(costs, found, strict=True) if owner == r) for r in range(3)]
    assert sorted(loads) == [6, 6, 6]


def test_one_process_is_plain() -> None:
    x: Any = torch.randn(5, 3, requires_grad=True)
    assert parallel.gather(x) is x
    assert parallel.total(x) is x
    assert torch.equal(parallel.mean(x, (0,)), x.mean(0))
    assert torch.equal(parallel.variance(x), x.var())
    assert parallel.subset([1, 2]) == [1, 2]
    assert parallel.in_order(3, lambda value: value + 1) == 4
    assert parallel.exchanged(["mine"]) == ["mine"]
    parallel.from_owner_(nn.Linear(2, 2), 0)


def test_accelerate_starts_as_many_as_it_is_asked_for() -> None:
    """On a CPU it starts one alone, which becomes torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["launch", "--cpu", "--num_processes", "2", "--main_process_port", port, "-m", "acmize", "--version"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count(__version__) == 2, done.stderr[-2000:]
