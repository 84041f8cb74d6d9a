"""The documentation is true to the tree: links, commands and options, included examples, the blocks that CI runs.

A line `<!-- include: examples/FILE.py -->` is followed by a fenced block that holds the file, word for word;
`python tests/test_docs.py` writes the blocks anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WANTED = {"quickstart", "concepts", "methods", "adding-a-method", "adding-a-host", "design", "log"}
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
INCLUDE = re.compile(r"^<!-- include: (\S+) -->\n+(?:```python\n(.*?)^```$)?", re.M | re.S)
ids = {"ids": lambda page: page.name}


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCED.findall(text) if language in languages]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands_in(text: str) -> list[list[str]]:
    """Every `acmize ...` of shell blocks and inline code, as words."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(acmize [^`\n]+)`", FENCED.sub("", text))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("acmize ")]


def options_in(text: str) -> set[str]:
    """Every `--option` of inline code that stands outside a command."""
    code = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    alone = " ".join(c for c in code if not c.startswith(("acmize ", "python ")))
    return set(re.findall(r"--[a-z][-a-z]*", alone))


def known() -> dict[str, set[str]]:
    """Command -> its options, from the command line itself."""
    import typer

    from acmize.cli import app

    root = typer.main.get_command(app)
    found = {name: {o for p in c.params for o in p.opts} for name, c in root.commands.items()}  # type: ignore[attr-defined]
    return {**found, "": {o for p in root.params for o in p.opts}}


def wrong_commands(text: str) -> list[str]:
    """What a page says of the command line that is not so."""
    commands, wrong = known(), []
    for _, *words in commands_in(text):
        if words[0].startswith("-"):
            name, options = "", words
        else:
            name, options = words[0], words[1:]
        if name not in commands:
            wrong.append(f"acmize {name}: no such command")
            continue
        given = {w.split("=")[0] for w in options if re.match(r"--?[a-z]", w)} - {"--help"}
        wrong += [f"acmize {name} {option}: no such option" for option in sorted(given - commands[name])]
    everything = set().union(*commands.values()) | {"--help", "--smoke"}  # --smoke is the recipes'
    return wrong + [f"{option}: no such option" for option in sorted(options_in(text) - everything)]


def test_the_pages_exist() -> None:
    assert {page.stem for page in PAGES} >= WANTED


@pytest.mark.parametrize("page", PAGES, **ids)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_and_options_exist(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


def test_a_wrong_command_is_found() -> None:
    text = "```sh\nacmize sing out\nacmize plan MODEL --fast\n```\n"
    text += "`acmize eval DIR --data D`, `--slow`, `acmize --version`"
    assert wrong_commands(text) == [
        "acmize sing: no such command",
        "acmize plan --fast: no such option",
        "--slow: no such option",
    ]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_included_examples_are_the_files(page: Path) -> None:
    for name, body in INCLUDE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{page.name} includes {name}, which is not there"
        assert body == (ROOT / name).read_text(encoding="utf-8"), f"run `python tests/{Path(__file__).name}`"


@pytest.mark.parametrize("page", PAGES, **ids)
def test_python_compiles_and_yaml_is_a_recipe(page: Path) -> None:
    from acmize.recipe import resolve

    text = page.read_text(encoding="utf-8")
    for number, body in enumerate(blocks(text, "python")):
        if not body.startswith(" "):  # inside a list
            compile(body, f"{page.name}, Python block {number + 1}", "exec")
    for body in blocks(text, "yaml"):
        resolve(yaml.safe_load(body))


@pytest.mark.parametrize("name", ["install", "run", "test"])
def test_the_blocks_of_ci_are_there(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- ci: {name} -->" in readme.splitlines()
    assert re.search(rf"^<!-- ci: {name} -->\n```sh\n(.+\n)+?```$", readme, re.M)


def test_the_layout_names_every_module() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for file in sorted((ROOT / "acmize").rglob("*.py")):
        path = file.relative_to(ROOT)
        named = f"`{path.as_posix()}`" in design or (f"`{path.parent.as_posix()}/`" in design and path.name in design)
        package = path.name == "__init__.py" and len(path.parts) > 2
        assert named or package, f"design.md lacks {path}"
    for name in re.findall(r"`(acmize/[\w/.]+)`", design):
        assert (ROOT / name).exists(), f"design.md names {name}, which is not there"


def test_the_import_order_is_the_one_enforced() -> None:
    from test_imports import ORDER

    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = next(body for body in blocks(design, "") if body.startswith("errors, "))
    told = [tuple(line.split("   ")[0].strip().split(", ")) for line in block.splitlines()]
    there = {p.stem for p in (ROOT / "acmize").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    there -= {"__init__", "__about__", "__main__"}
    assert told == [kept for row in ORDER if (kept := tuple(name for name in row if name in there))]


def test_the_command_line_is_read_rightly() -> None:
    assert {"plan", "convert", "eval", "quickstart"} <= known().keys()
    assert {"--data", "--output", "-o", "--phases"} <= known()["convert"]


def include() -> None:
    """Write every included block anew."""
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        page.write_text(INCLUDE.sub(_included, old), encoding="utf-8")


def _included(match: re.Match[str]) -> str:
    body = (ROOT / match[1]).read_text(encoding="utf-8")
    end = "" if match[2] is not None else "\n\n"  # a mark without its block has eaten the lines behind it
    return f"<!-- include: {match[1]} -->\n```python\n{body}```{end}"


if __name__ == "__main__":
    include()
