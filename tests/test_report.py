"""The report: maps against plain sums, one file that needs nothing else, and a browser that moves the slider."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from short import converted, image_folder
from tiny import Random, adapted, half_width, images, vit

from acmize.gates import choosing, full_width, gates_of
from acmize.hub import save_pretrained
from acmize.methods.token_merging import merge, places, schedule_of, set_schedule, tracing
from acmize.quickstart_model import digits_dataset
from acmize.recording import record
from acmize.report import write_report
from acmize.report.maps import compute_maps, grid_of, map_grid
from acmize.report.page import content, render
from acmize.report.survey import LEVELS, levels_of, survey

# --- where the tokens go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 1, 5, 8, 99])
@pytest.mark.parametrize("prefix", [0, 2])
def test_places_say_what_merge_does(r: int, prefix: int) -> None:
    x, sizes = torch.randn(3, 16 + prefix, 6), torch.randint(1, 4, (3, 16 + prefix)).float()
    merged, new = merge(x, sizes, r, prefix)
    where = places(x, sizes, r, prefix)
    for b in range(3):
        for j in range(merged.shape[1]):
            mine = where[b] == j
            assert mine.any()
            assert new[b, j] == sizes[b, mine].sum()
            mean = (x[b, mine] * sizes[b, mine, None]).sum(0) / sizes[b, mine].sum()
            torch.testing.assert_close(merged[b, j], mean)
    assert torch.equal(where[:, :prefix], torch.arange(prefix).expand(3, -1))


def merging(pairs: int) -> Any:
    """A tiny ViT that merges so many pairs before its second block."""
    model, plan = adapted(vit(depth=3), merge=pairs)
    model.plan = plan
    set_schedule(model, plan.schedule(0.5))
    assert sum(schedule_of(model)) == 2 * pairs
    return model


def test_tracing_ends_with_its_context_and_changes_no_output() -> None:
    model, x = merging(4), images()
    with torch.no_grad():
        before = model(x)
        with tracing(model) as trace:
            assert torch.equal(model(x), before)
        assert [len(t.unique()) for t in (holder[0] for holder in trace)] == [17, 13, 9]
        model(x)
    assert len(trace) == 3
    with tracing(torch.nn.Linear(2, 2)) as none:
        pass
    assert none == []


# --- compute of each patch ------------------------------------------------------------------------------------


def test_maps_are_one_at_full_width_and_zero_with_nothing() -> None:
    model, plan = adapted(vit())
    model.plan = plan  # pyright: ignore[reportAttributeAccessIssue]
    grid = map_grid(model)
    assert grid == (4, 4)
    with choosing(model, full_width):
        whole, sizes = compute_maps(model, images(), grid)
    torch.testing.assert_close(whole, torch.ones(4, 4, 4))
    assert sizes is None or torch.equal(sizes, torch.ones(4, 4, 4))
    with choosing(model, half_width):
        half, _ = compute_maps(model, images(), grid)
    torch.testing.assert_close(half, torch.full((4, 4, 4), 0.5))


def test_nothing_is_lost_when_merged_tokens_are_shared_out() -> None:
    """The mean of a map is what its patches' tokens spent, counted without knowing which patch is where."""
    model, x = merging(5), images()
    with choosing(model, Random(0)):
        found, sizes = compute_maps(model, x, (4, 4))
    with choosing(model, Random(0)), record(model, len(x)) as seen, torch.no_grad():
        model(x)
    spent = torch.zeros(len(x))
    for e in model.plan.entries:
        table = torch.tensor((0, *e.learner_macs)).cumsum(0).float()
        spent += table[seen.per_token[e.fqn][:, 1:]].sum(1) * e.tokens / 16
    torch.testing.assert_close(found.mean((1, 2)), spent / sum(e.macs for e in model.plan.entries))
    assert found.std() > 0.05
    assert sizes is not None
    assert sizes.max() > 1
    torch.testing.assert_close((1 / sizes).sum((1, 2)), torch.full((4,), 16.0 - 10))  # each token counted once


@pytest.mark.parametrize(
    ("tokens", "prefix", "size", "grid"),
    [
        (197, 1, (3, 224, 224), (14, 14)),
        (196, 1, (3, 224, 224), (14, 14)),
        (49, 0, (3, 224, 224), (7, 7)),
        (8 * 4 + 1, 1, (3, 128, 64), (8, 4)),
        (1, 0, (3, 224, 224), None),
        (7, 0, (3, 224, 224), None),
    ],
)
def test_grids(tokens: int, prefix: int, size: tuple[int, ...], grid: tuple[int, int] | None) -> None:
    assert grid_of(tokens, prefix, size) == grid


def test_levels_are_letters() -> None:
    assert levels_of(torch.tensor([[0.0, 1.0], [2.0, 0.5]])) == f"A//{LEVELS[32]}"
    values = torch.rand(50)
    back = torch.tensor([LEVELS.index(c) / 63 for c in levels_of(values)])
    assert (back - values).abs().max() <= 0.5 / 63 + 1e-6


# --- the page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return converted({"phases": [], "merge": "auto"})


@pytest.fixture(scope="module")
def page(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the digits model."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(model, path, digits_dataset(), limit=24)
    return path


class Reader(HTMLParser):
    """The JSON block, the scripts, and whatever an element would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.blocks: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self._kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        self.loads += [named[key] for key in ("src", "href", "data", "action") if named.get(key)]
        self._kind = f"{tag} {named.get('type', '')}".strip() if tag in ("script", "style") else ""
        if tag not in ("meta", "input", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._kind = ""

    def handle_data(self, data: str) -> None:
        if self._kind:
            self.blocks.append((self._kind, data))

    def block(self, kind: str) -> str:
        (found,) = [text for name, text in self.blocks if name == kind]
        return found


def test_one_file_that_loads_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    read = Reader(text)
    assert read.open == []
    assert read.loads == []
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text.replace("\\u003c", "<")))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", read.block("style"))
    assert page.stat().st_size < 3e6


def test_it_says_what_was_measured(page: Path, model: Any) -> None:
    made = json.loads(Reader(page.read_text("utf-8")).block("script application/json"))
    assert [r["budget"] for r in made["results"]] == [0.6, 0.75]
    assert {r["budget"]: r["accuracy"] for r in made["results"]} == {
        r["budget"]: r["accuracy"] for r in model.results["results"]
    }
    found = made["survey"]
    assert [level["budget"] for level in found["levels"]] == [0.6, 0.675, 0.75]
    ratios = [level["macs_ratio"] for level in found["levels"]]
    assert ratios == sorted(ratios)
    assert found["samples"] == 24
    tokens = [sum(h) for h in found["levels"][0]["histograms"]]
    assert len(tokens) == len(model.plan.entries)
    assert max(tokens) == 24 * 17
    assert min(tokens) < max(tokens)  # merged
    for shown in found["pictures"]:
        assert [len(m) for m in shown["maps"]] == [16] * 3
        assert len(shown["cost"]) == len(shown["guess"]) == 3
    mean = [sum(found["pictures"][i]["cost"]) for i in found["dearest"] + found["cheapest"][::-1]]
    assert all(first >= second - 3e-4 for first, second in pairwise(mean))  # three costs, each of four digits


def test_the_survey_finds_what_is_lost(model: Any) -> None:
    """An untrained dense model in place of the dense one: what is lost and gained is counted against it."""
    dense = vit(img_size=8, patch_size=2, in_chans=1, num_classes=10)
    found = survey(model, digits_dataset(), [0.75], dense=dense, limit=40)
    level = found["levels"][0]
    assert level["gained"] > level["lost"]
    assert level["accuracy"] - found["dense_accuracy"] == pytest.approx((level["gained"] - level["lost"]) / 40)


def test_the_budget_stays(model: Any, tmp_path: Path) -> None:
    model.set_budget(0.65)
    dial = [float(gate.dial) for gate in gates_of(model)]
    write_report(model, tmp_path / "r.html", digits_dataset(), limit=4, budgets=[0.75])
    assert model.budget == 0.65
    assert [float(gate.dial) for gate in gates_of(model)] == dial


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", "&lt;b>", "\u2028", "{{script}}"])
def test_nothing_in_the_data_becomes_markup(model: Any, text: str) -> None:
    made = {**content(model), "name": text, "findings": [text]}
    read = Reader(render(made))
    assert [kind for kind, _ in read.blocks].count("script") == 1
    assert json.loads(read.block("script application/json"))["findings"] == [text]


def test_the_script_is_one(page: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (tmp_path / "page.js").write_text(Reader(page.read_text("utf-8")).block("script"))
    done = subprocess.run([node, "--check", str(tmp_path / "page.js")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command(model: Any, run_command: Any, tmp_path: Path) -> None:
    saved = save_pretrained(model, tmp_path / "model")
    out = tmp_path / "made" / "r.html"
    status, captured = run_command("report", saved, "-o", out)
    assert status == 0
    assert "MB" in captured.out
    assert json.loads(Reader(out.read_text("utf-8")).block("script application/json"))["survey"] is None
    (saved / "comparison.json").write_text(json.dumps({"rows": [], "verdicts": ["it loses"]}))
    data = image_folder(tmp_path / "data", {"train": 4, "test": 6})
    assert run_command("report", saved, "--data", data, "--budget", 0.7, "-o", out)[0] == 0
    made = json.loads(Reader(out.read_text("utf-8")).block("script application/json"))
    assert made["comparison"]["verdicts"] == ["it loses"]
    assert [level["budget"] for level in made["survey"]["levels"]] == [0.7]
    before = out.read_bytes()
    status, captured = run_command("report", saved, "--data", data, "--budget", 0.001, "-o", out)
    assert status == 2
    assert "cannot go below" in captured.err
    assert out.read_bytes() == before


# --- a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(browser: Any, page: Path) -> Iterator[Any]:
    """The report in a window of a phone; anything said to the console or loaded from elsewhere is an error."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, offline=True)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(page.as_uri())
    yield opened
    assert said == []
    context.close()


def state(tab: Any) -> dict[str, Any]:
    """What the slider moves."""
    script = """() => ({
        budget: document.getElementById("budget-value").textContent,
        sites: document.getElementById("site-map").textContent,
        bars: document.getElementById("histograms").innerHTML,
        heat: document.querySelector("#examples canvas").toDataURL(),
        shown: !document.querySelector("#examples canvas").hidden,
    })"""
    return tab.evaluate(script)


def test_the_slider_moves_everything_from_the_keyboard(tab: Any) -> None:
    tab.focus("#budget")
    tab.keyboard.press("Home")
    low = state(tab)
    tab.keyboard.press("End")
    high = state(tab)
    assert (low["budget"], high["budget"]) == ("0.6", "0.75")
    for part in ("sites", "bars", "heat"):
        assert low[part] != high[part], part
    tab.keyboard.press("ArrowLeft")
    assert state(tab)["budget"] == "0.675"
    assert "0.675" in tab.get_attribute("#budget", "aria-valuetext")


def test_the_overlay_is_chosen_by_click(tab: Any) -> None:
    heat = state(tab)["heat"]
    tab.click("text=size of each token")
    assert state(tab)["heat"] != heat
    tab.click("text=nothing")
    assert not state(tab)["shown"]


def test_it_fits_a_phone_and_follows_the_colour_scheme(tab: Any) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    colour = "getComputedStyle(document.body).backgroundColor"
    tab.emulate_media(color_scheme="light")
    light = tab.evaluate(colour)
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(colour) != light
