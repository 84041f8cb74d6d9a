"""Exported files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def session(path: Path) -> Any:
    """A file, loaded to run on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def ask(loaded: Any, x: Tensor, budget: float, output: str | None = None) -> Tensor:
    """One of its outputs, the first by default."""
    feed = {"x": x.numpy(), "budget": np.array(budget, np.float32)}
    return torch.from_numpy(loaded.run([output or loaded.get_outputs()[0].name], feed)[0])
