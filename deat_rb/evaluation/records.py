"""Files of a run's evaluations: the most comprehensive one is ``eval.json``, the others are in ``evaluations/``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from deat_rb.evaluation.report import SKIPPED, Report, verdict_file
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction

FOLDER = "evaluations"

STRENGTHS = {"natural": 0, "noise": 1, "fgsm": 2, "autoattack-rand": 3, "autoattack-plus": 5, "autoattack": 4}
"""Strength of attacks by the prefix of their names; 3 for all others."""


@dataclass(frozen=True)
class Placement:
    """File locations for a new report of a run.

    Attributes:
        file: JSON file of the new report.
        sentence: Note for the user; empty for a run's first evaluation and for a repetition of it.
        archived: Contents of the files to which the previous ``eval.json`` is moved.
    """

    file: Path
    sentence: str = ""
    archived: dict[Path, bytes] = field(default_factory=dict)


def place(
    run: Path, report: Report, *, own_data: bool, own_eps: float, own_norm: str = "Linf", overwrite: bool = False
) -> Placement:
    """Choose where to write a report of a run.

    It becomes ``eval.json`` if it uses the run's own data and there is no ``eval.json``, or the existing one was
    computed for different weights or data, or covers no more (see `is_as_full`). The existing one is then moved to
    ``evaluations/``.

    Args:
        run: The run directory.
        report: The new report.
        own_data: Whether it was computed on the dataset that the run was trained on.
        own_eps: The radius with which the run was trained.
        own_norm: The norm with which it was trained.
        overwrite: Whether an evaluation on the run's own data replaces a more comprehensive ``eval.json``.

    Raises:
        DeatError: The folder ``evaluations/`` cannot be created.
    """
    beside = run / FOLDER / f"{record_name(report)}.json"
    if not own_data:
        _create(beside.parent)
        return Placement(beside, "the data are not the run's own, so it is not its eval.json: compare the file itself")
    present = _present(run)
    if present is None:
        return Placement(run / "eval.json")
    outdated = _outdated(present, report)
    if not (outdated or overwrite or _is_preferred(report, present, own_eps, own_norm)):
        _create(beside.parent)
        return Placement(
            beside,
            f"eval.json keeps the more comprehensive evaluation ({summary(present)}); replace it with --overwrite",
        )
    if record_name(present) == record_name(report):
        return Placement(run / "eval.json")
    _create(beside.parent)
    name = record_name(present)
    archived = {run / FOLDER / f"{name}{suffix}": file.read_bytes()
                for suffix, file in _files(run).items() if file.is_file()}  # fmt: skip
    return Placement(run / "eval.json", f"the previous eval.json is now {FOLDER}/{name}.json", archived)


def is_as_full(new: Report, old: Report) -> bool:
    """Return whether ``new`` covers all of ``old``: norm, eps and radii, examples, precision, checks and attacks.

    The attacks are covered if ``new`` contains all attacks of ``old``, or one stronger than all of them.
    """
    radii = [{round(point.eps, 9) for point in report.curve} for report in (new, old)]
    return (
        new.norm == old.norm
        and math.isclose(new.eps, old.eps, abs_tol=1e-9)
        and radii[0] >= radii[1]
        and new.n_examples >= old.n_examples
        and (new.precision == "fp32" or old.precision != "fp32")
        and _n_checks(new) >= _n_checks(old)
        and (new.results.keys() >= old.results.keys() or _strength(new) > _strength(old))
    )


def record_name(report: Report) -> str:
    """Return a file name, without suffix, that identifies an evaluation of a run."""
    attacks = [name for name in report.results if name != "natural"] or ["natural"]
    readable = re.sub(r"[^A-Za-z0-9.+-]+", "_", "+".join(attacks))[:40].strip("_.+-")
    eps = format_fraction(report.eps).replace("/", "_")
    settings = (report.norm, report.eps, [point.eps for point in report.curve], attacks, report.n_examples, report.seed,
                report.batch_size, report.precision, report.model_sha256, report.examples_sha256)  # fmt: skip
    digest = sha256(repr(settings).encode()).hexdigest()[:8]
    return f"{readable}-{report.norm}-{eps}-{report.n_examples}-{digest}"


def summary(report: Report) -> str:
    """Return a short description of a report: attacks, number of images, norm and eps."""
    attacks = ", ".join(name for name in report.results if name != "natural") or "natural accuracy"
    return f"{attacks} on {counted(report.n_examples, 'image', '')}, {report.norm}, eps {format_fraction(report.eps)}"


def _is_preferred(new: Report, present: Report, own_eps: float, own_norm: str) -> bool:
    ranks = [report.norm == own_norm and math.isclose(report.eps, own_eps, abs_tol=1e-9) for report in (new, present)]
    return ranks[0] if ranks[0] != ranks[1] else is_as_full(new, present)


def _outdated(present: Report, report: Report) -> bool:
    """Return whether the existing report was computed for different weights or data than the new one."""
    data = [each.provenance.get("data_sha256", "") for each in (present, report)]
    weights = [each.model_sha256 for each in (present, report)]
    return any(all(pair) and pair[0] != pair[1] for pair in (data, weights))


def _present(run: Path) -> Report | None:
    if not (run / "eval.json").exists():
        return None
    try:
        return Report.load(run)
    except DeatError:
        return None  # damaged or in an earlier schema: not worth keeping


def _files(run: Path) -> dict[str, Path]:
    """Map each suffix used in ``evaluations/`` to the corresponding file of the run's ``eval.json``."""
    file = run / "eval.json"
    return {".json": file, "-verdicts.safetensors": verdict_file(file), ".html": run / "report.html",
            "-eps.png": run / "eval-eps.png"}  # fmt: skip


def _create(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot create {folder}: {error.strerror}") from None


def _n_checks(report: Report) -> int:
    return sum(check.name != SKIPPED for check in report.checks)


def _strength(report: Report) -> int:
    """Return the strength of the strongest attack."""
    return max(next((level for start, level in STRENGTHS.items() if name.startswith(start)), 3)
               for name in report.results)  # fmt: skip
