"""``deat-rb export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model-name", required=True, metavar="NAME", help="Such as Wang2021Gradient_R18.")
@click.option("--as-dataset", metavar="NAME", help="cifar10 or cifar100: what data of another name stand for.")
@click.option("--output", type=click.Path(path_type=Path), default=".", show_default=True, metavar="DIR")
@click.option("--link", metavar="URL", help="Of the paper; like what follows, the paper's own for its own methods.")
@click.option("--name", metavar="TITLE", help="Of the paper.")
@click.option("--authors", metavar="A, B, ...", help="Of the paper.")
@click.option("--venue", metavar="VENUE", help="Of the paper, with the year.")
@click.option("--additional-data", is_flag=True, help="Other training images were used, too.")
@click.option("--reported", type=float, metavar="PERCENT", help="Robust accuracy to report; by default the lowest.")
@click.option("--external", type=float, metavar="PERCENT", help="Best known robust accuracy.")
@click.option("--unreliable/--reliable", default=None, help="Whether AutoAttack's figure is not to be relied on.")
@click.option("--footnote", metavar="TEXT", help="Added to what the export says by itself.")
@click.option("--overwrite", is_flag=True, help="Replace an export of that name.")
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
    """Write a run in RobustBench's form.

    The weights go to models/, what RobustBench's table needs to model_info/, and what a pull request to RobustBench
    would add to pull_request/. The accuracies are those that `deat-rb eval` left in the run.
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
        click.echo(f"unknown: {', '.join(paths.unknown)}; deat-rb eval {run} --autoattack measures what is missing")
