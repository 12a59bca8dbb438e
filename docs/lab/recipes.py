"""Draw docs/lab/recipes.png and recipes-all.png from the tables of docs/lab/recipes.md: python docs/lab/recipes.py."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import binomtest

from deat_rb.leaderboard.pages.charts import pareto_front

FOLDER = Path(__file__).parent


class Row(NamedTuple):
    """A row of a table, with accuracies in percent by the column's name."""

    name: str
    weights: str
    accuracy: dict[str, float]
    passes: float

    @property
    def color(self) -> str:
        """The color of methods that follow the gradient magnitude, or of the others."""
        return "C3" if self.name.startswith(("m-", "m+")) else "0.35"


def tables() -> tuple[list[Row], list[Row]]:
    """Return the rows on 20,000 images, of which those of raw weights name no method again, and those on all images."""
    text = (FOLDER / "recipes.md").read_text(encoding="utf-8")
    found: dict[int, list[Row]] = {8: [], 9: []}
    columns = {8: {"natural": 2, "PGD-100": 4, "CW-20": 5}, 9: {"natural": 1, "PGD-100": 3, "CW-20": 4}}
    name, passes = "", 0.0
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        parts, weights = (8, cells[1]) if cells[1] in ("raw", "averaged") else (len(cells) + 1, "averaged")
        if parts not in found or not re.fullmatch(r"[\d.]+", cells[columns[parts]["natural"]]):
            continue
        number = cells[7 if parts == 8 else 6]
        name, passes = cells[0] or name, float(number) if number else passes
        accuracy = {column: float(cells[place]) for column, place in columns[parts].items()}
        found[parts].append(Row(name.split(" (")[0], weights, accuracy, passes))
    return found[8], found[9]


def draw_point(axes: Any, row: Row, attack: str, x: float, number: int, n_test: int, *, left: bool = False) -> None:
    """Draw a row's robust accuracy with its 95 % interval, and its number."""
    accuracy = row.accuracy[attack]
    interval = binomtest(round(accuracy * n_test / 100), n_test).proportion_ci(method="wilson")
    errors = [[accuracy - 100 * interval.low], [100 * interval.high - accuracy]]
    axes.errorbar(x, accuracy, errors, fmt="o", color=row.color, capsize=2, elinewidth=0.6, ms=5)
    axes.annotate(str(number), (x, accuracy), (-6 if left else 5, 4), textcoords="offset points",
                  ha="right" if left else "left", fontsize=9, color=row.color)  # fmt: skip


def draw_cost(axes: Any, rows: Sequence[Row], attack: str, n_test: int) -> None:
    """Draw robust accuracy against passes, with the front of the averaged weights; raw weights have empty circles."""
    averaged = [row for row in rows if row.weights == "averaged"]
    for row in rows:
        if row.weights == "raw":
            axes.plot(row.passes, row.accuracy[attack], "o", mfc="none", mec=row.color, ms=5)
    for number, row in enumerate(averaged, 1):
        left = row.passes == min(each.passes for each in averaged)
        draw_point(axes, row, attack, row.passes, number, n_test, left=left)
    points = [(row.passes, row.accuracy[attack]) for row in averaged]
    line = [points[index] for index in pareto_front(points)]
    line.append((max(row.passes for row in rows) * 1.02, line[-1][1]))
    axes.step(*zip(*line, strict=True), where="post", color="C0", lw=1, zorder=0)
    axes.set(xlabel="backward passes over the training images", ylabel=f"{attack} accuracy, %")


def save(figure: Any, rows: Sequence[Row], title: str, file: str) -> None:
    """Add the legend and the title, and write the picture."""
    averaged = [row.name for row in rows if row.weights == "averaged"]
    handles = [plt.Line2D([], [], ls="", label=f"{number}  {name}") for number, name in enumerate(averaged, 1)]
    handles.append(plt.Line2D([], [], marker="o", ls="", color="0.35", label="averaged weights"))
    if len(averaged) < len(rows):
        handles.append(plt.Line2D([], [], marker="o", ls="", mfc="none", mec="0.35", label="raw weights"))
    handles += [plt.Line2D([], [], marker="o", ls="", color="C3", label="guided by the gradient magnitude"),
                plt.Line2D([], [], color="C0", lw=1, label="Pareto front, averaged")]  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", fontsize=8, handlelength=1.2)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(FOLDER / file, dpi=130)


def main() -> None:
    """Write the pictures."""
    part, everything = tables()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    for axes, attack in zip(panels, ("PGD-100", "CW-20"), strict=True):
        draw_cost(axes, part, attack, 2000)
    save(figure, part, "WRN-10-1, 20,000 CIFAR-10 (JPEG) images, eps 8/255, one seed, 2,000 test images", "recipes.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    draw_cost(left, everything, "CW-20", 10000)
    for number, row in enumerate(everything, 1):
        draw_point(right, row, "CW-20", row.accuracy["natural"], number, 10000)
    right.set(xlabel="natural accuracy, %")
    title = "WRN-10-1, 49,000 CIFAR-10 (JPEG) images, eps 8/255, one seed, 10,000 test images"
    save(figure, everything, title, "recipes-all.png")


if __name__ == "__main__":
    main()
