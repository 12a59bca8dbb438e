"""The command ``deat-rb export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model-name", required=True, metavar="NAME",
              help="Name <FirstAuthor><Year><FirstWordOfTitle>, such as Wang2021Gradient_R18.")  # fmt: skip
@click.option(
    "--as-dataset", metavar="NAME", help="Export other data as this RobustBench dataset: cifar10 or cifar100."
)
@click.option("--output", type=click.Path(path_type=Path), default=".", show_default=True, metavar="DIR",
              help="Folder for the files.")  # fmt: skip
@click.option("--link", metavar="URL", help="URL of the paper; for DEAT's methods by default that of the DEAT paper.")
@click.option("--name", metavar="TITLE", help="Title of the paper.")
@click.option("--authors", metavar="A, B, ...", help="Authors of the paper.")
@click.option("--venue", metavar="VENUE", help="Venue and year of the paper.")
@click.option("--additional-data", is_flag=True, help="Additional training images were used.")
@click.option("--reported", type=float, metavar="PERCENT",
              help="Robust accuracy reported by the authors; by default the lowest measured.")  # fmt: skip
@click.option("--external", type=float, metavar="PERCENT", help="Best known robust accuracy; RobustBench ranks by it.")
@click.option("--unreliable/--reliable", default=None,
              help="Whether AutoAttack's accuracy is unreliable; by default derived from the evaluation's checks."
              )  # fmt: skip
@click.option("--footnote", metavar="TEXT", help="Text appended to the automatic footnote.")
@click.option("--overwrite", is_flag=True, help="Replace an existing export of the same name.")
def export(
    run: Path,
    model_name: str,
    as_dataset: str | None,
    output: Path,
    link: str | None,
    name: str | None,
    authors: str | None,
    venue: str | None,
    additional_data: bool,
    reported: float | None,
    external: float | None,
    unreliable: bool | None,
    footnote: str | None,
    overwrite: bool,
) -> None:
    """Export a run in RobustBench's format.

    Writes the weights to models/, the metadata for RobustBench's table to model_info/, and the source code for a pull
    request to RobustBench to pull_request/. Accuracies are taken from `deat-rb eval RUN --autoattack`.
    """
    from deat_rb.robustbench.export import export

    paths = export(
        run,
        model_name=model_name,
        output=output,
        as_dataset=as_dataset,
        link=link,
        name=name,
        authors=authors,
        venue=venue,
        additional_data=additional_data,
        reported=reported,
        external=external,
        unreliable=unreliable,
        footnote=footnote,
        overwrite=overwrite,
    )
    for path in (paths.weights, paths.info, paths.source):
        click.echo(f"written: {path}")
    if paths.unknown:
        click.echo(f"unknown: {', '.join(paths.unknown)}; run deat-rb eval {run} --autoattack, then export again")
