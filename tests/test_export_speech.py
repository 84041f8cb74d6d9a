"""Exported speech models: recordings of any length, frames merged, the budget an input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from in_onnx import ask, session
from test_frame_merging import MERGING
from tiny_speech import HOSTS, adapted, inputs_for
from torch import Tensor, nn
from torch.export import Dim

from acmize.export import export
from acmize.export.onnx_merging import TRANSLATIONS
from acmize.export.trace import AnyLength, output_of, part_of, trace
from acmize.gates import gates_of
from acmize.hub import base_of, make_adaptive
from acmize.methods.token_merging import hooks_of, schedule_of
from acmize.phases.calibrate import Calibration
from acmize.recording import record

RULES = (
    MERGING,
    dataclasses.replace(MERGING, tokens=502, first=(1.0, 0.0), knees=(0.75, 0.5), decay=0.35, bend=(0.6, 0.8)),
    dataclasses.replace(MERGING, tokens=23),
    dataclasses.replace(MERGING, fixed=8),
)
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_is_stretched_in_the_graph_as_in_python(rule: Any) -> None:
    found = set()
    for budget in range(30, 101, 5):
        schedule = rule.schedule(budget / 100)
        for tokens in (1, 2, 3, 8, 23, 101, 499, 500, 502, 777, 2345, 40_000):
            there, pairs = AnyLength(rule).at(tokens, [torch.tensor(r) for r in schedule])
            far, expected = rule.at(tokens, schedule)
            assert tuple(map(int, pairs)) == expected
            assert int(there.saved(pairs)) == far.saved(expected)
            found.add(expected)
    assert len(found) > (5 if rule.fixed else 40)


class Merge(nn.Module):
    """An operator by itself: of neighbours, or (with a prefix) of any two tokens."""

    def __init__(self, prefix: int | None) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor, sizes: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.prefix is None:
            return torch.ops.acmize.merge_neighbours(x, sizes, r)
        return torch.ops.acmize.merge(x, sizes, r, self.prefix)


@pytest.mark.parametrize("prefix", [None, 1])
def test_merging_in_onnx_is_that_of_torch(prefix: int | None, tmp_path: Path) -> None:
    """Order included, on which later merges depend."""
    merge, free = Merge(prefix).eval(), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    example = (torch.randn(2, 9, 6), torch.ones(2, 9), torch.tensor(2))
    program = torch.onnx.export(
        merge, example, dynamic_shapes=(free, free, None), custom_translation_table=TRANSLATIONS, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "merge.onnx")
    loaded = session(tmp_path / "merge.onnx")
    names = [given.name for given in loaded.get_inputs()]
    for samples, tokens, pairs in ((1, 3, 1), (3, 10, 4), (3, 11, 5), (2, 11, 1), (2, 10, 0), (1, 501, 200)):
        x, sizes = torch.randn(samples, tokens, 6), torch.randint(1, 4, (samples, tokens)).float()
        expected = merge(x, sizes, torch.tensor(pairs))
        assert expected[0].shape == (samples, tokens - pairs, 6)
        feed = dict(zip(names, (x.numpy(), sizes.numpy(), torch.tensor(pairs).numpy()), strict=True))
        for mine, theirs in zip(loaded.run(None, feed), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=1e-5, atol=1e-5)


def adaptive(name: str, **kwargs: Any) -> Any:
    """A converted tiny model whose random gates choose differently for different frames and budgets."""
    torch.manual_seed(0)
    dense = HOSTS[name]()
    made, plan = adapted(dense, **kwargs)
    for gate in gates_of(made):
        for parameter, p in gate.named_parameters():
            nn.init.normal_(p, std=1.0 if "weight" in parameter else 0.3)
        gate.fc2.bias.data -= 10  # type: ignore[union-attr]  # damages of about the price of the learners
    low = round(plan.budget_range[0] + 0.02, 3)
    table = Calibration(budgets=(1.0, low), dials=(0.3, 0.5) if name == "whisper" else (0.6, 0.72))
    return make_adaptive(made.eval(), plan, table, base_of(dense))


def agrees(model: Any, run: Any) -> None:
    """At several budgets and lengths `run` (x, budget) gives the outputs and shares that the model itself does."""
    plan, part, kept = model.plan, part_of(model), set()
    low = model.calibration.budgets[-1]
    stride = getattr(model.config, "inputs_to_logits_ratio", 384)
    batches = ((3, 24), (1, 8), (1, 60)) if plan.length_macs else ((3, 20), (1, 20))
    for recordings, frames in batches:
        x = inputs_for(model, (frames * stride,) * recordings).tensors[model.main_input_name]
        outputs = []
        for budget in (0.97, round((0.97 + low) / 2, 2), low):
            model.set_budget(budget)
            with torch.no_grad(), record(part, len(x)) as seen:
                expected = output_of(part(x))
            choices = torch.cat([c.flatten() for c in seen.per_token.values()])
            assert 0.05 < (choices < choices.max()).double().mean() < 0.95
            kept.add((frames, seen.tokens[plan.entries[-1].fqn]))
            macs, most = plan.account(seen.executed().double(), seen.tokens, schedule_of(model))
            found, share = run(x, budget)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(share.double(), macs / most, atol=1e-5, rtol=0)
            outputs.append(expected)
        assert not torch.allclose(outputs[0], outputs[-1], atol=1e-3)
    assert plan.merging is None or len(kept) > len(batches), "as many tokens are left at every budget"


@pytest.mark.usefixtures("_always_skip")
@pytest.mark.parametrize(
    ("name", "merge"), [("moonshine", "budget"), ("wav2vec2", "budget"), ("whisper", "auto"), ("wav2vec2", "none")]
)
def test_one_onnx_file_for_recordings_of_any_length(name: str, merge: str, tmp_path: Path) -> None:
    """The encoder of a model with a decoder, else the whole model; recordings longer and shorter than the example."""
    model = adaptive(name, merge=merge)
    loaded = session(export(model, tmp_path / "model.onnx", compute=True))
    told = loaded.get_modelmeta().custom_metadata_map
    whole = name == "wav2vec2"
    assert [output.name for output in loaded.get_outputs()] == ["logits" if whole else "hidden_states", "macs_ratio"]
    assert told.get("part") == (None if whole else "model.encoder")
    agrees(model, lambda x, budget: (ask(loaded, x, budget), ask(loaded, x, budget, "macs_ratio")))


@pytest.mark.parametrize("name", ["moonshine", "hubert pre-norm"])
def test_a_torch_program_merges_frames(name: str, tmp_path: Path) -> None:
    model = adaptive(name, merge="budget")
    program = torch.export.load(export(model, tmp_path / "model.pt2", "torch-export", compute=True)).module()
    agrees(model, lambda x, budget: program(x, torch.tensor(budget)))


def test_tracing_leaves_merging_as_it_was() -> None:
    model = adaptive("whisper", merge="budget")
    model.set_budget(0.6)
    before, x = schedule_of(model), inputs_for(model).without("decoder_input_ids").tensors["input_features"]
    assert any(before)
    with torch.no_grad():
        expected = part_of(model)(x).last_hidden_state
        trace(model)
        assert schedule_of(model) == before
        assert all(hook.merging is model.plan.merging for hook in hooks_of(model))
        assert torch.equal(part_of(model)(x).last_hidden_state, expected)
