"""Schedules on given statistics and on l_X sequences of recorded runs, whose steps are known in every epoch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.methods.schedules import AccuracyThreshold, Annealed, EveryDEpochs, GradientMagnitude, replay
from deat_rb.training.metrics import EpochStats
from deat_rb.training.schedule import Constant, Schedule
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN

RUNS = json.loads((Path(__file__).parents[1] / "fixtures" / "gradient_magnitude_runs.json").read_text())["runs"]
EPS = 8 / 255


def rows(l_x: Sequence[float]) -> list[dict[str, Any]]:
    return [{"epoch": epoch, "l_x": value} for epoch, value in enumerate(l_x, start=1)]


def magnitude(gamma: float = 1.0, max_steps: int = 8, start: int = 1) -> GradientMagnitude:
    return GradientMagnitude(gamma=gamma, max_steps=max_steps, start=start)


# ------------------------------------------------------------------------------------------------ the magnitude


@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_gradient_magnitude_reproduces_recorded_runs(run: dict[str, Any]) -> None:
    schedule = GradientMagnitude(gamma=run["gamma"], max_steps=run["max_steps"], start=run["start"])
    assert len(run["l_x"]) == len(run["steps"]) >= 50
    assert replay(schedule, rows(run["l_x"])) == run["steps"]


@pytest.mark.parametrize("change", [{"gamma": 1.0}, {"gamma": 1.02}, {"max_steps": 7}, {"max_steps": 11}])
def test_gradient_magnitude_with_other_settings_differs_from_recorded_runs(change: dict[str, Any]) -> None:
    settings = [{key: run[key] for key in ("gamma", "max_steps", "start")} | change for run in RUNS]
    replayed = [replay(GradientMagnitude(**each), rows(run["l_x"])) for each, run in zip(settings, RUNS, strict=True)]
    assert any(steps != run["steps"] for steps, run in zip(replayed, RUNS, strict=True))


def test_gradient_magnitude_follows_algorithm_2() -> None:
    # Epoch 1: 1 step. After it 2. Epoch 2's l_X, 10, sets the threshold to gamma 10 = 12. 12 is not above it; 12.5 is:
    # 3 steps and a threshold of 15. 14 is below. 16 is above: 4 steps, threshold 19.2. 19 is below, 20 above.
    l_x = [99.0, 10.0, 12.0, 12.5, 14.0, 16.0, 19.0, 20.0, 1.0]
    assert replay(magnitude(gamma=1.2), rows(l_x)) == [1, 2, 2, 2, 3, 3, 4, 4, 5]


def test_gradient_magnitude_threshold_is_that_of_the_last_increase() -> None:
    schedule = magnitude(gamma=1.5)
    seen = []
    for epoch, l_x in enumerate([7.0, 4.0, 5.0, 8.0, 11.0, 13.0], start=1):
        schedule.update(EpochStats(epoch=epoch, l_x=l_x))
        seen.append(schedule.threshold)
    assert seen == [None, 6.0, 6.0, 12.0, 12.0, 19.5]


def test_gradient_magnitude_keeps_the_steps_while_l_x_falls() -> None:
    assert replay(magnitude(), rows([9.0, 8.0, 7.0, 6.0, 5.0])) == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(("bound", "last"), [(1, 1), (2, 2), (8, 8), (10, 10)])
def test_gradient_magnitude_stops_at_max_steps(bound: int, last: int) -> None:
    steps = replay(magnitude(max_steps=bound), rows([2.0**epoch for epoch in range(20)]))
    assert steps[-1] == last
    assert max(steps) == last


def test_gradient_magnitude_updates_the_threshold_at_max_steps() -> None:
    # Algorithm 2 sets the threshold whenever l_X exceeds it, also at the bound.
    schedule = magnitude(max_steps=2)
    for epoch, l_x in enumerate([1.0, 2.0, 3.0, 5.0], start=1):
        schedule.update(EpochStats(epoch=epoch, l_x=l_x))
    assert (schedule.steps, schedule.threshold) == (2, 5.0)


def test_gradient_magnitude_may_start_with_0_steps() -> None:
    assert replay(magnitude(start=0), rows([0.0, 1.0, 2.0, 3.0])) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("steps", "alpha", "expected"),
    [(1, 2, 8), (2, 2, 4), (3, 2, 8 / 3), (4, 2, 2), (5, 2, 2), (8, 2, 2), (1, 10, 10), (8, 10, 10), (0, 2, 8)],
)
def test_gradient_magnitude_alpha_is_at_least_eps_over_r(steps: int, alpha: float, expected: float) -> None:
    schedule = magnitude(start=steps)
    assert schedule.alpha(alpha / 255, EPS) == pytest.approx(expected / 255)


@given(st.floats(1e-4, 1.0), st.floats(1e-3, 1.0), st.integers(1, 20))
def test_gradient_magnitude_alpha_times_steps_reaches_eps(alpha: float, eps: float, steps: int) -> None:
    found = magnitude(start=steps, max_steps=20).alpha(alpha, eps)
    assert found * steps >= eps * (1 - 1e-12)
    assert found >= alpha


@given(st.lists(st.floats(0.1, 1e6), max_size=40), st.floats(0.5, 2.0), st.integers(1, 10), st.floats(1e-3, 1e3))
def test_gradient_magnitude_does_not_depend_on_the_scale_of_l_x(
    l_x: list[float], gamma: float, bound: int, scale: float
) -> None:
    steps = replay(magnitude(gamma, bound), rows(l_x))
    assert all(later - earlier in (0, 1) for earlier, later in itertools.pairwise(steps))
    assert all(1 <= taken <= bound for taken in steps)
    power = 2.0 ** round(math.log2(scale))  # a power of two scales without rounding
    assert replay(magnitude(gamma, bound), rows([power * value for value in l_x])) == steps


# ------------------------------------------------------------------------------------------------ the others


@pytest.mark.parametrize(
    ("every", "epochs", "steps", "total"),
    [
        (3, 10, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4], 22),
        (3, 12, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4], 30),
        (1, 4, [1, 2, 3, 4], 10),
        (2, 5, [1, 1, 2, 2, 3], 9),
        (10, 4, [1, 1, 1, 1], 4),
    ],
)
def test_every_d_epochs_adds_a_step_every_d_epochs(every: int, epochs: int, steps: list[int], total: int) -> None:
    assert replay(EveryDEpochs(every), rows([0.0] * epochs)) == steps
    schedule = EveryDEpochs(every)
    assert schedule.step_bounds(epochs) == [(step, step) for step in steps]
    assert sum(steps) == total
    assert schedule.steps == 1  # unchanged by the call


def test_every_d_epochs_with_max_steps_and_start() -> None:
    schedule = EveryDEpochs(2, start=2, max_steps=3)
    assert schedule.step_bounds(7) == [(2, 2)] * 2 + [(3, 3)] * 5
    assert replay(schedule, rows([0.0] * 7)) == [2, 2, 3, 3, 3, 3, 3]


def test_constant_keeps_its_steps() -> None:
    assert replay(Constant(7), rows([1.0, 100.0, 1.0])) == [7, 7, 7]
    assert Constant(7).step_bounds(3) == [(7, 7)] * 3


def test_accuracy_threshold_adds_a_step_above_the_threshold() -> None:
    accuracies = [0.2, 0.4, 0.41, 0.39, 0.9]
    table = [{"train_acc": accuracy} for accuracy in accuracies]
    assert replay(AccuracyThreshold(0.4), table) == [1, 1, 1, 2, 2]
    last = AccuracyThreshold(0.4, start=2, max_steps=3)
    assert replay(last, table) == [2, 2, 2, 3, 3]
    assert last.steps == 3


def annealed(epochs: int, start: int = 2, max_steps: int = 10) -> Annealed:
    schedule = Annealed(start, max_steps=max_steps)
    schedule.begin(epochs)
    return schedule


def test_annealed_has_the_steps_that_the_public_code_ran() -> None:
    """The seconds per epoch in DEAT's log of Amata-2-10 rise after 7, 13, 19, 25, 32, 38 and 44 of 50 epochs."""
    counts = {2: 7, 3: 6, 4: 6, 5: 6, 6: 7, 7: 6, 8: 6, 9: 6}
    steps = replay(annealed(50), [{}] * 50)
    assert steps == [step for step, count in counts.items() for _ in range(count)]
    assert Annealed().step_bounds(50) == [(step, step) for step in steps]
    assert sum(steps) == 272


def test_annealed_step_sizes_sum_to_tau() -> None:
    schedule = annealed(4, start=3, max_steps=7)
    found = []
    for epoch in range(1, 7):
        found.append((schedule.steps, schedule.alpha(20 / 255 / 3, EPS)))
        schedule.update(EpochStats(epoch=epoch))
    assert [steps for steps, _ in found] == [3, 4, 5, 6, 7, 7]
    assert [alpha * steps for steps, alpha in found] == pytest.approx([20 / 255] * 6)


def test_annealed_needs_the_number_of_epochs() -> None:
    with pytest.raises(DeatError, match=r"the number of epochs is unknown: call schedule\.begin\(epochs\)"):
        Annealed().update(EpochStats(epoch=1))
    with pytest.raises(DeatError, match="over the epochs of the run, so their number must be known: give epochs = 50"):
        Annealed().begin(OPEN)
    with pytest.raises(DeatError, match="steps = 0 is below 1; the method's schedule needs at least 1 step"):
        Annealed(0)
    with pytest.raises(DeatError, match=r"max_steps = 2 is below the first epoch's steps \(4\)"):
        Annealed(4, max_steps=2)


def test_step_bounds_of_schedules_that_depend_on_statistics() -> None:
    """l_X always adds a step after the first epoch, accuracy may not."""
    assert GradientMagnitude().step_bounds(4) == [(1, 1), (2, 2), (2, 3), (2, 4)]
    assert GradientMagnitude(max_steps=3).step_bounds(5)[2:] == [(2, 3)] * 3
    assert GradientMagnitude(max_steps=1).step_bounds(3) == [(1, 1)] * 3
    assert AccuracyThreshold(start=2).step_bounds(3) == [(2, 2), (2, 3), (2, 4)]
    assert Schedule().step_bounds(3) is None


@pytest.mark.parametrize("schedule", [Constant(3), EveryDEpochs(), AccuracyThreshold()])
def test_alpha_is_changed_by_gradient_magnitude_only(schedule: Schedule) -> None:
    assert schedule.alpha(0.01, EPS) == 0.01
    assert not schedule.guided
    assert magnitude().guided


# ------------------------------------------------------------------------------------------------ state and replay

MAKERS: list[Callable[[], Schedule]] = [
    lambda: Constant(5),
    lambda: EveryDEpochs(3),
    lambda: AccuracyThreshold(0.5, max_steps=6),
    lambda: GradientMagnitude(gamma=1.01, max_steps=8),
    lambda: annealed(60),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 30])
def test_schedules_resume_from_state_dict(make: Callable[[], Schedule], cut: int) -> None:
    run = RUNS[0]
    table = [{**row, "train_acc": 0.3 + row["epoch"] / 100} for row in rows(run["l_x"])]
    whole = replay(make(), table)
    first, second = make(), make()
    begun = replay(first, table[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + replay(second, table[cut:]) == whole
    assert len(set(whole)) > 1 or isinstance(first, Constant)


def test_replay_reads_rows_of_metrics() -> None:
    lines = [
        '{"epoch": 1, "l_x": 5.0, "steps": 1, "lr": 0.1, "val_acc": null, "of_a_later_version": 3}',
        '{"epoch": 2, "l_x": 4.0, "steps": 2, "lr": 0.1, "stopped": null}',
        '{"epoch": 3, "l_x": 6.0, "steps": 2, "lr": 0.1}',
        '{"epoch": 4, "l_x": 6.0, "steps": 3, "lr": 0.1}',
    ]
    assert replay(magnitude(), [json.loads(line) for line in lines]) == [1, 2, 2, 3]
    assert replay(EveryDEpochs(2), [{}, {}, {}]) == [1, 1, 2]  # rows without a number are counted
    assert replay(magnitude(), []) == []
    own = [EpochStats(epoch=epoch, l_x=value) for epoch, value in enumerate([1.0, 1.0, 2.0, 3.0], start=1)]
    assert replay(magnitude(), own) == [1, 2, 2, 3]


# ------------------------------------------------------------------------------------------------ refusals

REFUSALS: list[tuple[Callable[[], Schedule], str]] = [
    (lambda: Constant(-1), r"^steps = -1 is not a non-negative whole number"),
    (lambda: EveryDEpochs(0), r"^every = 0 is below 1 epoch"),
    (lambda: EveryDEpochs(start=3, max_steps=2), r"^max_steps = 2 is below the first epoch's steps \(3\)"),
    (lambda: AccuracyThreshold(40), r"^threshold = 40 is outside \(0, 1\); DEAT-40% uses 0.4"),
    (lambda: AccuracyThreshold(math.nan), r"^threshold = nan is outside"),
    (lambda: GradientMagnitude(gamma=0), r"^gamma = 0 is not a positive number; the paper uses 1.0 and 1.01"),
    (lambda: GradientMagnitude(gamma=math.inf), r"^gamma = inf is not"),
    (lambda: GradientMagnitude(max_steps=0), r"^max_steps = 0 is below the first epoch's steps \(1\)"),
    (lambda: GradientMagnitude(start=-1), r"^steps = -1 is not a non-negative whole number"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_constructor_refuses_invalid_settings(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        make()
