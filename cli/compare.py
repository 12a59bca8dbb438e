"""The command ``deat-rb compare``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("runs", metavar="RUN RUN ...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Output as JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare evaluations and test their differences for significance.

    Each RUN is an evaluated run directory or the eval.json of an evaluation; all must use the same images and eps. Each
    is compared with the first by McNemar's exact test on paired examples; p-values are not corrected for multiple
    comparisons.
    """
    from rich.console import Console

    from deat_rb.evaluation.compare import compare, load_reports

    comparison = compare(load_reports(runs))
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    console = Console()
    console.print(comparison.table())
    console.print(comparison.difference_table())
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
