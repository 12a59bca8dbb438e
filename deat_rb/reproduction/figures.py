"""Figures 2 to 8 of the paper, from the metrics of runs."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from deat_rb.evaluation.plots import BLUE, COLOURS, GREY, MARKERS, ORANGE
from deat_rb.evaluation.statistics import mean_and_deviation
from deat_rb.reproduction.experiments import FigureKind
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.text import replace_invisible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """The data of a run that a figure shows.

    Attributes:
        seed: The random seed.
        rows: Metrics of its epochs.
        test: PGD-20 accuracy on test images by epoch, in [0, 1]; empty without ``curve_test``.
        batches: Mini-batches per epoch.
        pgd20: PGD-20 accuracy of the final weights in percent, if evaluated.
        alpha: Step size in units of the paper's, such as ``10/255``.
        gamma: Factor gamma.
    """

    seed: int
    rows: Sequence[EpochStats]
    test: Mapping[int, float]
    batches: int
    pgd20: float | None = None
    alpha: str = ""
    gamma: float | None = None


Curve = Callable[[Drawn], list[tuple[float, float]]]


def draw(
    kind: FigureKind,
    title: str,
    runs: Mapping[str, Sequence[Drawn]],
    panels: Sequence[Sequence[str]],
    footer: str = "",
) -> dict[str, bytes]:
    """Draw a figure.

    Args:
        kind: Kind of the figure.
        title: Title.
        runs: Runs with at least one epoch, by label.
        panels: Labels of each panel; by default one panel with all.
        footer: Sentence below the figure, before the one that says what means and deviations are of.

    Returns:
        The picture by format: ``png`` and ``pdf``.
    """
    from matplotlib.figure import Figure

    chosen = [[label for label in panel if label in runs] for panel in panels or [list(runs)]]
    columns = min(len(chosen), 3) if len(chosen) != 4 else 2
    height = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), 0.5 + 3.7 * height), layout="constrained")
    figure.suptitle(replace_invisible(title), parse_math=False, fontsize="medium")
    if footer := f"{footer} {_seeds_caption(kind, runs)}".strip():
        lines = textwrap.fill(replace_invisible(footer), int(18 * figure.get_figwidth()))
        figure.supxlabel(lines, parse_math=False, fontsize="x-small", color=GREY)
    grid = figure.subplots(height, columns, squeeze=False)
    every = [axes for line in grid for axes in line]
    for axes in every[len(chosen) :]:
        axes.set_visible(False)
    for axes, labels in zip(every, chosen, strict=False):
        if kind == "collapse":
            _collapse(axes, runs)
        elif kind == "trade-off":
            _trade_off(axes, runs)
        else:
            _curves(axes, kind, {label: runs[label] for label in labels})
    return _saved(figure)


def _seeds_caption(kind: FigureKind, runs: Mapping[str, Sequence[Drawn]]) -> str:
    """Return what means and deviations are of; empty if every run is drawn by itself."""
    counts = {len(members) for members in (_evaluated(runs) if kind == "trade-off" else [*runs.values()])}
    if kind == "collapse" or max(counts, default=1) == 1:
        return ""
    seeds = f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"{max(counts)} seeds"
    where = "" if kind == "trade-off" else ", over the epochs that all seeds of a curve have"
    return f"Mean and one standard deviation of {seeds}{where}."


def _saved(figure: Figure) -> dict[str, bytes]:
    pictures = {}
    for form, options in (("png", {"dpi": 130}), ("pdf", {"metadata": {"CreationDate": None}})):
        picture = io.BytesIO()
        figure.savefig(picture, format=form, **options)
        pictures[form] = picture.getvalue()
    return pictures


def _minutes(run: Drawn) -> list[float]:
    total, minutes = 0.0, []
    for row in run.rows:
        total += row.seconds / 60
        minutes.append(total)
    return minutes


CURVES: dict[str, tuple[str, str, Curve]] = {
    "accuracy": ("epoch", "PGD-20 accuracy, %", lambda run: [
        (row.epoch, 100 * row.val_robust_acc) for row in run.rows if row.val_robust_acc is not None]),
    "l_x": ("epoch", "l_X", lambda run: [(row.epoch, row.l_x) for row in run.rows]),
    "passes": ("epoch", "backward passes per batch", lambda run: [
        (row.epoch, row.backwards / run.batches) for row in run.rows]),
    "robustness": ("minutes of training", "PGD-20 accuracy on test images, %", lambda run: [
        (minutes, 100 * run.test[row.epoch]) for minutes, row in zip(_minutes(run), run.rows, strict=True)
        if row.epoch in run.test]),
    "loss": ("epoch", "training loss", lambda run: [(row.epoch, row.loss) for row in run.rows]),
}  # fmt: skip
"""Axis labels and points of each kind of curve."""


def _curves(axes: Axes, kind: str, runs: Mapping[str, Sequence[Drawn]]) -> None:
    """Draw the mean over seeds of each row, with a band of one standard deviation."""
    x_label, y_label, curve = CURVES[kind]
    for number, (label, members) in enumerate(runs.items()):
        color = COLOURS[number % len(COLOURS)]
        points = _mean_curve([curve(run) for run in members])
        if not points:
            continue
        x, y, spread = zip(*points, strict=True)
        axes.plot(x, y, label=label, color=color, marker=MARKERS[number % len(MARKERS)], markersize=3, linewidth=1.4)
        if any(spread):
            low, high = ([value + sign * width for value, width in zip(y, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if kind == "accuracy":
            natural = _mean_curve([[(row.epoch, 100 * row.val_acc) for row in run.rows if row.val_acc is not None]
                                   for run in members])  # fmt: skip
            axes.plot([each[0] for each in natural], [each[1] for each in natural], color=color, linestyle=":",
                      label=f"{label}, natural")  # fmt: skip
    if kind == "l_x":
        axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel="accuracy, %" if kind == "accuracy" else y_label)
    if x_label == "epoch":
        _whole_epochs(axes)
    _finish(axes)


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float, float]]:
    """Return mean x, mean y and the deviation of y of each epoch that all curves have."""
    points = []
    for step in zip(*curves, strict=False):
        mean, deviation = mean_and_deviation([each[1] for each in step])
        points.append((fmean(each[0] for each in step), mean, deviation or 0.0))
    return points


def _collapse(axes: Axes, runs: Mapping[str, Sequence[Drawn]]) -> None:
    """Draw l_X and PGD-20 accuracy of each run."""
    right = axes.twinx()
    for number, run in enumerate(each for members in runs.values() for each in members):
        style = ("-", "--", ":", "-.")[number % 4]
        epochs = [row.epoch for row in run.rows]
        axes.plot(epochs, [row.l_x for row in run.rows], color=BLUE, linestyle=style, label=f"l_X, seed {run.seed}")
        robust = [(row.epoch, 100 * row.val_robust_acc) for row in run.rows if row.val_robust_acc is not None]
        right.plot([each[0] for each in robust], [each[1] for each in robust], color=ORANGE, linestyle=style,
                   label=f"PGD-20, seed {run.seed}")  # fmt: skip
    axes.set(xlabel="epoch", ylabel="l_X")
    right.set(ylabel="PGD-20 accuracy, %", ylim=(0, None))
    axes.yaxis.label.set_color(BLUE)
    right.yaxis.label.set_color(ORANGE)
    axes.grid(alpha=0.25)
    _whole_epochs(axes)
    handles, names = axes.get_legend_handles_labels()
    others, more = right.get_legend_handles_labels()
    axes.legend(
        handles + others, names + more, fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
    )


def _trade_off(axes: Axes, runs: Mapping[str, Sequence[Drawn]]) -> None:
    """Draw backward passes against PGD-20 error: one point per step size and gamma, with deviations over seeds."""
    rows = _evaluated(runs)
    gammas = list(dict.fromkeys(members[0].gamma for members in rows))
    for number, gamma in enumerate(gammas):
        points = []
        for members in (each for each in rows if each[0].gamma == gamma):
            passes, dx = mean_and_deviation([sum(row.backwards for row in run.rows) for run in members])
            error, dy = mean_and_deviation([100 - run.pgd20 for run in members if run.pgd20 is not None])
            points.append((passes, error, dx or 0.0, dy or 0.0, members[0].alpha))
        x, y, x_deviations, y_deviations, alphas = zip(*points, strict=True)
        color, marker = (BLUE, ORANGE, GREY)[number % 3], MARKERS[number % len(MARKERS)]
        axes.errorbar(x, y, xerr=x_deviations, yerr=y_deviations, fmt=marker, color=color, label=f"gamma {gamma:g}",
                      capsize=2, markersize=5, linewidth=1)  # fmt: skip
        for place, other, alpha in zip(x, y, alphas, strict=True):
            axes.annotate(alpha, (place, other), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set(xlabel="backward passes", ylabel="PGD-20 error, %")
    _finish(axes)


def _evaluated(runs: Mapping[str, Sequence[Drawn]]) -> list[Sequence[Drawn]]:
    """Return the rows whose runs all have a PGD-20 accuracy."""
    return [members for members in runs.values() if all(run.pgd20 is not None for run in members)]


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
