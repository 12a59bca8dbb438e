"""The paper's tables and figures: results of runs collected, compared with the paper and written to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deat_rb.reproduction.claims import Verdict, judge
from deat_rb.reproduction.experiments import (
    Setup,
    Target,
    columns_of,
    differences,
    experiments,
    part_runs,
    published,
    target_study,
)
from deat_rb.reproduction.figures import Drawn, draw
from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.outputs import write_table
from deat_rb.reproduction.planning import check_same_data
from deat_rb.reproduction.results import RunResult, collect
from deat_rb.reproduction.study import RunSpec, Study, merge
from deat_rb.reproduction.tables import ResultTable, Row
from deat_rb.runs.curve_test import curve_test
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json

SETUP = "reproduction.json"
"""File with the setup of each target that was written."""

FIXED = ("scale", "dataset", "data_dir", "arch", "train_size", "batch_size", "curve_test")
"""Parts of the setup that all targets of a folder share; of ``data_dir`` only the last part, as in the runs' names."""

_SETUPS = TypeAdapter(dict[str, Setup])


@dataclass(frozen=True)
class Outcome:
    """A target's result.

    Attributes:
        name: The target.
        title: Its title.
        differences: How the runs differ from the paper's, in sentences.
        note: A remark.
        table: The table; for a figure its runs and costs.
        verdicts: Whether the paper's orderings hold.
        pictures: The figure by format; empty for tables, and before a run has finished an epoch.
    """

    name: str
    title: str
    differences: str
    note: str
    table: ResultTable
    verdicts: tuple[Verdict, ...] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_figure(self) -> bool:
        """Whether the target is a figure."""
        return self.name.startswith("figure")


def study_of(targets: Sequence[str], setup: Setup) -> Study:
    """Return the runs of targets; a run that several targets need is included once."""
    return merge([target_study(name, setup) for name in targets], "reproduction", "The paper's experiments")


def check_setup(folder: StudyFolder, setup: Setup) -> dict[str, Setup]:
    """Check that a folder has no reproduction with a different setup, and return the targets written so far.

    Returns:
        The setup of each target, with the data where they are now, in the paper's order: they may differ in seeds and
        numbers of test images.

    Raises:
        DeatError: The folder holds a reproduction at a different scale or with different data, images or networks.
    """
    path = folder.path / SETUP
    if not path.is_file():
        return {}
    try:
        known = _SETUPS.validate_python(read_json(path))
    except ValidationError:
        raise DeatError(f"{path} is damaged or of an earlier version; remove it") from None
    for own in known.values():
        for name in FIXED:
            before, now = getattr(own, name), getattr(setup, name)
            parts = [Path(each or "").name if name == "data_dir" else each for each in (before, now)]
            if parts[0] != parts[1]:
                raise DeatError(
                    f"{folder.path} holds a reproduction with {name.replace('_', '-')} {before}, not {now}; choose "
                    "another --output"
                )
    known = {name: replace(own, data_dir=setup.data_dir) for name, own in known.items()}
    check_same_data(folder, [run for name, own in known.items() for run in target_study(name, own).runs])
    return _in_order(known)


def record_targets(folder: StudyFolder, setup: Setup, targets: Sequence[str]) -> dict[str, Setup]:
    """Record targets and their setup in a folder, and return all targets that were recorded so far with theirs.

    Raises:
        DeatError: See `check_setup`.
    """
    known = check_setup(folder, setup)
    every = _in_order({**known, **dict.fromkeys(targets, setup)})
    if every != known:
        folder.create()
        write_json(folder.path / SETUP, _SETUPS.dump_python(every, mode="json"))
    return every


def _in_order(setups: Mapping[str, Setup]) -> dict[str, Setup]:
    return {name: setups[name] for name in experiments().targets if name in setups}


def outcome(name: str, setup: Setup, folder: StudyFolder) -> Outcome:
    """Return a target's result from the runs that are done so far.

    Raises:
        DeatError: A file of a run is damaged.
    """
    target = experiments().targets[name]
    rows: list[Row] = []
    by_part: list[dict[str, list[RunResult]]] = []
    specs: dict[str, list[RunSpec]] = {}
    for number, part in enumerate(target.parts):
        runs = part_runs(setup, target, number)
        known = published(name, number) if target.columns else {}
        results: dict[str, list[RunResult]] = {}
        for run, result in zip(runs, collect(folder, runs), strict=True):
            results.setdefault(run.label, []).append(result)
            specs.setdefault(run.label, []).append(run)
        where = f" ({experiments().environments[part.environment].title})" if len(target.parts) > 1 else ""
        rows += [Row(f"{label}{where}", tuple(each), known.get(label, {})) for label, each in results.items()]
        by_part.append(results)
    columns = columns_of(target, setup.autoattack is not None and bool(target.columns))
    said = differences(setup, name)
    table = ResultTable(name, target.title, columns, tuple(rows), (said,))
    verdicts = tuple(judge(claim.text, claim.column, claim.more, claim.less, by_part[claim.part])
                     for claim in target.claims)  # fmt: skip
    pictures = _pictures(target, specs, folder, said) if target.figure else {}
    return Outcome(name, target.title, said, target.note, table, verdicts, pictures)


def _pictures(
    target: Target, specs: Mapping[str, Sequence[RunSpec]], folder: StudyFolder, footer: str
) -> dict[str, bytes]:
    parameters = {
        f"{method}, alpha {alpha}, gamma {gamma:g}": (alpha, gamma)
        for part in target.parts
        for method, alpha, gamma in product(part.methods, part.alpha, part.gamma)
    }
    drawn = {}
    for label, runs in specs.items():
        alpha, gamma = parameters.get(label, ("", None))
        members = [_drawn(run, folder, alpha, gamma) for run in runs]
        begun = [each for each in members if each is not None]
        if begun:
            drawn[label] = begun
    assert target.figure is not None
    return draw(target.figure, target.title, drawn, target.panels, footer) if drawn else {}


def _drawn(run: RunSpec, folder: StudyFolder, alpha: str, gamma: float | None) -> Drawn | None:
    """Return the data of a trained run for a figure; None if it is not trained yet."""
    record = folder.record(run)
    if record is None or record.status == "failed":
        return None
    path = folder.run_path(run)
    directory = RunDirectory.open(path)
    rows = directory.rows()
    batches = max([1, *(-(-row.examples // directory.config.data.batch_size) for row in rows)])
    found = folder.report(run, "pgd-20", run.evaluation.n_examples)
    pgd20 = 100 * found[1].results["pgd-20"].accuracy if found is not None else None
    return Drawn(run.seed, rows, curve_test(path), batches, pgd20, alpha, gamma)


def write_outcome(done: Outcome, folder: Path) -> list[Path]:
    """Write a target's table as ``NAME.md``, ``.tex``, ``.csv`` and ``.json``, and its figure as ``.png`` and ``.pdf``.

    Raises:
        DeatError: A file cannot be written.
    """
    return write_table(
        done.table, folder, remarks=_verdicts_markdown(done), facts=_judged(done), pictures=done.pictures
    )


def _judged(done: Outcome) -> dict[str, Any]:
    claims = [{"text": each.text, "outcome": each.outcome, "detail": each.detail} for each in done.verdicts]
    return {"differences": done.differences, "claims": claims}


def _verdicts_markdown(done: Outcome) -> str:
    lines = [""]
    if done.is_figure:
        lines += [
            *([done.note, ""] if done.note else []),
            *([f"![{done.title}]({done.name}.png)"] * bool(done.pictures)),
        ]
    if done.verdicts:
        lines += [
            "What the paper states, and whether it holds here (95 % interval of paired differences over seeds; "
            "of k pairs, one is reversed at a level of 5 % / k):",
            "",
        ]
        lines += ["| statement | here | differences |", "|---|---|---|"]
        lines += [f"| {each.text} | {each.outcome} | {each.detail} |" for each in done.verdicts]
    return "\n".join(lines).rstrip() + "\n"
