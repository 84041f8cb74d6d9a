"""Options: merged in rank, checked when they are given and not an hour later, refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acmize.errors import AcmizeError
from acmize.phases.finetune import FinetuneConfig
from acmize.recipe import Recipe, TrainOptions, preset, read_config, resolve
from acmize.registry import methods


def test_defaults_are_a_recipe_that_round_trips_through_json() -> None:
    made = resolve()
    own = methods()["acm"][0].defaults
    assert made.train == replace(TrainOptions(), **own["train"])
    assert made.losses == replace(FinetuneConfig(), **own["losses"])
    assert replace(made, train=TrainOptions(), losses=FinetuneConfig()) == Recipe()
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_later_layers_win_and_leave_the_rest() -> None:
    made = resolve({"budget": 0.7, "acm": {"num_learners": 3}}, {"acm": {"gate_hidden": 5}, "budget": 0.8})
    assert (made.budget, made.config.num_learners, made.config.gate_hidden) == (0.8, 3, 5)


def test_layers_are_not_changed() -> None:
    layer = {"acm": {"num_learners": 3}}
    resolve(layer, {"acm": {"gate_hidden": 5}})
    assert layer == {"acm": {"num_learners": 3}}


def test_ranges_reach_the_smallest_budget_that_is_wanted() -> None:
    usual, low = resolve({}), resolve({"budget": 0.5, "budgets": [0.8, 0.25]})
    assert (usual.gates.budgets[0], usual.losses.budgets[0]) == (0.45, 0.4)
    assert low.gates.budgets == (0.25, usual.gates.budgets[1])
    assert low.losses.budgets == (0.25, usual.losses.budgets[1])
    given = resolve({"budget": 0.25, "budgets": [], "losses": {"budgets": (0.6, 0.8)}})
    assert given.losses.budgets == (0.6, 0.8)
    assert given.gates.budgets[0] == 0.25
    assert resolve(low.to_dict()) == low


def test_the_paper_preset() -> None:
    made = resolve({"budget": 0.7}, preset_name="paper")
    assert (made.config.gate, made.config.init, made.config.projections) == ("classification", "random", "lowrank")
    assert (made.gates.labels, made.losses.teacher, made.losses.budgets) == ("threshold", 0.0, (0.7, 0.7))
    assert made.budgets == (0.7,)
    with pytest.raises(AcmizeError, match="expected default or paper"):
        preset("best")


def test_gate_labels_choose_the_gate() -> None:
    assert resolve({"gates": {"labels": "threshold"}}).config.gate == "classification"
    with pytest.raises(AcmizeError, match="set both or neither"):
        resolve({"gates": {"labels": "threshold"}, "acm": {"gate": "damage"}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bugdet": 0.5}, "unknown option 'bugdet'"),
        ({"train": {"epoch": 3}}, "train: unknown option 'epoch'"),
        ({"phases": ["distil"]}, "found 'distil'"),
        ({"gates": {"labels": "best"}}, "expected damage or threshold"),
        ({"acm": {"num_learners": 0}}, "num_learners: found 0"),
        ({"acm": {"num_learners": "many"}}, "num_learners"),
        ({"acm": {"learner_dim": -4}}, "learner_dim: found -4"),
        ({"acm": 3}, "acm"),
        ({"budget": "half"}, "budget"),
        ({"budget": True}, "budget"),
        ({"budgets": 0.5}, "budgets"),
        ({"budgets": ["a"]}, "budgets"),
        ({"budget": 1.5}, "budget"),
        ({"budgets": [0.5, -1]}, "budgets"),
        ({"train": {"epochs": 0}}, "epochs: found 0"),
        ({"train": {"lr": 0}}, "lr: found 0"),
        ({"train": {"warmup": 1.5}}, "warmup"),
        ({"train": {"hflip": 2}}, "hflip"),
        ({"train": {"mixup": -1}}, "mixup"),
        ({"distill": {"epochs": 0}}, "epochs: found 0"),
        ({"distill": {"tokens": 0}}, "tokens"),
        ({"gates": {"rounds": 0}}, "rounds"),
        ({"gates": {"tau": 0.5}}, "tau"),
        ({"gates": {"steps": 0}}, "steps"),
        ({"losses": {"task": -1}}, "task: found -1"),
        ({"limit": 0}, "limit"),
        ({"limit": 2.5}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"moments": 0}, "moments"),
        ({"seed": -1}, "seed"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"target_modules": "blocks.*"}, "target_modules"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AcmizeError) as caught:
        resolve(options)
    assert said in str(caught.value)


def test_whole_numbers_stand_for_floats() -> None:
    assert resolve({"budget": 1, "train": {"mixup": 1}}).budget == 1


def test_yaml_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: 0.7\nphases: [gates]\nacm: {num_learners: 5}\nlosses:\n  budgets: [0.5, 0.5]\n")
    made = resolve(read_config(file))
    assert (made.budget, made.phases, made.config.num_learners, made.losses.budgets) == (0.7, ("gates",), 5, (0.5, 0.5))
    for text, said in (("- 1", "found list"), ("a: [", "cannot be read"), ("", "found NoneType")):
        file.write_text(text)
        with pytest.raises(AcmizeError, match=said):
            read_config(file)
    with pytest.raises(AcmizeError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "phases"), [("none", ()), ("all", ("distill", "gates", "finetune")), ("gates", ("gates",))]
)
def test_phases_as_a_word_in_yaml(text: str, phases: tuple[str, ...]) -> None:
    assert resolve({"phases": text}).phases == phases
