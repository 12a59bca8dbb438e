"""Layout of the board's charts; the templates draw them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

WIDTH, HEIGHT = 480, 300

LEFT, RIGHT, TOP, BOTTOM = 46, 468, 12, 252

MAX_TICKS, MAX_EPOCHS = 6, 10**6

SMALLEST, LARGEST = 1e-100, 1e100
"""Range of values for which an axis can be drawn."""

LABEL_HEIGHT, CHARACTER = 15, 8.6
"""Height of a label and width of a character in chart units, slightly above the style sheet's largest font."""

OVERLAP = 9.0
"""Distance below which two dots overlap."""


@dataclass(frozen=True)
class Point:
    """A model in the scatter plot.

    Attributes:
        cost: Number of backward passes, greater than 0.
        accuracy: Robust accuracy in percent.
        label: Text next to the dot, if there is room.
        text: Description in the tooltip.
        href: Link to the model's page.
    """

    cost: float
    accuracy: float
    label: str
    text: str
    href: str | None = None


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the Pareto front: points that no other point dominates in cost and accuracy.

    Args:
        points: Cost and accuracy of each.

    Returns:
        Indices of the points, cheapest first, including all duplicates.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda each: (points[each][0], -points[each][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def scatter(points: Sequence[Point]) -> dict[str, Any] | None:
    """Lay out models by cost (logarithmic) and accuracy, with the Pareto front as steps.

    Returns:
        Ticks, front and dots for the template; None without points.
    """
    if not points:
        return None
    costs, accuracies = [point.cost for point in points], [point.accuracy for point in points]
    low_x, high_x = min(costs) / 1.3, max(costs) * 1.3
    low_y, high_y = _padded(min(accuracies), max(accuracies))

    def across(cost: float) -> float:
        return _between(LEFT, RIGHT, math.log(cost / low_x) / math.log(high_x / low_x))

    def up(accuracy: float) -> float:
        return _between(BOTTOM, TOP, (accuracy - low_y) / (high_y - low_y))

    front = pareto_front(list(zip(costs, accuracies, strict=True)))
    places = [(across(point.cost), up(point.accuracy)) for point in points]
    steps = _steps([places[index] for index in front])
    labels = _labels(places, [point.label for point in points], first=front, line=steps)
    return {
        "x_ticks": [{"at": across(tick), "text": _short(tick)} for tick in _log_ticks(low_x, high_x)],
        "y_ticks": [{"at": up(tick), "text": f"{tick:g}"} for tick in _ticks(low_y, high_y)],
        "front": steps,
        "dots": [
            {"x": x, "y": y, "front": index in front, "point": point, "label": label}
            for index, ((x, y), point, label) in enumerate(zip(places, points, labels, strict=True))
        ],
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay out a run's curves: accuracies, and l_X with the attack steps.

    Args:
        rows: Metrics by epoch, as in ``metrics.jsonl``.

    Returns:
        The non-empty charts for the template.
    """
    rows = [row for row in rows if 1 <= (row.get("epoch") or 0) <= MAX_EPOCHS]
    last = max((int(row["epoch"]) for row in rows), default=0)
    pictures = [_accuracy_curves(rows, last), _magnitude_curves(rows, last)]
    return [picture for picture in pictures if picture is not None]


def _accuracy_curves(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, Any] | None:
    names = {"val_acc": "validation, natural", "val_robust_acc": "validation, PGD-20", "train_acc": "training"}
    lines = [_line(rows, last, key, name, color, 1.0) for color, (key, name) in enumerate(names.items())]
    known = [line for line in lines if line is not None]
    if not known:
        return None
    ticks = [{"at": _between(BOTTOM, TOP, share), "text": f"{100 * share:g} %"} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"title": "Accuracy", "lines": known, "y_ticks": ticks, "right_ticks": [], "x_ticks": _epoch_ticks(last)}


def _magnitude_curves(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, Any] | None:
    most_l_x, most_steps = _most(rows, "l_x"), _most(rows, "steps")
    if not SMALLEST < most_l_x < LARGEST:
        return None
    high, steps_high = 1.08 * most_l_x, most_steps + 1
    lines = [_line(rows, last, "l_x", "gradient magnitude l_X (left)", 0, high)]
    right: list[dict[str, Any]] = []
    if most_steps > 0:
        lines.append(_line(rows, last, "steps", "steps r (right)", 1, steps_high, stepped=True))
        whole = range(0, int(steps_high) + 1, max(1, math.ceil(steps_high / MAX_TICKS)))
        right = [{"at": _between(BOTTOM, TOP, tick / steps_high), "text": str(tick)} for tick in whole]
    left = [{"at": _between(BOTTOM, TOP, tick / high), "text": _short(tick)} for tick in _ticks(0, high)]
    return {
        "title": "Gradient magnitude and steps",
        "lines": [line for line in lines if line is not None],
        "y_ticks": left,
        "right_ticks": right,
        "x_ticks": _epoch_ticks(last),
    }


def _line(
    rows: Sequence[Mapping[str, Any]],
    last: int,
    key: str,
    name: str,
    color: int,
    high: float,
    *,
    stepped: bool = False,
) -> dict[str, Any] | None:
    known = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    places = [(_epoch(epoch, last), _between(BOTTOM, TOP, value / high)) for epoch, value in known]
    if not places:
        return None
    return {"name": name, "color": color, "points": _steps(places) if stepped else places,
            "dots": places if len(places) <= 60 else []}  # fmt: skip


def _most(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return max((row[key] for row in rows if row.get(key) is not None), default=0)


def _epoch(epoch: float, last: int) -> float:
    return _between(LEFT, RIGHT - 14, (epoch - 1) / max(last - 1, 1))


def _epoch_ticks(last: int) -> list[dict[str, Any]]:
    whole = [1, *(int(tick) for tick in _ticks(1, last) if tick > 1 and tick == int(tick))]
    return [{"at": _epoch(epoch, last), "text": str(epoch)} for epoch in whole]


def _between(start: float, end: float, share: float) -> float:
    return round(start + (end - start) * share, 1)


def _steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a step line through the points."""
    turned = [corner for before, place in pairwise(places) for corner in ((place[0], before[1]), place)]
    return [*places[:1], *turned]


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return a range of percentages with a margin, within 0 to 100."""
    margin = max(0.12 * (high - low), 1.0)
    return max(0.0, low - margin), min(100.0, high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Return at most `MAX_TICKS` multiples of 1, 2 or 5 times a power of ten in a range."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / MAX_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) < MAX_TICKS)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(factor * 10**power) for power in powers for factor in factors]
        if len(ticks := [tick for tick in ticks if low <= tick <= high]) >= 3:
            return ticks
    return _ticks(low, high)


def _short(number: float) -> str:
    """Format a number on an axis: 1,200, 12k, 5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 10 * size or (abs(number) >= size and number % size == 0):
            return f"{number / size:.4g}{unit}"
    return f"{number:,.4g}" if abs(number) < 1000 else f"{number:,.0f}"


def _labels(
    places: Sequence[tuple[float, float]],
    texts: Sequence[str],
    *,
    first: Sequence[int],
    line: Sequence[tuple[float, float]],
) -> list[dict[str, Any] | None]:
    """Place a label next to each dot so that it covers no dot, no other label and no part of the line.

    Dots that overlap get one label with all their texts.

    Args:
        places: Position (x, y) of each dot.
        texts: Text of each dot.
        first: Indices of the dots whose labels are placed first and so find room most easily.
        line: Corners of the line.

    Returns:
        The label of each dot for the template; None where there is no room or another dot has its label.
    """
    order = [*first, *(each for each in range(len(places)) if each not in first)]
    shared: dict[int, list[int]] = {}
    for index in order:
        near = (each for each in shared if math.dist(places[each], places[index]) < OVERLAP)
        shared.setdefault(next(near, index), []).append(index)
    taken = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    taken += [
        _Box(start[0], min(start[1], end[1]), end[0] + 0.1, max(start[1], end[1]) + 0.1)
        for start, end in pairwise(line)
    ]
    labels: list[dict[str, Any] | None] = [None] * len(places)
    for index, members in shared.items():
        text = ", ".join(dict.fromkeys(texts[member] for member in members))
        (x, y), width = places[index], CHARACTER * len(text)
        choices = (
            (x, y - 9, "middle", x - width / 2),
            (x + 8, y + 4, "start", x + 8),
            (x, y + 18, "middle", x - width / 2),
            (x - 8, y + 4, "end", x - 8 - width),
        )
        for at_x, at_y, anchor, left in choices:
            box = _Box(left, at_y - LABEL_HEIGHT + 3, left + width, at_y + 3)
            inside = box.left >= LEFT and box.right <= RIGHT + 8 and box.top >= 0 and box.bottom <= BOTTOM
            if inside and not any(box.meets(other) for number, other in enumerate(taken) if number not in members):
                labels[index] = {"x": round(at_x, 1), "y": round(at_y, 1), "anchor": anchor, "text": text}
                taken.append(box)
                break
    return labels
