"""A hook of mkdocs: files that pages link to are part of the site, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LOADED = re.compile(r"<(?:script|img|link)[^>]* (?:src|href)=\"?(https?://[^\"\s>]+)")
OUTSIDE = re.compile(r"\]\(\.\./((?:examples|recipes)/[\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside of `docs`; leave out what is no page."""
    for file in list(files):
        if file.src_uri.endswith(".py"):
            files.remove(file)
    wanted = {
        name for page in Path(config["docs_dir"]).glob("*.md") for name in OUTSIDE.findall(page.read_text("utf-8"))
    }
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point those links at the copies."""
    return OUTSIDE.sub(r"](\1)", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuse a page that would load anything over the network."""
    if found := LOADED.findall(output):
        raise PluginError(f"{page.file.src_uri}: would load {found[0]}; the site is read without a network")
