"""Plots of a run's metrics."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deat_rb.training.metrics import EpochStats
from deat_rb.utils.files import atomic_write
from deat_rb.utils.text import replace_invisible

if TYPE_CHECKING:
    from matplotlib.axes import Axes


BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#2e8b57", "#8a8f98"


def plot_curves(rows: Sequence[EpochStats], path: Path, *, title: str, chosen: int | None = None) -> None:
    """Plot a run's accuracy, loss and learning rate, gradient magnitude and attack steps, and backward passes.

    Args:
        rows: Metrics of the run's epochs.
        path: The PNG file to write.
        title: The figure's title.
        chosen: Epoch whose weights are the run's result; it is marked by a vertical line.
    """
    atomic_write(path, draw_curves(rows, title=title, chosen=chosen))


def draw_curves(rows: Sequence[EpochStats], *, title: str, chosen: int | None = None) -> bytes:
    """Return the picture of `plot_curves` as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row.epoch for row in rows]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle(replace_invisible(title), parse_math=False)
    ((accuracy, loss), (magnitude, cost)) = figure.subplots(2, 2)

    _line(accuracy, epochs, [row.val_acc for row in rows], "validation, natural", BLUE)
    _line(accuracy, epochs, [row.val_robust_acc for row in rows], "validation, PGD-20", ORANGE)
    _line(accuracy, epochs, [row.raw_val_acc for row in rows], "natural, raw weights", BLUE, style=":")
    _line(accuracy, epochs, [row.raw_val_robust_acc for row in rows], "PGD-20, raw weights", ORANGE, style=":")
    _line(accuracy, epochs, [row.train_acc for row in rows], "training, as trained on", GREY)
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))

    _line(loss, epochs, [row.loss for row in rows], "surrogate loss", BLUE)
    loss.set(ylabel="surrogate loss")
    rate = loss.twinx()
    _line(rate, epochs, [row.lr for row in rows], "learning rate", GREY, marker="")
    rate.set(ylabel="learning rate at the epoch's end", ylim=(0, None))
    rate.yaxis.label.set_color(GREY)

    _line(magnitude, epochs, [row.l_x for row in rows], "gradient magnitude", GREEN)
    magnitude.set(ylabel="gradient magnitude l_X")
    magnitude.yaxis.label.set_color(GREEN)
    steps = magnitude.twinx()
    steps.step(epochs, [row.steps for row in rows], where="mid", color=ORANGE, alpha=0.8, label="attack steps")
    steps.set(ylabel="attack steps", ylim=(0, max(row.steps for row in rows) + 1))
    steps.yaxis.label.set_color(ORANGE)
    steps.yaxis.set_major_locator(MaxNLocator(integer=True))

    total, spent = 0.0, []
    for row in rows:
        total += row.backwards
        spent.append(total)
    _line(cost, epochs, spent, "backward passes", BLUE)
    cost.set(ylabel="backward passes so far", ylim=(0, None))

    for axes, second in ((accuracy, None), (loss, rate), (magnitude, steps), (cost, None)):
        axes.set(xlabel="epoch", xlim=(0.5, len(rows) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if chosen is not None:
            axes.axvline(chosen, color=GREY, linestyle="--", linewidth=1, label=f"epoch {chosen}, the result")
        _legend(axes, second, "upper center" if axes is magnitude else "best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _legend(axes: Axes, second: Axes | None, place: Literal["best", "upper center"]) -> None:
    """Draw one legend for the lines of axes and of the second y axis."""
    handles, labels = axes.get_legend_handles_labels()
    if second is not None:
        more, names = second.get_legend_handles_labels()
        handles, labels = [*handles, *more], [*labels, *names]
    top = axes if second is None else second  # drawn above the lines of both
    top.legend(handles, labels, fontsize="small", framealpha=0.8, loc=place)


def _line(
    axes: Axes,
    epochs: list[int],
    values: Sequence[float | None],
    label: str,
    color: str,
    marker: str = ".",
    style: str = "-",
) -> None:
    shown = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), label=label, color=color, marker=marker, linestyle=style)
