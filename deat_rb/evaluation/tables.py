"""Tables over several evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from deat_rb.evaluation.report import Report
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from rich.table import Table


def sweep_table(report: Report) -> Table:
    """Return a sweep as a table: one row per attack, one column per eps."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"accuracy by eps ({report.norm}), %")
    table.add_column("attack", overflow="fold")
    for point in report.curve:
        table.add_column(format_fraction(point.eps), justify="right")
    for name in report.curve[0].accuracy:
        table.add_row(escape(name), *(f"{100 * point.accuracy[name]:.2f}" for point in report.curve))
    table.add_row("worst case", *(f"{100 * point.worst_case:.2f}" for point in report.curve))
    return table


def are_comparable(reports: Sequence[Report]) -> bool:
    """Return whether reports are comparable: same examples, norm, eps and precision."""
    return len({(report.norm, report.eps, report.precision, report.examples_sha256) for report in reports}) == 1


def means(reports: Sequence[Report]) -> Table:
    """Return each attack's mean accuracy over several reports, and the sample standard deviation, as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"mean and standard deviation over {len(reports)} evaluations")
    table.add_column("attack", overflow="fold")
    table.add_column("accuracy", justify="right")
    for name in (*reports[0].results, reports[0].worst_case.name):
        values = [100 * report.results.get(name, report.worst_case).accuracy for report in reports]
        table.add_row(escape(name), f"{fmean(values):.2f} ± {stdev(values):.2f} %")
    return table
