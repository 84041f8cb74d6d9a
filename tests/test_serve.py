"""Serving: the controller's decisions, the server's promises, and an overload, on a clock that only the model moves."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acmize.errors import AcmizeError
from acmize.serve import BudgetController, ControllerConfig, Server, arrivals, load

WAIT = 60  # seconds after which a test that hangs fails
SAMPLE_S = 0.010  # of the fake model at budget 1


def config(**options: Any) -> ControllerConfig:
    return ControllerConfig(**{"target": 1.0, "low": 0.4, "high": 0.9, **options})


# --- the controller -------------------------------------------------------------------------------------------


def test_it_falls_under_pressure_and_never_below_the_range() -> None:
    controller = BudgetController(config())
    seen = [controller.decide(waiting=9, oldest=0.7) for _ in range(20)]
    assert seen[0] == pytest.approx(0.9 * 0.85)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0.4 == min(seen)


def test_it_rises_in_calm_and_never_above_the_range() -> None:
    controller = BudgetController(config())
    controller.budget = 0.4
    seen = [controller.decide(waiting=0, oldest=0.0, finished=[0.1]) for _ in range(80)]
    assert seen[0] == pytest.approx(0.41)
    assert seen == sorted(seen)
    assert seen[-1] == 0.9 == max(seen)


def test_the_95th_percentile_of_what_finished_counts_even_when_nothing_waits() -> None:
    slow = BudgetController(config())
    assert slow.decide(waiting=0, oldest=0.0, finished=[0.1] * 18 + [0.9] * 2) < 0.9
    one_in_twenty = BudgetController(config())
    assert one_in_twenty.decide(waiting=0, oldest=0.0, finished=[0.1] * 19 + [0.9]) == 0.9


def test_what_was_measured_before_a_fall_is_not_held_against_the_new_budget() -> None:
    controller = BudgetController(config())
    assert controller.decide(waiting=0, oldest=0.0, finished=[5.0]) == pytest.approx(0.765)
    assert controller.decide(waiting=0, oldest=0.0) == pytest.approx(0.775)


def test_a_window_forgets() -> None:
    controller = BudgetController(config())
    for _ in range(3):
        controller.decide(waiting=1, oldest=0.0, finished=[0.5])  # in the band: nothing falls, nothing is cleared
    controller.budget = 0.5
    assert controller.decide(waiting=0, oldest=0.0, finished=[0.1]) == 0.5
    assert controller.decide(waiting=0, oldest=0.0, finished=[0.1] * 64) == pytest.approx(0.51)


def test_between_the_bounds_it_stays_unless_the_queue_grows() -> None:
    controller = BudgetController(config())
    controller.budget = 0.6
    seen = [controller.decide(waiting=w, oldest=0.45) for w in (0, 0, 0)]
    assert seen == [0.6] * 3
    assert controller.decide(waiting=5, oldest=0.45) == pytest.approx(0.51)
    assert controller.decide(waiting=5, oldest=0.45) == pytest.approx(0.51)
    assert controller.decide(waiting=2, oldest=0.45) == pytest.approx(0.51)


def test_a_queue_that_is_young_neither_raises_nor_lowers() -> None:
    controller = BudgetController(config())
    controller.budget = 0.6
    assert [controller.decide(waiting=w, oldest=0.1) for w in (3, 5, 4)] == [0.6] * 3


def test_noise_around_a_bound_does_not_make_it_swing() -> None:
    controller = BudgetController(config())
    controller.budget = 0.6
    ages = [0.31, 0.59] * 50  # all of the band
    assert {controller.decide(waiting=0, oldest=age) for age in ages} == {0.6}


def test_more_load_never_gives_a_larger_budget() -> None:
    histories = itertools.product([(0, 0.0, ()), (4, 0.45, (0.4,)), (9, 0.9, (0.7, 0.8))], repeat=3)
    ages, queues, lates = (0.0, 0.2, 0.3, 0.45, 0.6, 2.0), (0, 1, 5, 20), ((), (0.2,), (0.4,), (0.7,), (3.0,))
    for history in histories:
        controller = BudgetController(config())
        controller.budget = 0.7
        for waiting, oldest, finished in history:
            controller.decide(waiting=waiting, oldest=oldest, finished=finished)

        def told(waiting: int, oldest: float, finished: tuple[float, ...], state: Any = controller) -> float:
            return copy.deepcopy(state).decide(waiting=waiting, oldest=oldest, finished=finished)

        for w, a, f in itertools.product(queues, ages, lates):
            here = told(w, a, f)
            assert all(told(v, a, f) <= here for v in queues if v > w)
            assert all(told(w, b, f) <= here for b in ages if b > a)
            assert all(told(w, a, g) <= here for g in lates if sum(g) > sum(f))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target": 0.0}, "target"), ({"target": math.inf}, "target"), ({"target": math.nan}, "target"),
        ({"low": 0.0}, "low"), ({"low": 0.95}, "low"), ({"high": 1.1}, "low"), ({"raise_at": 0.6}, "raise_at"),
        ({"lower_at": 1.5}, "raise_at"), ({"decrease": 1.0}, "decrease"), ({"increase": 0.0}, "increase"),
    ],
)  # fmt: skip
def test_a_config_out_of_range_is_refused(options: dict[str, float], name: str) -> None:
    with pytest.raises(AcmizeError, match=f"^{name}: found .*, expected .*; "):
        config(**options)


def test_the_range_is_that_of_the_evaluated_budgets_else_of_the_calibration() -> None:
    rows = [{"budget": 0.6}, {"budget": 0.9}, {"budget": 0.45}]
    calibration = SimpleNamespace(budgets=(1.0, 0.9, 0.6, 0.45, 0.05))
    model = SimpleNamespace(calibration=calibration, results={"results": rows})
    made = BudgetController.of(model, 0.2, decrease=0.5)
    assert (made.config.low, made.config.high, made.config.target, made.config.decrease) == (0.45, 0.9, 0.2, 0.5)
    assert made.budget == 0.9
    assert BudgetController.of(model, 0.2, high=0.6).config.high == 0.6
    bare = BudgetController.of(SimpleNamespace(calibration=calibration, results={}), 0.2).config
    assert (bare.low, bare.high) == (0.05, 1.0)
    with pytest.raises(AcmizeError, match="expected an adaptive one"):
        BudgetController.of(nn.Linear(1, 1), 0.2)


# --- the server -----------------------------------------------------------------------------------------------


class Fake:
    """Doubles its input; takes `SAMPLE_S` a sample at budget 1, in proportion to the budget, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.budget = 0.0, 1.0
        self.batches: list[int] = []
        self.budgets: list[float] = []
        self.during: Callable[[], None] = lambda: None

    def set_budget(self, budget: float) -> None:
        if budget < 0.3:
            raise AcmizeError("budget: too small")
        self.budget = budget
        self.budgets.append(budget)

    def __call__(self, x: Tensor) -> Tensor:
        self.during()
        if (x < 0).any():
            raise RuntimeError("negative")
        self.batches.append(len(x))
        self.now += SAMPLE_S * len(x) * self.budget
        return 2 * x


class Simulated:
    """A server without a thread on the fake model's clock: whoever sleeps lets it serve."""

    def __init__(self, controller: BudgetController | None = None, **options: Any) -> None:
        self.model = Fake()
        self.server = Server(self.model, controller, clock=lambda: self.model.now, threaded=False, **options)

    def sleep(self, seconds: float) -> None:
        until, asleep = self.model.now + seconds, True
        while asleep and self.model.now < until:
            before = self.model.now
            self.server.step()
            asleep = self.model.now > before
        self.model.now = max(self.model.now, until)

    def load(self, rates: list[tuple[float, float]], **options: Any) -> dict[str, Any]:
        return load(self.server, torch.arange(50.0), rates, sleep=self.sleep, **options)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(Fake(), max_batch=4) as made:
        yield made


def test_every_request_gets_its_own_answer_once(server: Server) -> None:
    def ask(first: int) -> list[tuple[int, Any]]:
        return [(n, server.submit(torch.tensor([float(n)]))) for n in range(first, first + 100)]

    with ThreadPoolExecutor(4) as pool:
        asked = [pair for part in pool.map(ask, range(0, 400, 100)) for pair in part]
    assert [answer.result(WAIT).item() for _, answer in asked] == [2.0 * n for n, _ in asked]
    assert sum(server.model.batches) == 400
    assert max(server.model.batches) <= 4


def test_what_waits_while_the_model_runs_makes_the_next_batch_in_order() -> None:
    started, go = threading.Event(), threading.Event()
    model = Fake()
    seen: list[float] = []
    with Server(lambda x: seen.extend(x.tolist()) or model(x), max_batch=4) as server:
        model.during = lambda: (started.set(), go.wait(WAIT)) and None
        first = server.submit(torch.tensor(0.0))
        assert started.wait(WAIT)
        rest = [server.submit(torch.tensor(float(n))) for n in range(1, 7)]
        assert not any(answer.done() for answer in (first, *rest))
        go.set()
    assert model.batches == [1, 4, 2]
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    assert [answer.result(0).item() for answer in (first, *rest)] == [2.0 * n for n in range(7)]


def test_only_samples_of_one_shape_and_dtype_go_together() -> None:
    made = Simulated(max_batch=8)
    xs = [torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(2)]
    answers = [made.server.submit(x) for x in xs]
    made.server.flush()
    assert made.model.batches == [2, 1, 1, 1]
    for x, answer in zip(xs, answers, strict=True):
        torch.testing.assert_close(answer.result(0), 2 * x)


def test_an_error_of_the_model_reaches_its_batch_alone_and_serving_goes_on(server: Server) -> None:
    bad = server.submit(torch.tensor(-1.0))
    with pytest.raises(RuntimeError, match="negative"):
        bad.result(WAIT)
    assert server.submit(torch.tensor(1.0)).result(WAIT).item() == 2.0
    assert bad.latency is not None


def test_outputs_that_are_too_few_are_an_error() -> None:
    with Server(lambda x: x[:0]) as server, pytest.raises(AcmizeError, match="found 0 outputs, expected 1"):
        server.submit(torch.tensor(1.0)).result(WAIT)


def test_after_close_nothing_is_taken_and_all_is_answered(server: Server) -> None:
    answers = [server.submit(torch.tensor(float(n))) for n in range(20)]
    server.close()
    assert all(answer.done() for answer in answers)
    with pytest.raises(AcmizeError, match=r"server: found it closed, expected .*; submit inside"):
        server.submit(torch.tensor(1.0))
    server.close()


def test_a_block_that_raises_cancels_what_waits() -> None:
    made, asked = Simulated(), []

    def fails() -> None:
        with made.server:
            asked.append(made.server.submit(torch.tensor(1.0)))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with pytest.raises(CancelledError):
        asked[0].result(0)
    assert made.model.batches == []


def test_a_cancelled_request_is_left_out() -> None:
    made = Simulated()
    one, two = (made.server.submit(torch.tensor(float(n))) for n in (1, 2))
    assert one.cancel()
    made.server.flush()
    assert made.model.batches == [1]
    assert two.result(0).item() == 4.0
    assert not two.cancel()


def test_latency_counts_from_arrival_and_the_budget_is_told() -> None:
    made = Simulated(BudgetController(config(target=10.0)), max_batch=1)
    made.model.now = 5.0
    early, late = made.server.submit(torch.tensor(1.0), arrived=4.5), made.server.submit(torch.tensor(1.0))
    made.server.flush()
    assert early.latency == pytest.approx(0.5 + 0.9 * SAMPLE_S)
    assert late.latency == pytest.approx(2 * 0.9 * SAMPLE_S)
    assert early.budget == late.budget == 0.9
    assert made.model.budgets == [0.4, 0.9, 0.9]  # the least once, to see whether it can be reached


def test_without_a_controller_the_budget_is_left_alone() -> None:
    made = Simulated()
    made.model.budget = 0.7
    report = made.load([(300.0, 0.5)])
    assert made.model.budgets == []
    assert report["all"]["budget"] == pytest.approx(0.7)
    with Server(nn.Identity().eval()) as dense:
        assert load(dense, torch.ones(1, 2), [(1000.0, 0.02)])["all"]["budget"] is None


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(AcmizeError, match="leave the controller out"):
        Server(nn.Identity().eval(), BudgetController(config()))
    with pytest.raises(AcmizeError, match="too small"):
        Server(Fake(), BudgetController(config(low=0.1)))
    with pytest.raises(AcmizeError, match=r"call model\.eval"):
        Server(nn.Identity())
    with pytest.raises(AcmizeError, match="max_batch: found 0"):
        Server(Fake(), max_batch=0)
    with pytest.raises(AcmizeError, match="request: found list"):
        Simulated().server.submit([1.0])  # type: ignore[arg-type]


# --- a load ---------------------------------------------------------------------------------------------------


def test_arrivals_depend_on_the_seed_alone() -> None:
    rates = [(100.0, 2.0), (400.0, 1.0)]
    one, two = arrivals(rates, 3)
    assert [one, two] == arrivals(rates, 3) != arrivals(rates, 4)
    assert all(0 < t < 2 for t in one)
    assert all(2 < t < 3 for t in two)
    assert one + two == sorted(one + two)


def test_arrivals_are_poisson() -> None:
    (times,) = arrivals([(200.0, 100.0)], 0)
    assert len(times) == pytest.approx(20000, rel=0.03)
    gaps = torch.tensor(times).double().diff()
    assert gaps.std().item() == pytest.approx(
        gaps.mean().item(), rel=0.05
    )  # of an exponential distribution, not of a clockwork
    with pytest.raises(AcmizeError, match="rates: found"):
        arrivals([(0.0, 1.0)])


PEAK = [(40.0, 3.0), (150.0, 6.0), (40.0, 6.0)]  # the fake model manages 100 a second at budget 1


def simulated(controller: BudgetController | None, **options: Any) -> tuple[Simulated, dict[str, Any]]:
    made = Simulated(controller)
    return made, made.load(PEAK, **options)


def test_under_overload_the_controlled_one_is_on_time_and_the_fixed_one_is_not() -> None:
    fixed_model, fixed = simulated(None, target=0.3)
    made, controlled = simulated(BudgetController(config(target=0.3, high=1.0)))
    quiet, peak, after = controlled["phases"]
    assert fixed["phases"][1]["latency_ms"]["p95"] > 2000  # 50 a second too many for six seconds
    assert fixed["phases"][1]["over_target"] > 0.8
    assert peak["latency_ms"]["p95"] < 300
    assert peak["over_target"] < 0.05
    assert quiet["budget"] > 0.97
    assert 0.5 < peak["budget"] < 0.75  # 0.67 is what 150 a second allow, and 0.4 the least
    assert after["budget"] > peak["budget"] + 0.1
    assert made.model.budget == 1.0  # it has recovered
    assert 0.4 <= min(made.model.budgets) <= max(made.model.budgets) <= 1.0
    counts = [phase["requests"] for phase in fixed["phases"]]
    assert counts == [phase["requests"] for phase in controlled["phases"]] == [len(t) for t in arrivals(PEAK)]
    assert sum(made.model.batches) == sum(fixed_model.model.batches) == sum(counts) == controlled["all"]["requests"]


def test_the_report_of_a_load_is_right() -> None:
    made = Simulated(max_batch=1)
    report = made.load([(20.0, 2.0), (20.0, 1.0)], target=0.5 * SAMPLE_S)
    counts = [len(times) for times in arrivals([(20.0, 2.0), (20.0, 1.0)])]
    assert [phase["requests"] for phase in report["phases"]] == counts
    assert report["all"]["requests"] == sum(counts)
    assert report["all"]["throughput"] == pytest.approx(sum(counts) / 3, rel=0.01)
    assert report["all"]["over_target"] == 1.0
    assert report["all"]["latency_ms"]["p50"] == pytest.approx(1e3 * SAMPLE_S)
    assert report["phases"][0].keys() == {"requests", "failed", "latency_ms", "throughput", "budget", "over_target"}
    assert made.load([(20.0, 1.0)])["all"]["over_target"] is None


def test_failed_requests_are_counted_and_no_more() -> None:
    made = Simulated(max_batch=1)
    report = load(made.server, torch.tensor([1.0, -1.0]), [(50.0, 1.0)], sleep=made.sleep)
    count = report["all"]["requests"]
    assert report["all"]["failed"] == count // 2 > 5
    assert sum(made.model.batches) == count - count // 2
    broken = load(made.server, torch.tensor([-1.0]), [(50.0, 0.2)], sleep=made.sleep)["all"]
    assert (broken["latency_ms"], broken["throughput"], broken["failed"]) == (None, 0, broken["requests"])
