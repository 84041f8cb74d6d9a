"""What the commands share: where they print, the options that many of them have, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from acmize.errors import AcmizeError

out, err = Console(), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON, nothing else")]
Source = Annotated[str, typer.Argument(metavar="DIR", help="folder or Hub repository of an adaptive model")]
DenseWeights = Annotated[Path | None, typer.Option("--weights", help="dense model: safetensors file, or folder")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
NoCompile = Annotated[bool, typer.Option("--no-compile", help="leave torch.compile out, which can take minutes")]


def images_only(model: Any, what: str) -> None:
    """Refuse what works on images alone for a speech model.

    Raises:
        AcmizeError: the model is one.
    """
    from acmize.hosts_speech import is_speech

    if is_speech(model):
        raise AcmizeError(f"{what}: found {type(model).__name__}, a speech model; it works on images only so far")
