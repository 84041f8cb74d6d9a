"""What the commands share: where they print, how numbers look in tables, and the options that many of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

out, err = Console(), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON, nothing else")]
Source = Annotated[str, typer.Argument(metavar="DIR", help="folder or Hub repository of an adaptive model")]
DenseWeights = Annotated[Path | None, typer.Option("--weights", help="dense model: safetensors file, or folder")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
NoCompile = Annotated[bool, typer.Option("--no-compile", help="leave torch.compile out, which can take minutes")]


def table_of(*columns: str) -> Table:
    """Columns of numbers, the first one of names."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def percent(x: float | None) -> str:
    """A share as per cent with one decimal, or a dash."""
    return "-" if x is None else f"{100 * x:.1f}"
