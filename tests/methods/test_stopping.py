"""Stopping rules on given statistics: no stop in healthy runs or on noise; at a surge the epoch before it is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.methods.stopping import GradientRatio, RobustnessDrop, replay
from deat_rb.training.metrics import EpochStats
from deat_rb.training.stopping_rule import StoppingRule
from deat_rb.utils.errors import DeatError


def by_l_x(values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"epoch": epoch, "l_x": value} for epoch, value in enumerate(values, start=1)]


def by_robustness(values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"epoch": epoch, "stop_robust_acc": value} for epoch, value in enumerate(values, start=1)]


# ------------------------------------------------------------------------------------------------ the gradient ratio

# m = 2: R^3 = (90 - 100) / 2 = -5, R^4 = (88 - 95) / 2 = -3.5, R^5 = (87 - 90) / 2 = -1.5, R^6 = -0.5, R^7 = 0.
# Each is above 1.5 times the one before it (-7.5, -5.25, ...), though l_X falls.
FALLING = [100.0, 95.0, 90.0, 88.0, 87.0, 87.0, 87.0]


def literal(values: Sequence[float], m: int = 2, gamma: float = 1.5) -> list[int]:
    """The epochs at which Equation 8, taken literally, would stop."""
    ratios = {t: (values[t - 1] - values[t - 1 - m]) / m for t in range(m + 1, len(values) + 1)}
    return [t for t in ratios if t - 1 in ratios and ratios[t] > gamma * ratios[t - 1]]


def test_gradient_ratio_ignores_a_falling_l_x() -> None:
    assert literal(FALLING)[0] == 4
    assert replay(GradientRatio(), by_l_x(FALLING)) is None


@pytest.mark.parametrize("surge", [160.0, 400.0, 1e4])
def test_gradient_ratio_stops_at_a_surge_and_keeps_the_epoch_before(surge: float) -> None:
    stop = replay(GradientRatio(), by_l_x([*FALLING, surge]))
    assert stop is not None
    assert stop.keep == 6  # the last epoch before the rise that was measured: m = 2 before it ended
    # R = (surge - 87) / 2, in per cent of l_X two epochs before.
    ratio = (surge - 87) / 2
    assert stop.reason == f"l_X rose by {ratio / 87:.0%} per epoch (R = {ratio:.4g}) up to epoch 8"


def test_gradient_ratio_needs_a_rise_above_guard() -> None:
    # Two epochs back is 100: R > 40 needs more than 180.
    healthy = [100.0] * 6
    assert replay(GradientRatio(), by_l_x([*healthy, 180.0])) is None
    assert replay(GradientRatio(), by_l_x([*healthy, 180.1])) is not None
    assert replay(GradientRatio(guard=0.2), by_l_x([*healthy, 139.9])) is None
    assert replay(GradientRatio(guard=0.2), by_l_x([*healthy, 140.1])) is not None


def test_gradient_ratio_needs_a_rise_above_gamma_times_the_previous() -> None:
    # R^4 = (114 - 106) / 2 = 4 (under the guard, 5.3); R^5 = (x - 110) / 2 has to be above 1.5 * 4 = 6 and 5.5.
    begun = [100.0, 106.0, 110.0, 114.0]
    assert replay(GradientRatio(guard=0.05), by_l_x([*begun, 121.9])) is None
    stop = replay(GradientRatio(guard=0.05), by_l_x([*begun, 122.1]))
    assert stop is not None
    assert stop.keep == 3
    assert replay(GradientRatio(gamma=3.0, guard=0.05), by_l_x([*begun, 133.9])) is None
    assert replay(GradientRatio(gamma=3.0, guard=0.05), by_l_x([*begun, 134.1])) is not None


def test_gradient_ratio_ignores_a_steady_rise() -> None:
    # m = 1: R = 4, under the guard of 5; then 5.5, 6.5 and 8, over it, but each less than 1.5 times the one before.
    read_locked = [100.0, 104.0, 109.5, 116.0, 124.0]
    assert replay(GradientRatio(m=1, guard=0.05), by_l_x(read_locked)) is None
    assert replay(GradientRatio(m=1, gamma=1.2, guard=0.05), by_l_x(read_locked)) is not None


def test_gradient_ratio_waits_for_two_ratios() -> None:
    # Early l_X may rise steeply: R^{m+1} has no previous ratio.
    for m in (1, 2, 3):
        assert replay(GradientRatio(m=m, guard=0.05), by_l_x([1.0, 50.0, 1e4, 1e6][: m + 1])) is None
        stop = replay(GradientRatio(m=m, guard=0.05), by_l_x([*[1.0] * (m + 1), 100.0]))
        assert stop is not None
        assert stop.keep == 2  # m epochs before the one that surges, m + 2
    assert replay(GradientRatio(guard=0.05), by_l_x([10.0, 13.0, 16.0, 19.0, 22.0, 25.0])) is None


def test_gradient_ratio_compares_epochs_m_apart() -> None:
    # Over m = 3 epochs the rise from 100 to 116 is 5.33 an epoch; over m = 2, from 100 to 116, it is 8.
    values = [100.0, 100.0, 100.0, 100.0, 100.0, 116.0]
    for m, per_epoch in ((1, 16), (2, 8), (3, 16 / 3)):
        stop = replay(GradientRatio(m=m, guard=0.05), by_l_x(values))
        assert stop is not None
        assert f"R = {per_epoch:.4g}" in stop.reason
    assert replay(GradientRatio(m=4, guard=0.05), by_l_x(values)) is None  # 4 an epoch


@given(
    st.lists(st.floats(-0.01, 0.01), min_size=3, max_size=40),
    st.floats(1e-3, 1e6),
    st.floats(0.8, 1.02),
    st.sampled_from([1, 2, 3]),
)
def test_gradient_ratio_ignores_one_percent_of_noise(noise: list[float], level: float, trend: float, m: int) -> None:
    values = [level * trend**epoch * (1 + share) for epoch, share in enumerate(noise)]
    assert replay(GradientRatio(m=m), by_l_x(values)) is None


@given(
    st.lists(st.floats(-0.01, 0.01), min_size=4, max_size=20),
    st.floats(1e-3, 1e6),
    st.floats(1.9, 50.0),
)
def test_gradient_ratio_stops_at_a_surge_after_noise(noise: list[float], level: float, surge: float) -> None:
    values = [level * (1 + share) for share in noise] + [level * surge]
    stop = replay(GradientRatio(), by_l_x(values))
    assert stop is not None
    assert stop.keep == len(noise) - 1


def test_gradient_ratio_ignores_l_x_that_falls_and_settles() -> None:
    # An l_X sequence as early epochs have it: high at first, then near its level.
    assert replay(GradientRatio(), by_l_x([5824.0, 2829.0, 2977.0, 2693.0, 2784.0, 2880.0, 2968.0, 3028.0])) is None


# ------------------------------------------------------------------------------------------------ the robustness drop


def test_robustness_drop_stops_at_a_drop_over_20_points() -> None:
    stop = replay(RobustnessDrop(), by_robustness([0.30, 0.40, 0.45, 0.24]))
    assert stop is not None
    assert stop.keep == 3
    assert stop.reason == "PGD-5 accuracy fell from 45.0% to 24.0% in epoch 4"


def test_robustness_drop_ignores_a_slow_decay() -> None:
    assert replay(RobustnessDrop(), by_robustness([0.6, 0.45, 0.3, 0.15, 0.0])) is None
    assert replay(RobustnessDrop(), by_robustness([0.75, 0.5625])) is None


def test_robustness_drop_never_stops_in_the_first_epoch() -> None:
    assert replay(RobustnessDrop(), by_robustness([0.0, 0.9])) is None


def test_robustness_drop_uses_its_drop() -> None:
    assert replay(RobustnessDrop(0.5), by_robustness([0.75, 0.28125])) is None
    stop = replay(RobustnessDrop(0.125, steps=7), by_robustness([0.75, 0.5]))
    assert stop is not None
    assert stop.reason.startswith("PGD-7 accuracy fell from 75.0% to 50.0%")


def test_robustness_drop_needs_stop_robust_acc() -> None:
    assert RobustnessDrop().validation_steps == 5
    assert RobustnessDrop(steps=7).validation_steps == 7
    assert GradientRatio().validation_steps == 0
    with pytest.raises(DeatError, match="epoch 3 has no stop_robust_acc, which RobustnessDrop needs"):
        RobustnessDrop().update(EpochStats(epoch=3))


def test_lookback_covers_the_epoch_to_keep() -> None:
    # The epoch before the last, and the epoch m before it.
    assert RobustnessDrop().lookback == 2
    assert [GradientRatio(m=m).lookback for m in (1, 2, 5)] == [2, 3, 6]


# ------------------------------------------------------------------------------------------------ state and refusals

SCRIPTS: list[tuple[Callable[[], StoppingRule], list[dict[str, Any]], int]] = [
    (GradientRatio, by_l_x([*FALLING, 90.0, 92.0, 300.0]), 8),
    (lambda: GradientRatio(m=3, gamma=2.0), by_l_x([*FALLING, 90.0, 92.0, 300.0]), 7),
    (RobustnessDrop, by_robustness([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.35, 0.3, 0.3, 0.05]), 9),
]


@pytest.mark.parametrize(("make", "script", "kept"), SCRIPTS)
@pytest.mark.parametrize("cut", range(10))
def test_stopping_rules_resume_from_state_dict(
    make: Callable[[], StoppingRule], script: list[dict[str, Any]], kept: int, cut: int
) -> None:
    whole = replay(make(), script)
    assert whole is not None
    assert whole.keep == kept
    first, second = make(), make()
    assert replay(first, script[:cut]) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert replay(second, script[cut:]) == whole


def test_stopping_rule_base_never_stops() -> None:
    rule = StoppingRule()
    assert rule.update(EpochStats(epoch=1, l_x=math.inf)) is None
    rule.load_state_dict(rule.state_dict())


REFUSALS: list[tuple[Callable[[], StoppingRule], str]] = [
    (lambda: RobustnessDrop(20), r"^drop = 20 is outside \(0, 1\); give 0.2 for 20 percentage points"),
    (lambda: RobustnessDrop(0.2, steps=0), r"^steps = 0 is below 1"),
    (lambda: GradientRatio(m=0), r"^m = 0 is below 1 epoch; Algorithm 5 uses m = 2"),
    (lambda: GradientRatio(gamma=-1), r"^gamma = -1 is not a positive number"),
    (lambda: GradientRatio(gamma=math.nan), r"^gamma = nan is not"),
    (lambda: GradientRatio(guard=5), r"^guard = 5 is outside \[0, 1\)"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_constructor_refuses_invalid_settings(make: Callable[[], StoppingRule], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        make()
