"""Draw docs/lab/recipes.png from the table of docs/lab/recipes.md: python docs/lab/recipes.py."""

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import binomtest

from deat_rb.leaderboard.pages.charts import pareto_front

FOLDER = Path(__file__).parent
N_TEST = 2000


class Row(NamedTuple):
    """A row of the table."""

    name: str
    weights: str
    robust: dict[str, float]
    passes: float

    @property
    def guided(self) -> bool:
        """Whether the method follows the gradient magnitude."""
        return self.name.startswith("m-") or self.name.startswith("m+")


def rows() -> list[Row]:
    """Return the rows of the table, with accuracies in percent."""
    text = (FOLDER / "recipes.md").read_text(encoding="utf-8")
    table, name, passes = [], "", 0.0
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) != 8 or cells[1] not in ("raw", "averaged"):
            continue
        name = cells[0] or name
        passes = float(cells[7].replace(",", "")) if cells[7] else passes
        table.append(Row(name, cells[1], {"PGD-100": float(cells[4]), "CW-20": float(cells[5])}, passes))
    return table


def main() -> None:
    """Write the picture."""
    table = rows()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    for axes, attack in zip(panels, ("PGD-100", "CW-20"), strict=True):
        averaged = [row for row in table if row.weights == "averaged"]
        for row in table:
            accuracy, color = row.robust[attack], "C3" if row.guided else "0.35"
            if row.weights == "raw":
                axes.plot(row.passes, accuracy, "o", mfc="none", mec=color, ms=5)
                continue
            interval = binomtest(round(accuracy * N_TEST / 100), N_TEST).proportion_ci(method="wilson")
            errors = [[accuracy - 100 * interval.low], [100 * interval.high - accuracy]]
            axes.errorbar(row.passes, accuracy, errors, fmt="o", color=color, capsize=2, elinewidth=0.6, ms=5)
            number = str(1 + averaged.index(row))
            left = row.passes == min(each.passes for each in averaged)
            axes.annotate(number, (row.passes, accuracy), (-6 if left else 5, 4), textcoords="offset points",
                          ha="right" if left else "left", fontsize=9, color=color)  # fmt: skip
        points = [(row.passes, row.robust[attack]) for row in averaged]
        line = [points[index] for index in pareto_front(points)]
        line.append((max(row.passes for row in table) * 1.02, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", color="C0", lw=1, zorder=0, label="Pareto front, averaged")
        axes.set(xlabel="backward passes over the training images", ylabel=f"{attack} accuracy, %")
        axes.grid(alpha=0.3)
    handles = [plt.Line2D([], [], ls="", label=f"{1 + number}  {row.name}") for number, row in enumerate(averaged)]
    handles += [plt.Line2D([], [], marker="o", ls="", color="0.35", label="averaged weights"),
                plt.Line2D([], [], marker="o", ls="", mfc="none", mec="0.35", label="raw weights"),
                plt.Line2D([], [], marker="o", ls="", color="C3", label="guided by the gradient magnitude"),
                plt.Line2D([], [], color="C0", lw=1, label="Pareto front, averaged")]  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", fontsize=8, handlelength=1.2)
    figure.suptitle("WRN-10-1, 20,000 CIFAR-10 (JPEG) images, eps 8/255, one seed, 2,000 test images", fontsize=11)
    figure.savefig(FOLDER / "recipes.png", dpi=130)


if __name__ == "__main__":
    main()
