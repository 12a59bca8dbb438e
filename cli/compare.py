"""``deat-rb compare``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("runs", metavar="RUN RUN ...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Put evaluations side by side, and test whether they differ.

    A RUN is a run directory that has been evaluated, or the eval.json of an evaluation. All must be of the same images
    within the same eps. Each is compared with the first, example by example, by McNemar's exact test; the p-values are
    not corrected for their number.
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
