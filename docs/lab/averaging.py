"""Draw docs/lab/averaging.png from two runs: python docs/lab/averaging.py CYCLIC CONSTANT."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


def main(cyclic: str, constant: str) -> None:
    """Draw the validation accuracies of a run with a cyclic and of one with a constant learning rate."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle("M-DEAT, WRN-10-1, 20,000 CIFAR-10 (JPEG) images, seed 0", fontsize="medium")
    both = figure.subplots(1, 2, sharey=True)
    for axes, run, title in zip(both, (cyclic, constant), ("cyclic", "constant"), strict=True):
        lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        epochs = [row["epoch"] for row in rows]
        for prefix, color, weights in (("", "C0", "averaged"), ("raw_", "C1", "raw")):
            for name, style, attack in (("val_robust_acc", "-", "PGD-20"), ("val_acc", ":", "natural")):
                values = [100 * row[prefix + name] for row in rows]
                axes.plot(epochs, values, style, color=color, marker="o", markersize=3,
                          label=f"{attack}, {weights} weights")  # fmt: skip
        axes.set_title(f"{title} learning rate, {len(rows)} epochs", fontsize="small")
        axes.set(xlabel="epoch", ylim=(0, 60))
        axes.grid(alpha=0.3)
    both[0].set_ylabel("validation accuracy, %")
    handles, labels = both[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(FOLDER / "averaging.png", dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
