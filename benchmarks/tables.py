"""Result tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich import box
from rich.table import Table

from benchmarks import busy
from benchmarks.evaluation import Comparison
from benchmarks.fill import Fill
from benchmarks.memory import MEMORY_TARGET, Memory
from benchmarks.overhead import OVERHEAD_TARGET, Overhead
from benchmarks.speed import FAITHFUL, LIMIT_TARGET, Faithful, Row


def at_least(value: float, target: float | None) -> str:
    """Format a value and whether it reaches its target."""
    if target is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({'met' if value >= target else 'missed'}: {target:g})"


def at_most(value: float, target: float) -> str:
    """Format a value and whether it does not exceed its target."""
    return f"{value:.3f} ({'met' if value <= target else 'missed'}: {target:g})"


def speed_table(rows: Sequence[Row], precision: str) -> Table:
    """Return the table of all methods in one precision."""
    table = _table(
        f"Training steps in {precision}, seconds per batch of {rows[0].batch_size if rows else 0}",
        "method", "steps", "passes", "(a) published", "ours", "(b) bare passes", "ms/image", "passes/s",
        "speedup over (a)", "(b) / ours",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.method,
            str(row.steps),
            f"{row.passes:.2f}",
            f"{median(row.published):.3f}",
            f"{median(row.ours):.3f}",
            f"{median(row.limit):.3f}",
            f"{row.milliseconds_per_image:.2f}",
            f"{row.passes_per_second:.2f}",
            at_least(row.speedup, row.target),
            at_least(row.of_limit, LIMIT_TARGET),
        )
    return table


def faithful_table(found: Sequence[Faithful]) -> Table:
    """Return the table comparing the published loops' costs with the authors' scripts."""
    table = _table(
        "(a) against the authors' scripts, each relative to its own full pass (NCHW, fp32)",
        "method", "steps", "(a)", "script", "deviation",
    )  # fmt: skip
    for each in found:
        verdict = "met" if abs(each.deviation) <= FAITHFUL else "missed"
        table.add_row(
            each.method,
            str(each.steps),
            f"{each.loop:.2f}",
            f"{each.script:.2f}",
            f"{each.deviation:+.1%} ({verdict}: {FAITHFUL:.0%})",
        )
    return table


def memory_table(found: Sequence[Memory]) -> Table:
    """Return the table of peak memory against the bare passes."""
    table = _table(
        "Peak memory, MiB",
        "method",
        "precision",
        "ours",
        "(b) bare passes",
        "ours / (b)",
        "ours / (b), increase only",
    )
    for each in found:
        table.add_row(
            each.method,
            each.precision,
            f"{each.ours / 2**20:.0f}",
            f"{each.limit / 2**20:.0f}",
            at_most(each.of_limit, MEMORY_TARGET),
            f"{each.growth_of_limit:.3f}",
        )
    return table


def overhead_table(found: Sequence[Overhead]) -> Table:
    """Return the table of the overhead of shuffling, augmentation and metrics."""
    table = _table(
        "Shuffling, augmentation and metrics, milliseconds per batch",
        "method", "precision", "overhead", "step", "share",
    )  # fmt: skip
    for each in found:
        table.add_row(
            each.method,
            each.precision,
            f"{1000 * median(each.beside):.1f}",
            f"{1000 * median(each.step):.1f}",
            at_most(each.share, OVERHEAD_TARGET),
        )
    return table


def evaluation_table(found: Sequence[Comparison]) -> Table:
    """Return the table of attacks against other implementations."""
    table = _table(
        "Evaluation, seconds",
        "attack", "images", "eps", "against", "theirs", "ours", "speedup", "robust: theirs", "ours", "verdicts",
    )  # fmt: skip
    for each in found:
        verdicts = f"{each.differing} differ" if each.differing else "equal"
        if not each.equal:
            verdicts += f" (different {'starts' if each.against == 'torchattacks' else 'rounding'})"
        table.add_row(
            each.attack,
            str(each.examples),
            f"{each.eps:.4g}",
            each.against,
            f"{median(each.theirs):.2f}",
            f"{median(each.ours):.2f}",
            at_least(each.speedup, each.target),
            f"{each.theirs_accuracy:.1%}",
            f"{each.ours_accuracy:.1%}",
            verdicts,
        )
    return table


def fill_table(rows: Sequence[Fill]) -> Table:
    """Return the table of forward passes, with batches attacked one by one and together."""
    table = _table(
        f"Forward passes of batches of {rows[0].batch_size if rows else 0}",
        "attack", "batches", "passes", "images", "images per pass", "fill", "seconds", "verdicts",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.stage,
            "together" if row.together else "one by one",
            f"{row.calls:,}",
            f"{row.images:,}",
            f"{row.images / row.calls:.1f}",
            f"{row.fill:.1%}",
            f"{median(row.seconds):.2f}" if row.seconds else "",
            f"{row.differing} differ" if row.differing else "equal" if row.seconds else "",
        )
    return table


def busy_table(rows: Sequence[busy.Row]) -> Table:
    """Return the table of settings of OpenMP; the command's choice is marked with a star."""
    names = list(rows[0].times) if rows else []
    table = _table(
        "A CPU that others use, seconds (median)", "workload", "busy loops", "others running", *names, "quotient"
    )
    for row in rows:
        table.add_row(
            f"{row.kind}, {row.arch}",
            str(row.loops),
            f"{row.others:.1f}",
            *(f"{median(row.times[name]):.2f}{'*' if name == row.ours else ''}" for name in names),
            at_most(row.quotient, row.target),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
