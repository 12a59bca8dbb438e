"""The command ``deat-rb compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deat_rb.utils.errors import DeatError

if TYPE_CHECKING:
    from deat_rb.evaluation.report import Report


@click.command("compare")
@click.argument("runs", metavar="RUN RUN ...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Output as JSON.")
@click.option(
    "--group-by",
    "by",
    metavar="OPTION",
    help="Show mean, deviation and cost over seeds; rows are named by this option, such as method.",
)
@click.option("--markdown", "form", flag_value="markdown", help="With --group-by: output as Markdown.")
@click.option("--latex", "form", flag_value="latex", help="With --group-by: output as LaTeX.")
@click.option("--csv", "form", flag_value="csv", help="With --group-by: output as CSV.")
def compare(runs: tuple[str, ...], as_json: bool, by: str | None, form: str | None) -> None:
    """Compare evaluations and test their differences for significance.

    Each RUN is an evaluated run directory, hf:OWNER/NAME (a run on the Hugging Face Hub that was uploaded with its
    evaluation) or the eval.json of an evaluation; all must use the same images and eps. Each
    is compared with the first by McNemar's exact test on paired examples, which compares two networks, not the methods
    they were trained with; p-values are not corrected for multiple comparisons.

    With --group-by, runs that differ only in the seed form one row, with mean and standard deviation, and nothing is
    tested.
    """
    from rich.console import Console

    from deat_rb.evaluation.compare import compare

    if form is not None and (by is None or as_json):
        raise DeatError(f"--{form} is a format of --group-by's table: give --group-by method, and no --json")
    if by is not None:
        _print_groups(runs, by, "json" if as_json else form)
        return
    comparison = compare([report for run in runs for report in _load(run)])
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    console = Console()
    for line in comparison.legend:
        click.echo(line)
    console.print(comparison.table())
    console.print(comparison.difference_table())
    for note in comparison.notes:
        click.echo(f"note: {note}")


def _load(run: str) -> list[tuple[str, Report]]:
    """Load the report of a run, a file or a run on the Hub, with its name."""
    from deat_rb.runs.hub_run import open_hub
    from deat_rb.utils.hub import is_hub

    if not is_hub(run):
        return _checked(Path(run))
    hub = open_hub(run)
    for note in hub.notes:
        click.echo(f"note: {note}", err=True)
    advice = f"run deat-rb eval {run} --json FILE.json, and compare that file"
    if not (hub.path / "eval.json").is_file():
        raise DeatError(f"{hub.address} has no evaluation: {advice}")
    with hub.named():
        return [(run, report) for _, report in _checked(hub.path, advice)]


def _checked(path: Path, advice: str = "") -> list[tuple[str, Report]]:
    """Load the report of a path; that of a run must be of the weights that the run now has."""
    from deat_rb.evaluation.compare import load_reports
    from deat_rb.runs.directory import CONFIG, RunDirectory

    reports = load_reports([path])
    if (path / CONFIG).is_file():
        run = RunDirectory.open(path)
        if run.unfinished:
            click.echo(f"note: training of {path} has not ended: it has {run.unfinished}", err=True)
        for _, report in reports:
            run.check_evaluation(report.provenance, advice or f"run {run.command('eval')} first")
    return reports


def _print_groups(runs: tuple[str, ...], by: str, form: str | None) -> None:
    from rich.console import Console

    from deat_rb.reproduction.grouping import grouped_table
    from deat_rb.reproduction.tables import as_csv, as_json, as_latex, as_markdown, as_rich
    from deat_rb.utils.hub import is_hub

    for run in runs:
        if is_hub(run):
            raise DeatError(f"--group-by needs run directories, not {run}: omit it, or copy the run here")
    table = grouped_table(list(map(Path, runs)), by)
    if form is None:
        Console().print(as_rich(table))
        for note in table.notes:
            click.echo(f"note: {note}")
    elif form == "json":
        click.echo(json.dumps(as_json(table), indent=2, ensure_ascii=False))
    else:
        click.echo({"markdown": as_markdown, "latex": as_latex, "csv": as_csv}[form](table), nl=False)
