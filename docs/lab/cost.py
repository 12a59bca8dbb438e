"""Draw docs/lab/cost.png from the tables of docs/lab/results.md: python docs/lab/cost.py."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import binomtest

FOLDER = Path(__file__).parent
TITLE = "## CIFAR-10 (JPEG), 49,000 training images, WRN-10-1: as in Table 1"
N_TEST = 10_000
GUIDED = {"m-deat": "C3", "deat-3": "C0", "deat-25%": "C0"}


def rows(section: str) -> dict[str, list[str]]:
    """Return the cells of each row of the section's tables by the row's first cell."""
    lines = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def main() -> None:
    """Write the picture."""
    text = (FOLDER / "results.md").read_text(encoding="utf-8")
    table = rows(text.partition(TITLE)[2].partition("\n## ")[0])
    figure, (cost, steps) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(3, 2), constrained_layout=True)
    for name in ("deat-3", "deat-25%", "m-deat", "free-4", "free-8", "pgd-7", "u-fgsm"):
        accuracy, passes = float(table[name][2]), float(table[name][5].replace(",", ""))
        interval = binomtest(round(accuracy * N_TEST / 100), N_TEST).proportion_ci(method="wilson")
        errors = [[accuracy - 100 * interval.low], [100 * interval.high - accuracy]]
        color = GUIDED.get(name, "0.45")
        cost.errorbar(passes / 1000, accuracy, errors, fmt="o", color=color, capsize=3)
        left = name in ("free-8", "deat-3", "u-fgsm")
        cost.annotate(name, (passes / 1000, accuracy), (-6 if left else 6, 4), textcoords="offset points",
                      ha="right" if left else "left", color=color, fontsize=9)  # fmt: skip
    cost.set(xlabel="backward passes of training, thousands", ylabel="PGD-100 accuracy, %", xlim=(5, 36))
    cost.set_title("robustness and cost", fontsize=10)
    measured = zip(table["m-deat: r"], table["m-deat: l_X"], strict=True)
    values = [(int(r), float(l_x.replace(",", ""))) for r, l_x in measured if r]
    epochs = range(1, len(values) + 1)
    steps.step(epochs, [r for r, _ in values], where="mid", color="C3")
    steps.set(xlabel="epoch", ylim=(0, 5), yticks=range(6))
    steps.set_ylabel("replays r", color="C3")
    magnitude = steps.twinx()
    magnitude.plot(epochs, [l_x / 1000 for _, l_x in values], "o-", ms=3, color="0.45")
    magnitude.set_ylabel("gradient magnitude l_X, millions", color="0.35")
    steps.set_title("m-deat: steps follow the gradient magnitude", fontsize=10)
    for axes in (cost, steps):
        axes.grid(alpha=0.3)
    figure.suptitle("WRN-10-1, 49,000 CIFAR-10 (JPEG) images, fast setting, eps 8/255, one seed", fontsize=11)
    figure.savefig(FOLDER / "cost.png", dpi=130)


if __name__ == "__main__":
    main()
