"""Paired comparison of evaluations on the same examples, with McNemar's exact test."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deat_rb.attacks.types import Parameters
from deat_rb.evaluation.records import FOLDER
from deat_rb.evaluation.report import Report, worst_of
from deat_rb.evaluation.statistics import mcnemar
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import as_text, counted, new_table, printable, replace_invisible
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from rich.table import Table


WORST_CASE = "worst case"

LONGEST_NAME = 24
"""Length of names beyond which tables use short ones; three columns of this length fit into 80 columns."""

METHODS = (
    "the test compares these networks, not their methods, which takes several seeds of each: deat-rb compare RUN... "
    "--group-by method"
)

SAME = {"norm": "norm", "eps": "eps", "n_examples": "number of examples", "num_classes": "number of classes"}


class Difference(BaseModel):
    """Paired difference between two evaluations under one attack.

    Attributes:
        attack: Name of the attack, or ``worst case`` over the attacks that all compared evaluations have.
        first: Name of the reference evaluation.
        second: Name of the other evaluation.
        n_examples: Number of examples, N.
        points: Accuracy in ``second`` minus accuracy in ``first``, in percentage points.
        only_first: Number of examples classified correctly only in ``first``.
        only_second: Number of examples classified correctly only in ``second``.
        p_value: p-value of McNemar's exact two-sided test.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str
    first: str
    second: str
    n_examples: int
    points: float
    only_first: int
    only_second: int
    p_value: float


class Comparison(BaseModel):
    """Comparison of several evaluations on the same examples.

    Attributes:
        norm: Norm of the threat model.
        eps: Radius, in [0, 1] pixel units.
        n_examples: Number of examples, N.
        accuracy: Accuracy in [0, 1], by evaluation and attack; ``worst case`` is over the attacks shared by all.
        differences: Differences between the first evaluation and each of the others, by attack.
        notes: Notes for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: str
    eps: float
    n_examples: int
    accuracy: dict[str, dict[str, float]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the legend, if there is one, and both tables as text."""
        return "\n".join([*self.legend, as_text(self.table()), as_text(self.difference_table())])

    @property
    def legend(self) -> tuple[str, ...]:
        """Lines that explain the short names of the tables, if a name is too long for a column; else empty."""
        return tuple(f"{short}: {name}" for name, short in self._labels().items() if short != name)

    def _labels(self) -> dict[str, str]:
        """Return each evaluation's name in the tables."""
        if max(map(len, self.accuracy)) <= LONGEST_NAME:
            return {name: name for name in self.accuracy}
        return {name: f"run {number}" for number, name in enumerate(self.accuracy, start=1)}

    def table(self) -> Table:
        """Return the accuracies as a rich table, with one row per attack or, for more than three runs, per run."""
        from rich.markup import escape

        images = counted(self.n_examples, "image", "")
        table = new_table(f"accuracy on {images}, {self.norm}, eps {format_fraction(self.eps)}")
        attacks = dict.fromkeys(attack for accuracies in self.accuracy.values() for attack in accuracies)
        attacks = dict.fromkeys(sorted(attacks, key=lambda each: each == WORST_CASE))
        by_run, labels = len(self.accuracy) > 3, self._labels()
        rows, columns = (self.accuracy, attacks) if by_run else (attacks, self.accuracy)
        table.add_column("run" if by_run else "attack", overflow="fold")
        for name in columns:
            table.add_column(escape(labels.get(name, name)), justify="right", overflow="fold")
        for row in rows:
            values = [self.accuracy[row].get(each) if by_run else self.accuracy[each].get(row) for each in columns]
            table.add_row(
                escape(labels.get(row, row)), *("-" if value is None else f"{100 * value:.2f} %" for value in values)
            )
        return table

    def difference_table(self) -> Table:
        """Return the differences and their p-values as a rich table."""
        from rich.markup import escape

        labels = self._labels()
        first = self.differences[0].first
        table = new_table(f"paired differences from {escape(labels.get(first, first))} (McNemar, exact)")
        table.add_column("run", overflow="fold")
        table.add_column("attack", overflow="fold")
        for column in ("difference", "only this run correct", "only the first correct", "p"):
            table.add_column(column, justify="right")
        for each in self.differences:
            table.add_row(escape(labels.get(each.second, each.second)), escape(each.attack),
                          f"{each.points:+.2f} points", str(each.only_second), str(each.only_first),
                          f"{each.p_value:.2g}")  # fmt: skip
        return table


def compare(reports: Sequence[tuple[str, Report]]) -> Comparison:
    """Compare evaluations on the same examples, each with the first.

    Args:
        reports: Two or more pairs (name, report), with verdicts.

    Raises:
        DeatError: The evaluations differ in examples, norm or eps, or verdicts are missing.
    """
    if len(reports) < 2:
        raise DeatError(f"a comparison needs two or more evaluations, not {len(reports)}")
    names = _names([name for name, _ in reports])
    first = reports[0][1]
    for name, (_, report) in zip(names, reports, strict=True):
        if not report.verdicts:
            raise DeatError(f"the verdicts file of {name} is missing next to its eval.json; evaluate it again")
        _check_same(names[0], first, name, report)
    shared = [attack for attack in first.results if all(attack in report.results for _, report in reports)]
    verdicts = {
        name: _with_worst({printable(attack): report.verdicts[attack] for attack in shared})
        for name, (_, report) in zip(names, reports, strict=True)
    }
    accuracy = {
        name: {printable(attack): result.accuracy for attack, result in report.results.items()}
        | {
            attack: int(correct.sum()) / len(correct)
            for attack, correct in verdicts[name].items()
            if attack == WORST_CASE
        }
        for name, (_, report) in zip(names, reports, strict=True)
    }
    differences = [
        _difference(attack, names[0], verdicts[names[0]][attack], name, correct)
        for name in names[1:]
        for attack, correct in verdicts[name].items()
    ]
    notes = [
        f"{name} was attacked in {report.precision}: its robust accuracies are upper bounds, so its differences from "
        "the others are partly due to the precision"
        for name, (_, report) in zip(names, reports, strict=True)
        if report.precision != "fp32"
    ]
    notes += [
        f"{attack} has other settings in {name} than in {names[0]} ({differing}): evaluate one of them again"
        for name, (_, report) in zip(names[1:], reports[1:], strict=True)
        for attack in shared
        if (differing := _differing(first.results[attack].parameters, report.results[attack].parameters))
    ]
    if len({method for _, report in reports if (method := report.provenance.get("method"))}) > 1:
        notes.append(METHODS)
    return Comparison(norm=first.norm, eps=first.eps, n_examples=first.n_examples, accuracy=accuracy,
                      differences=tuple(differences), notes=tuple(notes))  # fmt: skip


def load_reports(paths: Sequence[str | Path]) -> list[tuple[str, Report]]:
    """Load reports from run directories or ``.json`` files, and name each.

    Raises:
        DeatError: A report is missing or damaged.
    """
    reports = []
    for path in map(Path, paths):
        if path.is_dir() and not (path / "eval.json").is_file():
            if other := next(iter(sorted(path.glob(f"{FOLDER}/*.json"))), None):
                raise DeatError(
                    f"{path} has no evaluation on the data that it was trained on, but has others: give such a file, "
                    f"as {other}, or restore the data and run deat-rb eval {path}"
                )
            raise DeatError(f"{path} has no evaluation: run deat-rb eval {path} first")
        report = Report.load(path)
        reports.append((replace_invisible(str(path) if path.suffix == ".json" else path.absolute().name), report))
    return reports


def _names(names: Sequence[str]) -> list[str]:
    """Make names unique: the second ``a`` becomes ``a (2)``, or the next number if a name with it is given, too."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        free = (each for each in numbered if each not in (*unique, *names))
        unique.append(next(free) if name in unique else name)
    return unique


def _check_same(first_name: str, first: Report, name: str, report: Report) -> None:
    for field, label in SAME.items():
        if getattr(first, field) != getattr(report, field):
            raise DeatError(
                f"{first_name} and {name} cannot be compared: their {label} is {getattr(first, field)} and "
                f"{getattr(report, field)}; re-evaluate with identical settings"
            )
    digests = [(each.examples_sha256, each.provenance.get("data_sha256", "")) for each in (first, report)]
    for one, other in zip(*digests, strict=True):
        if one and other:
            if one != other:
                raise DeatError(
                    f"{first_name} and {name} cannot be compared: they were evaluated on different "
                    "images, or their classes have different orders; evaluate both on the same images and classes"
                )
            return
    raise DeatError(f"{first_name} and {name} do not both record a hash of their test images; evaluate them again")


def _differing(first: Parameters, other: Parameters) -> str:
    """Describe the settings that differ between two evaluations under one attack; empty if none does."""
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name)}, not {first.get(name)}" for name in names)


def _with_worst(verdicts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**verdicts, WORST_CASE: worst_of(verdicts)} if len(verdicts) > 2 else verdicts


def _difference(attack: str, first_name: str, first: Tensor, name: str, correct: Tensor) -> Difference:
    only_first, only_second = int((first & ~correct).sum()), int((correct & ~first).sum())
    return Difference(
        attack=attack,
        first=first_name,
        second=name,
        n_examples=len(correct),
        points=100 * (only_second - only_first) / len(correct),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )
