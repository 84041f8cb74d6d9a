"""Files that run elsewhere: ONNX with the budget as an input, `torch.export` programs, AOTInductor packages."""

from __future__ import annotations

from acmize.export.formats import FORMATS, export

__all__ = ["FORMATS", "export"]
