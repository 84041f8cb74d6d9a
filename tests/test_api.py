"""The pipeline from Python: what it leaves, what it refuses before any work, what seeds fix."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from short import MODEL, converted, image_folder, recipe, same_state, timeless

import acmize
from acmize.api import convert, evaluate_saved
from acmize.diagnose import Finding
from acmize.errors import AcmizeError
from acmize.hosts import make_plan
from acmize.hub import Adaptive, from_pretrained
from acmize.models import load_model
from acmize.quickstart_model import digits, digits_dataset
from acmize.recipe import resolve
from acmize.stages import mixing

COLUMNS = {"budget", "macs_ratio", "macs_ratio_std", "macs", "accuracy", "agreement", "kl", "missed"}


@pytest.fixture(scope="module")
def model() -> Any:
    return converted()


def unlabelled() -> datasets.DatasetDict:
    return datasets.DatasetDict({k: v.remove_columns("label") for k, v in digits_dataset().items()})


def test_the_results(model: Any) -> None:
    results = json.loads(json.dumps(model.results, allow_nan=False))
    assert set(results["dense"]) >= {"accuracy", "macs"}
    assert [row["budget"] for row in results["results"]] == [0.75, 0.6]
    for row in results["results"]:
        assert row.keys() >= COLUMNS
        assert row["macs"] == pytest.approx(row["macs_ratio"] * results["dense"]["macs"])
        assert row["macs_ratio_std"] > 0
        assert 0 <= row["agreement"] <= 1
    assert results["samples"] == 64
    assert results["split"] == "test"
    assert set(model.recipe["seconds"]) == {"init", "distill", "gates", "finetune"}


def test_a_plan_that_is_given_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = load_model(MODEL)
    asked = recipe({"phases": ["distill"]})
    plan = make_plan(dense, asked.config, exclude=["blocks.0.*"])
    failed = Finding(kind="distillation", site="blocks.2.mlp", message="blocks.2.mlp: distillation error 0.99")
    monkeypatch.setattr("acmize.stages.check_sites", lambda *_: [failed])
    made = convert(dense, data=digits_dataset(), recipe=asked, plan=plan)
    assert made.plan == plan
    assert failed.to_dict() in made.results["findings"]
    made = convert(dense, data=digits_dataset(), recipe=asked)
    assert "blocks.2.mlp" not in {e.target for e in made.plan.entries}, "the recipe's own is planned again"
    with pytest.raises(AcmizeError, match="fit_batch: found a plan"):
        convert(dense, data=digits_dataset(), recipe=recipe({"fit_batch": 4}), plan=plan)


def test_the_result_is_the_same_class_with_a_budget(model: Any) -> None:
    assert isinstance(model, Adaptive)
    assert isinstance(model, type(load_model(MODEL)))
    assert not model.training
    images, _ = digits("test")
    low = model(images[:16])
    twin = copy.deepcopy(model)
    twin.set_budget(0.75)
    assert not torch.equal(twin(images[:16]), low)
    with pytest.raises(AcmizeError, match=r"cannot go below 0\.\d+; ask for"):
        twin.set_budget(0.01)
    assert torch.equal(model(images[:16]), low)


def test_the_dense_model_is_left_as_it_is() -> None:
    dense = load_model(MODEL)
    before = copy.deepcopy(dense)
    convert(dense, data=digits_dataset(), recipe=recipe())
    assert same_state(dense, before)
    assert type(dense) is type(before)
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())


def test_seeds_fix_everything(model: Any) -> None:
    torch.manual_seed(77)
    again = converted()
    assert same_state(model, again)
    assert timeless(model.results) == timeless(again.results)
    other = converted({"seed": 5})
    assert not same_state(model, other)


def test_no_phase_needs_neither_labels_nor_a_gradient_step() -> None:
    made = converted({"phases": []}, data=unlabelled())
    labelled = converted({"phases": []})
    assert same_state(made, labelled)
    assert made.results["dense"]["accuracy"] is None
    assert made.results["results"][0]["accuracy"] is None
    assert made.results["results"][0]["agreement"] > 0.5
    names = {n for n, _ in made.named_parameters()}
    base = dict(load_model(MODEL).named_parameters())
    kept = [n for n in base if n in names and "norm" in n]
    assert kept
    assert all(torch.equal(base[n], made.get_parameter(n)) for n in kept)


def test_all_phases_without_labels() -> None:
    made = converted(data=unlabelled())
    assert made.results["results"][0]["accuracy"] is None
    assert set(made.recipe["seconds"]) == {"init", "distill", "gates", "finetune"}


@pytest.mark.parametrize("phases", [["distill"], ["gates"], ["finetune"], ["gates", "finetune"]])
def test_some_phases(phases: list[str]) -> None:
    made = converted({"phases": phases})
    assert set(made.recipe["seconds"]) == {"init", "gates", *phases}


def test_the_paper_preset_end_to_end() -> None:
    made = converted({"budgets": [0.6]}, preset="paper")
    assert [row["budget"] for row in made.results["results"]] == [0.6]
    assert {e.form for e in made.plan.entries} == {"prefix", "lowrank"}
    with pytest.raises(AcmizeError, match="found no labels, but finetune without a teacher needs them"):
        converted({"budgets": [0.6]}, preset="paper", data=unlabelled())
    converted({"budgets": [0.6], "phases": ["distill", "gates"]}, preset="paper", data=unlabelled())


def test_threshold_labels_on_pretrained_learners() -> None:
    made = converted({"gates": {"labels": "threshold"}, "phases": ["gates"]})
    assert made.plan.config.gate == "classification"
    assert made.results["results"][0]["macs_ratio"] <= 1.2


def test_mixup_randaugment_ema_and_accumulation_run() -> None:
    train = {"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9, "accumulate": 2, "randaugment": "rand-m3-n1"}
    made = converted({"train": train, "phases": ["finetune"]})
    assert all(torch.isfinite(p).all() for p in made.parameters())


def test_labels_of_mixed_images_are_shares_of_classes_and_no_more() -> None:
    model = load_model("acmize_vit_digits")
    assert mixing(resolve({}), model) is None
    mix = mixing(resolve({"train": {"cutmix": 1.0}}), model)
    assert mix is not None
    images = torch.rand(4, 3, 8, 8)
    mixed, labels = mix(images, torch.arange(4), 0)
    assert labels is not None
    assert not torch.equal(mixed, images)
    assert ((labels > 0).sum(1) <= 2).all(), "smoothing is the losses' own: it would be done twice"
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_a_train_split_alone_is_measured_on_what_was_held_out() -> None:
    made = converted({"phases": []}, data=datasets.DatasetDict(train=digits_dataset()["train"]))
    assert made.results["split"] == "held out of train"


def test_data_that_cannot_serve(tmp_path: Path) -> None:
    test = datasets.DatasetDict(test=digits_dataset()["test"])
    with pytest.raises(AcmizeError, match="found no train split"):
        converted(data=test, work=tmp_path / "w")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    two = digits_dataset()["train"].filter(lambda label: label < 2, input_columns="label").cast(features)
    with pytest.raises(AcmizeError, match="found 2 classes, expected the 10 of the model"):
        converted(data=datasets.DatasetDict(train=two, test=two), work=tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_call() -> None:
    with pytest.raises(TypeError, match="a recipe or options, not both"):
        convert(load_model(MODEL), data=None, recipe=recipe(), seed=3)
    with pytest.raises(AcmizeError, match="unknown option 'sede'"):
        acmize.convert(load_model(MODEL), data=None, sede=3)
    with pytest.raises(AcmizeError, match=r"cannot go below 0\.\d+; ask for 0\.\d+ or more"):
        acmize.convert(load_model(MODEL), data=None, budget=0.02)


def test_a_colour_model_on_an_image_folder(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", {"train": 12, "test": 6})
    dense = timm.create_model("test_vit", num_classes=10, img_size=32)
    options = {k: v for k, v in recipe().to_dict().items() if k not in ("limit", "data")}
    made = convert(dense.eval(), data=str(data), **{**options, "phases": ["gates"]})
    made.save_pretrained(tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), made(x))


def test_evaluating_what_was_saved(model: Any, tmp_path: Path) -> None:
    loaded = from_pretrained(model.save_pretrained(tmp_path / "m"))
    again = evaluate_saved(loaded, digits_dataset(), limit=64)
    keep = ("budget", "macs_ratio", "accuracy")
    assert [[r[k] for k in keep] for r in again["results"]] == [[r[k] for k in keep] for r in model.results["results"]]
    assert again["dense_is"] == "full width"
    packaged = Path(acmize.__file__).parent / "assets" / "vit_digits.safetensors"
    beside = evaluate_saved(loaded, digits_dataset(), [0.7], limit=64, weights=packaged)
    assert beside["dense_is"] == "base weights"
    assert beside["dense"]["accuracy"] == model.results["dense"]["accuracy"]
    assert [r["budget"] for r in beside["results"]] == [0.7]
    with pytest.raises(AcmizeError, match="cannot go below"):
        evaluate_saved(loaded, digits_dataset(), [0.01], limit=16)


def test_all_phases_in_bf16() -> None:
    exact, mixed = converted(), converted({"mixed_precision": "bf16"})
    assert not same_state(exact, mixed)
    for one, two in zip(exact.results["results"], mixed.results["results"], strict=True):
        assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.1)
