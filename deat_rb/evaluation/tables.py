"""Tables over several evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from deat_rb.evaluation.report import Report
from deat_rb.evaluation.statistics import mean_and_deviation
from deat_rb.utils.text import new_table
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from rich.table import Table


def sweep_table(report: Report) -> Table:
    """Return a sweep as a table: one row per attack and one column per eps, or vice versa for many radii."""
    from rich.markup import escape

    worst_case = report.worst_case.name
    radii = [format_fraction(point.eps) for point in report.curve]
    values = {name: [point.accuracy[name] for point in report.curve] for name in report.curve[0].accuracy}
    values[worst_case] = [point.worst_case for point in report.curve]
    table = new_table(f"accuracy by eps ({report.norm}), %")
    by_eps = len(radii) > 6
    table.add_column("eps" if by_eps else "attack", overflow="fold")
    for column in values if by_eps else radii:
        table.add_column(escape(column), justify="right", overflow="fold")
    if by_eps:
        for radius, *accuracies in zip(radii, *values.values(), strict=True):
            table.add_row(radius, *(f"{100 * float(accuracy):.2f}" for accuracy in accuracies))
    else:
        for name, accuracies in values.items():
            table.add_row(escape(name), *(f"{100 * accuracy:.2f}" for accuracy in accuracies))
    return table


def are_comparable(reports: Sequence[Report]) -> bool:
    """Return whether reports are comparable: same examples, norm, eps and precision."""
    return len({(report.norm, report.eps, report.precision, report.examples_sha256) for report in reports}) == 1


def group(keys: Sequence[Mapping[str, Any]], *, name: str = "method") -> dict[str, list[int]]:
    """Group evaluations with equal options.

    Args:
        keys: Options of each evaluation, without those that may differ within a group, such as the seed.
        name: Option that names a group; options that differ between groups of the same name are appended.

    Returns:
        The indices of each group's members, by the name of the group.
    """
    members: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(repr(sorted(key.items())), []).append(position)
    groups: dict[str, list[int]] = {}
    for positions in members.values():
        key = keys[positions[0]]
        alike = [keys[other[0]] for other in members.values() if keys[other[0]].get(name) == key.get(name)]
        options = [option for option in dict.fromkeys(option for each in alike for option in each)
                   if len({repr(each.get(option)) for each in alike}) > 1]  # fmt: skip
        title = ", ".join([str(key.get(name, "")), *(f"{option} {key.get(option)}" for option in options)]).strip(", ")
        groups[title or "all"] = positions
    return groups


def means(groups: Mapping[str, Sequence[Report]], *, width: int = 80) -> Table:
    """Return mean accuracy and sample standard deviation of each group of reports, one row per group.

    Args:
        groups: Comparable reports, by the name of the group; the attacks may differ between groups. If norm, eps,
            precision or images differ between groups, too, each row names its own.
        width: Width of the terminal; if it is too narrow, standard deviations are placed below the means.
    """
    from rich.markup import escape

    groups = _with_settings(groups)
    worst_case = next(iter(groups.values()))[0].worst_case.name
    attacks = [*dict.fromkeys(name for reports in groups.values() for name in reports[0].results), worst_case]
    table = new_table("mean and standard deviation over runs, %")
    table.add_column("group", overflow="fold")
    table.add_column("runs", justify="right")
    for name in attacks:
        table.add_column(escape(name), justify="right", overflow="fold")
    separator = " " if max(map(len, groups)) + 10 + 15 * len(attacks) <= width else "\n"
    for title, reports in groups.items():
        cells = []
        for name in attacks:
            results = [report.worst_case if name == worst_case else report.results.get(name) for report in reports]
            values = [100 * result.accuracy for result in results if result is not None]
            cells.append(_mean(values, separator) if len(values) == len(reports) else "-")
        table.add_row(escape(title), str(len(reports)), *cells)
    return table


def _with_settings(groups: Mapping[str, Sequence[Report]]) -> dict[str, Sequence[Report]]:
    """Append to the names of groups what differs between their evaluations, such as ``evaluated at eps 8/255``."""
    settings = {title: _settings(reports[0]) for title, reports in groups.items()}
    differ = [len(set(values)) > 1 for values in zip(*settings.values(), strict=True)]
    suffixes = {title: " ".join(compress(values, differ)) for title, values in settings.items()}
    return {title + (f", evaluated {suffixes[title]}" if suffixes[title] else ""): reports
            for title, reports in groups.items()}  # fmt: skip


def _settings(report: Report) -> tuple[str, str, str, str]:
    data = f"on {report.provenance.get('dataset', 'images')} (SHA-256 {report.examples_sha256[:8]})"
    return f"in {report.norm}", f"at eps {format_fraction(report.eps)}", f"with {report.precision}", data


def _mean(values: Sequence[float], separator: str) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f}" + ("" if deviation is None else f"{separator}± {deviation:.2f}")
