"""Settings and fixtures of all tests: offline, seeded, one thread, the folder of real weights and data."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Read by the Hugging Face libraries when they are imported, so it has to be said before any import of them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="acmize-tests-")  # neither helped nor hurt by an older run
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# One thread for every worker of `pytest -n 2`; it also makes sums independent of the machine's core count.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real weights and data: ACMIZE_ASSETS, or shared/assets beside the repository."""
    named = os.environ.get("ACMIZE_ASSETS")
    path = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not path.is_dir():
        where = f"ACMIZE_ASSETS={named}" if named else "ACMIZE_ASSETS is not set and ../shared/assets"
        pytest.skip(f"real weights and data: {where} is not a folder")
    return path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # timm and torchvision draw from the global generators
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Any connection beyond this machine is an error, not a wait for a time-out."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise OSError(f"a test tried to reach {address}: tests run without a network")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `acmize WORDS` in this process: (exit status, captured)."""
    from short import command

    def call(*words: object) -> Any:
        capsys.readouterr()
        status = command(monkeypatch, *words)
        return status, capsys.readouterr()

    return call


@pytest.fixture
def _always_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """In exported files: blocks of one learner, and skipping wherever anything is left out."""
    from acmize.export import onnx_ops

    monkeypatch.setattr(onnx_ops, "OVERHEAD_MACS", 0.0)
    monkeypatch.setattr(onnx_ops, "MOVE_MACS", 0.0)
    monkeypatch.setattr(onnx_ops, "BLOCK_UNITS", 8)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as run:
        if path is None and not Path(run.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        made = run.chromium.launch(executable_path=path, args=["--no-sandbox"])  # a container has no user namespaces
        yield made
        made.close()
