"""Mean and deviation over the seeds of evaluated runs, by an option such as the method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deat_rb.evaluation.compare import load_reports
from deat_rb.evaluation.tables import are_comparable, group
from deat_rb.reproduction.results import of_run
from deat_rb.reproduction.tables import ResultTable
from deat_rb.runs.config import RunConfig
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import MAY_CHANGE
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction


def group_key(config: RunConfig) -> dict[str, Any]:
    """Return all that defines a run except the seed: the options that affect the result, and hashes of its data.

    Of runs of earlier versions, the hash of the initial weights is unknown, and not equal to a known one; their options
    `train_size` and `val_size` are the numbers of images used.
    """
    options = {name: value for name, value in config.flat().items() if name not in ("seed", *MAY_CHANGE)}
    sizes = {"train_size": config.train_images or config.data.train_size,
             "val_size": config.val_images or config.data.val_size}  # fmt: skip
    return options | sizes | {"data": config.data_fingerprint, "extra_data": config.extra_fingerprint,
                      "initial_weights": config.init_sha256}  # fmt: skip


def key_of_run(run: RunDirectory) -> dict[str, Any]:
    """Return the key for grouping a run: `group_key`, and how far it is trained."""
    return group_key(run.config) | {"trained": run.unfinished or "all epochs"}


def grouped_table(paths: Sequence[Path], by: str) -> ResultTable:
    """Return mean accuracies and costs over runs that differ only in the seed.

    A run whose training has not ended is not averaged with others that have more epochs.

    The worst case is among them if all runs have the same attacks, natural accuracy and two or more.

    Args:
        paths: Evaluated run directories.
        by: The option that names a group; options that differ between groups of the same name are appended.

    Raises:
        DeatError: A path is not an evaluated run, an evaluation is of other weights than the run now has, the
            evaluations cannot be compared, or there is no such option.
    """
    runs = [RunDirectory.open(path) for path in paths]
    configs = [run.config for run in runs]
    keys = [key_of_run(run) for run in runs]
    name = by.removeprefix("--").replace("-", "_")
    if name not in keys[0]:
        raise DeatError(f"--group-by {by} is not an option of runs: {did_you_mean(name, keys[0])}")
    reports = [report for _, report in load_reports(paths)]
    for run, report in zip(runs, reports, strict=True):
        run.check_evaluation(report.provenance, f"run {run.command('eval')} first")
    if not are_comparable(reports):
        raise DeatError(
            "the evaluations differ in images, norm, eps or precision; evaluate all runs with the same settings"
        )
    for label, positions in group(keys, name=name).items():
        seeds: dict[int, Path] = {}
        for position in positions:
            twin = seeds.setdefault(configs[position].optim.seed, paths[position])
            if twin is not paths[position]:
                raise DeatError(f"{twin} and {paths[position]} have the same options and the same seed ({label}, seed "
                                f"{configs[position].optim.seed}): give one of them")  # fmt: skip
    worst_case = len(reports[0].results) > 2 and len({frozenset(report.results) for report in reports}) == 1
    results = [
        of_run(paths[position], reports[position], label, worst_case=worst_case)
        for label, positions in group(keys, name=name).items()
        for position in positions
    ]
    first = reports[0]
    where = f"{counted(first.n_examples, 'image')}, {first.norm}, eps {format_fraction(first.eps)}"
    title = f"Mean and standard deviation over seeds, {where}"
    notes = [f"training of {run.path} has not ended: it has {run.unfinished}" for run in runs if run.unfinished]
    return ResultTable.of(results, name="comparison", title=title, notes=notes)
