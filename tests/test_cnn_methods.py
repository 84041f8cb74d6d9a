"""Methods for CNNs the whole way: the same convert, verify, save, load and command line as every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from short import OPTIONS
from tiny_cnn import images, noisy

from acmize.api import convert
from acmize.gates import choosing, full_width
from acmize.hub import from_pretrained, save_pretrained
from acmize.quickstart_model import digits_dataset
from acmize.recipe import resolve
from acmize.verify import noise, verify

SHORT = {k: v for k, v in OPTIONS.items() if k not in ("acm", "distill", "budget", "budgets")}
CASES: dict[str, tuple[str, dict[str, Any], tuple[float, float], tuple[str, ...]]] = {
    "cosine-gate": ("acmize_resnet20_cifar", {"gate_hidden": 4}, (0.85, 0.7), ()),
    "lag": ("acmize_resnet20_cifar", {"num_learners": 4, "gate_hidden": 4}, (0.85, 0.7), ()),
    "lag, logistic": ("acmize_resnet20_cifar", {"num_learners": 4, "gate": "logistic"}, (0.85, 0.7), ("finetune",)),
    "ada-pconv": ("acmize_fasternet_tiny_cifar", {"gate": "damage"}, (0.98, 0.96), ()),
}


@pytest.fixture(scope="module", params=CASES)
def converted(request: Any) -> tuple[Any, Any, str]:
    """(dense, adaptive, case)"""
    name, config, budgets, phases = CASES[request.param]
    torch.manual_seed(0)
    dense = noisy(timm.create_model(name))
    limit = 24 if request.param == "ada-pconv" else 64
    more = {"limit": limit, "config": config, "budget": budgets[1], "budgets": [budgets[0]], "phases": phases}
    recipe = resolve(SHORT, {"method": request.param.partition(",")[0], **more})
    return dense, convert(dense, data=digits_dataset(), recipe=recipe), request.param


def test_converted_like_any_other(converted: Any) -> None:
    dense, made, case = converted
    assert made.recipe["method"] == case.partition(",")[0]
    high, low = (row["macs_ratio"] for row in made.results["results"])
    assert 1 > high > low > made.plan.budget_range[0]
    if not case.endswith("logistic"):  # one epoch on 64 digits leaves its gates as it will
        assert any(row["macs_ratio_std"] > 0 for row in made.results["results"]), "samples differ in what they run"
        x = images(3)
        with torch.no_grad(), choosing(made, full_width):
            torch.testing.assert_close(made(x), dense(x), rtol=1e-4, atol=1e-4)  # no weight was trained


@torch.no_grad()
def test_saved_and_loaded(converted: Any, tmp_path: Path) -> None:
    made = converted[1]
    again = from_pretrained(save_pretrained(made, tmp_path / "saved"))
    assert torch.equal(again(images(3)), made(images(3)))


def test_verify_finds_all_paths_alike(converted: Any) -> None:
    dense, made, case = converted
    compiler = "eager" if case in ("lag", "ada-pconv") else None
    found = verify(made, noise(made, 3, 0), dense=dense, compiler=compiler)
    assert [c for c in found["checks"] if not c["ok"]] == []
    assert {"sorted", "sorted, alone", "saved and loaded"} <= {c["check"] for c in found["checks"]}


@pytest.mark.parametrize(
    ("model", "method", "sites"),
    [("resnet50", "lag", 16), ("convnext_atto", "lag", 12), ("fasternet_t0", "ada-pconv", 13)],
)
def test_plans_of_published_models(run_command: Any, model: str, method: str, sites: int) -> None:
    status, told = run_command("plan", model, "--method", method, "--json")
    assert not status, told.err
    assert len(json.loads(told.out)["entries"]) == sites
