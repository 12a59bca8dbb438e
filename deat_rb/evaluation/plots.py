"""Plot of an eps sweep."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from deat_rb.utils.text import counted, replace_invisible
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from deat_rb.evaluation.report import Report


BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#2e8b57", "#8a8f98"
COLOURS = ("#7a4fa3", ORANGE, BLUE, GREEN, "#b8405e", "#5f6b2d", "#1b9aaa", "#8c5a3c")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw_sweep(report: Report, *, title: str) -> bytes:
    """Plot accuracy against eps: one line per attack and one for the worst case; the main radius is marked.

    Args:
        report: Report of a sweep.
        title: Title of the plot.

    Returns:
        The plot, as a PNG.
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
    unit = "in 1/255 of the image range" if in_255ths else "in units of the image range"
    images = counted(report.n_examples, "image", "")
    axes.set(xlabel=f"eps ({report.norm}, {unit})", ylabel=f"accuracy on {images}", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.set_title(
        replace_invisible(title) + (" (upper bounds)" if report.precision != "fp32" else ""), parse_math=False
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    for text in axes.legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # names may contain dollars
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
