"""Sites that do not pay on this device stay dense."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from short import converted
from tiny import images, plan_of, vit

from acmize import AcmizeError, stages
from acmize.adaptive import AcmMlp
from acmize.checkpoint import read_json
from acmize.hub import from_pretrained
from acmize.site_times import SiteTime, site_times


def test_places_of_equal_shape_are_timed_together() -> None:
    dense: Any = vit()
    before = {name: p.clone() for name, p in dense.state_dict().items()}
    plan = plan_of(dense)
    times = site_times(dense, plan, images(2))
    assert sorted(name for t in times for name in t.names) == sorted(e.fqn for e in plan.entries)
    assert {len(t.names) for t in times} == {len(dense.blocks), 4 * len(dense.blocks)}  # MLPs; q, k, v and out
    assert all(t.dense_ms > 0 and t.adaptive_ms > 0 for t in times)
    assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items())


def test_time_spent_in_a_site_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = AcmMlp.forward

    def slow(self: AcmMlp, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return own(self, x)

    monkeypatch.setattr(AcmMlp, "forward", slow)
    dense: Any = vit()
    for t in site_times(dense, plan_of(dense), images(2)):
        assert (t.adaptive_ms > 20) == ("mlp" in t.names[0])
        assert t.dense_ms < 20


def times(pays: Any) -> Any:
    """A stand-in for the clock: entries for which `pays` holds are twice as fast with learners."""

    def measured(_dense: Any, plan: Any, inputs: torch.Tensor, _seed: int) -> list[SiteTime]:
        assert len(inputs) == 4
        return [SiteTime((e.fqn,), 2.0, 1.0 if pays(e) else 2.0) for e in plan.entries]

    return measured


def test_what_does_not_pay_stays_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(stages, "site_times", times(lambda e: e.kind == "mlp"))
    made = converted({"phases": [], "fit_batch": 4, "budget": 0.8, "budgets": []})
    assert {e.kind for e in made.plan.entries} == {"mlp"}
    reasons = {r.reason for r in made.plan.refused if ".attn." in r.fqn}
    assert reasons == {"does not pay on this device in batches of 4"}
    assert made.results["results"]
    assert made.plan.merging is not None
    assert made.plan.merging.every == 2  # merges take time too


def test_where_no_site_pays_tokens_alone_are_merged(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(stages, "site_times", times(lambda _: False))
    made = converted({"phases": [], "fit_batch": 4, "budget": 0.6, "budgets": [0.8, 0.6]})
    assert made.plan.entries == ()
    rows = made.results["results"]
    assert [row["budget"] for row in rows] == [0.8, 0.6]
    for row in rows:  # whole tokens: of 17, one is a step
        assert row["macs_ratio"] == pytest.approx(row["budget"], abs=0.06)
    assert rows[0]["macs_ratio"] > rows[1]["macs_ratio"]
    x = torch.randn(3, *made.plan.input_size)
    made.save_pretrained(tmp_path / "saved")

    def logits(model: Any, budget: float) -> torch.Tensor:
        model.set_budget(budget)
        with torch.no_grad():
            return model(x)

    assert (logits(made, 1.0) - logits(made, 0.6)).abs().max() > 1e-3
    assert torch.equal(logits(from_pretrained(tmp_path / "saved"), 0.6), logits(made, 0.6))


def test_sites_that_lose_least_are_kept_where_merging_cannot_reach_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(_dense: Any, plan: Any, _inputs: Any, _seed: int) -> list[SiteTime]:
        return [SiteTime((e.fqn,), 2.0, {"mlp": 2.5, "q": 2.4}.get(e.kind, 3.0)) for e in plan.entries]

    monkeypatch.setattr(stages, "site_times", losing)
    alone = converted({"phases": [], "fit_batch": 4, "budget": 0.8, "budgets": []})
    assert alone.plan.entries == ()
    budget = round(alone.plan.budget_range[0] - 0.02, 2)
    made = converted({"phases": [], "fit_batch": 4, "budget": budget, "budgets": []})
    kinds = {e.kind for e in made.plan.entries}
    assert "q" in kinds  # it loses least
    assert not kinds & {"k", "v", "out"}
    assert made.plan.budget_range[0] <= budget
    assert made.results["results"][0]["macs_ratio"] == pytest.approx(budget, abs=0.06)


def test_merging_alone_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "site_times", times(lambda _: False))
    options = {"fit_batch": 4, "budget": 0.6, "budgets": [0.6], "losses": {"task": 1.0, "entropy": 0.1}}
    made = converted({**options, "phases": ["distill", "gates", "finetune"], "train": {"interpolate": False}})
    untrained = converted({**options, "phases": []})
    assert made.plan == untrained.plan
    assert made.plan.entries == ()
    assert any(not torch.equal(p, q) for p, q in zip(made.parameters(), untrained.parameters(), strict=True))
    assert made.results["results"][0]["macs_ratio"] == untrained.results["results"][0]["macs_ratio"]


def test_nothing_pays_and_nothing_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "site_times", times(lambda _: False))
    with pytest.raises(AcmizeError, match="no site pays on this device in batches of 4; try a larger batch"):
        converted({"phases": [], "fit_batch": 4, "merge": "none"})


def test_a_budget_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "site_times", times(lambda e: e.kind == "q"))
    with pytest.raises(AcmizeError, match="cannot go below"):
        converted({"phases": [], "fit_batch": 4, "budget": 0.3, "merge": "none"})


def test_a_resumed_conversion_keeps_its_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    options = {"phases": [], "fit_batch": 4, "budget": 0.8, "budgets": []}
    monkeypatch.setattr(stages, "site_times", times(lambda e: e.kind == "mlp"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "initialise_", killed)
        with pytest.raises(KeyboardInterrupt):
            converted(options, work=tmp_path / "work")
    assert read_json(tmp_path / "work" / "device.json")["names"]
    monkeypatch.setattr(stages, "site_times", times(lambda _: True))  # the clock says otherwise now
    made = converted(options, work=tmp_path / "work", resume=True)
    assert {e.kind for e in made.plan.entries} == {"mlp"}
