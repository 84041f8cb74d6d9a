"""Files that run elsewhere, with the budget as an input: ONNX, and programs of `torch.export`."""

from __future__ import annotations

from acmize.export.formats import FORMATS, export

__all__ = ["FORMATS", "export"]
