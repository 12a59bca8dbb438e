"""Print docs/lab/results.md's table of masked networks.

``PYTHONPATH=tests/helpers:. python tests/helpers/masked_report.py``
"""

from __future__ import annotations

import masked_models
from fresh_masks import report_of
from masked_cases import HIDING

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.utils.errors import DeatError


def row(name: str, report: Report) -> str:
    """A line of the table: accuracies in percent, and the checks that fail."""
    accuracies = (f"{100 * report.results[attack].accuracy:.1f}" for attack in ("natural", "fgsm", "pgd-20"))
    failed = (check.name for check in report.checks if check.status == "fail")
    return f"| {' | '.join((name, *accuracies, ', '.join(failed) or 'none'))} |"


def main() -> None:
    images, labels = masked_models.held_out(200)
    networks = {"plain": masked_models.plain, "PGD-3": masked_models.robust} | {
        name: network for name, (network, _) in HIDING.items()
    }
    print("| network | natural | FGSM | PGD-20 | checks that fail |\n|---|---|---|---|---|")
    for name, network in networks.items():
        try:
            report = evaluate(network().eval(), images, labels, attacks=("fgsm", "pgd-20"), eps=masked_models.EPS,
                              batch_size=200, checks="full")  # fmt: skip
            print(row(name, report), flush=True)
        except DeatError as error:
            print(f"| {name} | - | - | - | refused: {error} |", flush=True)
    for name in ("none", "rippled", "turned", "modest", "homely", "blind part"):
        print(row(f"fresh: {name}", report_of(name, "full")), flush=True)


if __name__ == "__main__":
    main()
