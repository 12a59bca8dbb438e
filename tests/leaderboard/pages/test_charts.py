"""Layout of the board's charts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.leaderboard.pages.charts import Point, curves, pareto_front, scatter


def test_pareto_front_by_hand() -> None:
    points = [(100.0, 40.0), (200.0, 50.0), (150.0, 35.0), (200.0, 45.0), (400.0, 50.0), (500.0, 51.0), (200.0, 50.0)]
    # 150 costs more than 100 and is worse; (200, 45) and (400, 50) are no better than (200, 50), which occurs twice.
    assert pareto_front(points) == [0, 1, 6, 5]
    assert pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=9))
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_scatter_is_logarithmic_in_cost() -> None:
    picture = scatter([Point(cost, accuracy, "m", "t", "p") for cost, accuracy in ((10, 20), (100, 70), (1000, 45))])
    assert picture is not None
    (x1, y1), (x2, y2), (x3, y3) = [(dot["x"], dot["y"]) for dot in picture["dots"]]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y1 - y3), abs=0.2), "45 lies halfway between 20 and 70, and up is less"
    assert [dot["front"] for dot in picture["dots"]] == [True, True, False]
    assert picture["front"] == [(x1, y1), (x2, y1), (x2, y2)]
    assert [tick["text"] for tick in picture["x_ticks"]] == ["10", "100", "1k"]


def test_scatter_labels_do_not_overlap() -> None:
    picture = scatter([Point(100 + number, 50.0 + number % 2, "a-long-method", "t", "p") for number in range(12)])
    assert picture is not None
    labels = [dot["label"] for dot in picture["dots"] if dot["label"]]
    assert 1 <= len(labels) < 12
    assert len({(label["x"], label["y"]) for label in labels}) == len(labels)


def test_scatter_names_all_overlapping_points() -> None:
    points = [(100, 50, "pgd-7"), (100, 50, "free-8"), (100.2, 50.05, "free-8"), (9000, 20, "m-deat")]
    picture = scatter([Point(cost, accuracy, label, "t", "p") for cost, accuracy, label in points])
    assert picture is not None
    assert [label["text"] for label in (dot["label"] for dot in picture["dots"]) if label] == [
        "pgd-7, free-8",
        "m-deat",
    ]


def test_curves_are_at_the_metrics_values() -> None:
    rows: list[dict[str, int | float | None]] = [
        {"epoch": 1, "steps": 1, "l_x": 10.0, "val_acc": 0.0, "train_acc": 0.25},
        {"epoch": 2, "steps": 1, "l_x": 5.0, "val_acc": 0.5, "train_acc": None},
        {"epoch": 3, "steps": 3, "l_x": 0.0, "val_acc": 1.0, "train_acc": 0.75},
    ]
    accuracy, magnitude = curves(rows)
    # The chart's area is 46 to 454 and 252 up to 12.
    assert accuracy["lines"][0]["points"] == [(46.0, 252.0), (250.0, 132.0), (454.0, 12.0)]
    assert accuracy["lines"][1]["points"] == [(46.0, 192.0), (454.0, 72.0)]
    # 1, 1 and 3 on an axis up to 4: the step is at the third epoch.
    assert magnitude["lines"][1]["points"] == [
        (46.0, 192.0),
        (250.0, 192.0),
        (250.0, 192.0),
        (454.0, 192.0),
        (454.0, 72.0),
    ]
    assert magnitude["lines"][0]["points"][2] == (454.0, 252.0)


NUMBERS = st.one_of(st.none(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
ROWS = st.dictionaries(st.sampled_from(["epoch", "steps", "l_x", "val_acc", "train_acc", "val_robust_acc"]), NUMBERS)


@given(st.lists(ROWS, max_size=4))
def test_curves_accept_any_numbers(rows: list[dict[str, int | float | None]]) -> None:
    for picture in curves(rows):
        assert len(picture["x_ticks"]) <= 12
        assert len(picture["y_ticks"]) <= 12
        assert len(picture["right_ticks"]) <= 12
