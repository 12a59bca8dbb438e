"""Pictures of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deat_rb.files import atomic_write
from deat_rb.rendering import visible
from deat_rb.stats import EpochStats
from deat_rb.threat import format_fraction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deat_rb.evaluation.report import Report

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#2e8b57", "#8a8f98"
COLOURS = ("#7a4fa3", ORANGE, BLUE, GREEN, "#b8405e", "#5f6b2d", "#1b9aaa", "#8c5a3c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_curves(rows: Sequence[EpochStats], path: Path, *, title: str) -> None:
    """Draws a run's curves: accuracy, loss, l_X with the steps, and the passes spent.

    Args:
        rows: The run's epochs.
        path: The PNG to write, atomically.
        title: Above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row.epoch for row in rows]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle(visible(title), parse_math=False)
    ((accuracy, loss), (magnitude, cost)) = figure.subplots(2, 2)

    _line(accuracy, epochs, [row.val_acc for row in rows], "validation, natural", BLUE)
    _line(accuracy, epochs, [row.val_robust_acc for row in rows], "validation, PGD-20", ORANGE)
    _line(accuracy, epochs, [row.train_acc for row in rows], "training, as trained on", GREY)
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(fontsize="small")

    _line(loss, epochs, [row.loss for row in rows], "surrogate loss", BLUE)
    loss.set(ylabel="surrogate loss")
    rate = loss.twinx()
    _line(rate, epochs, [row.lr for row in rows], "learning rate", GREY, marker="")
    rate.set(ylabel="learning rate at the epoch's end", ylim=(0, None))

    _line(magnitude, epochs, [row.l_x for row in rows], "l_X", GREEN)
    magnitude.set(ylabel="gradient magnitude l_X")
    steps = magnitude.twinx()
    steps.step(epochs, [row.steps for row in rows], where="mid", color=ORANGE, alpha=0.8)
    steps.set(ylabel="steps r", ylim=(0, max(row.steps for row in rows) + 1))
    steps.yaxis.label.set_color(ORANGE)
    steps.yaxis.set_major_locator(MaxNLocator(integer=True))

    total, spent = 0.0, []
    for row in rows:
        total += row.backwards
        spent.append(total)
    _line(cost, epochs, spent, "backward passes", BLUE)
    cost.set(ylabel="backward passes so far (mini-batches)", ylim=(0, None))

    for axes in (accuracy, loss, magnitude, cost):
        axes.set(xlabel="epoch", xlim=(0.5, len(rows) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write(path, picture.getvalue())


def draw_sweep(report: Report, *, title: str) -> bytes:
    """Draws accuracy against eps: a line for each attack and the worst case, and the report's own radius.

    Args:
        report: Of a sweep.
        title: Above the picture.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    points = report.curve
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    in_255ths = all("/" in format_fraction(point.eps) or point.eps == 0 for point in points)
    scale = 255 if in_255ths else 1
    radii = [scale * point.eps for point in points]
    for number, name in enumerate(points[0].accuracy):
        color, line = (GREY, ":") if name == "natural" else (COLOURS[number % len(COLOURS)], "-")
        shares, marker = [point.accuracy[name] for point in points], MARKERS[number % len(MARKERS)]
        axes.plot(radii, shares, label=name, marker=marker, markersize=5, color=color, linestyle=line)
    worst = [point.worst_case for point in points]
    axes.plot(radii, worst, label="worst case", color="black", linewidth=2.5, zorder=0, alpha=0.35)
    axes.axvline(scale * report.eps, color=GREY, linewidth=1, linestyle="--")
    far_right = scale * report.eps > max(radii) / 2
    axes.annotate(f"eps {format_fraction(report.eps)}", (scale * report.eps, 0), xytext=(-4 if far_right else 4, 5),
                  ha="right" if far_right else "left", textcoords="offset points", color=GREY,
                  fontsize="small")  # fmt: skip
    unit = "255ths of the image range" if in_255ths else "in units of the image range"
    axes.set(xlabel=f"eps ({report.norm}, {unit})", ylabel=f"accuracy on {report.n_examples} images", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.set_title(visible(title) + (" (upper bounds)" if report.precision != "fp32" else ""), parse_math=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    for text in axes.legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _line(
    axes: Axes, epochs: list[int], values: Sequence[float | None], label: str, color: str, marker: str = "."
) -> None:
    shown = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), label=label, color=color, marker=marker)
