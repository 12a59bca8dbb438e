"""``deat-rb leaderboard``."""

from __future__ import annotations

from pathlib import Path

import click

from deat_rb.leaderboard import tables

DEFAULT = Path("leaderboard")
_board = click.option("--board", type=click.Path(path_type=Path), metavar="DIR", help="[default: leaderboard]")


def _chosen(context: click.Context, board: Path | None) -> Path:
    """The folder, given to the command or before its name."""
    before = context.parent.params.get("board") if context.parent is not None else None
    return board or before or DEFAULT


def _tell(left_out: list[str]) -> None:
    for sentence in left_out:
        click.echo(f"left out: {sentence}", err=True)


def _print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from deat_rb.evaluation.report import json_schema
        from deat_rb.leaderboard.entry import Entry

        click.echo(json_schema(Entry), nl=False)
        context.exit()


@click.group("leaderboard", invoke_without_command=True)
@_board
@click.option("--dataset", metavar="NAME", help="Only entries of this data set.")
@click.option("--sort", default="rank", show_default=True, metavar="COLUMN",
              help="rank, autoattack, natural, fgsm, pgd100, cw20, cost, seconds or name; the rank stays.")  # fmt: skip
@click.option("--json", "form", flag_value="json", help="For programs, with all fields.")
@click.option("--csv", "form", flag_value="csv", help="For spreadsheets.")
@click.option("--markdown", "form", flag_value="markdown", help="For a README.")
@click.option("--latex", "form", flag_value="latex", help="For a paper.")
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON schema of an entry.")  # fmt: skip
@click.pass_context
def leaderboard(context: click.Context, board: Path | None, dataset: str | None, sort: str, form: str | None) -> None:
    """Show a leaderboard, make its pages, verify it or export it.

    Robust accuracy decides the rank: the best known, else AutoAttack's, among evaluations on the whole test set of one
    data set, within one eps. Evaluations on a part of it are listed apart.
    """
    if context.invoked_subcommand is not None:
        return
    from deat_rb.leaderboard import ranking
    from deat_rb.leaderboard.board import Board

    left_out: list[str] = []
    standings = ranking.rank(Board(board or DEFAULT).entries(left_out=left_out), dataset=dataset, sort=sort)
    _tell(left_out)
    if form is not None:
        click.echo(getattr(tables, f"as_{form}")(standings).rstrip("\n"))
        return
    from rich.console import Console

    console = Console()
    for table in tables.as_tables(standings, console.width):
        console.print(table)


@leaderboard.command("build")
@_board
@click.pass_context
def build(context: click.Context, board: Path | None) -> None:
    """Write the board's pages, which need no network."""
    from deat_rb.leaderboard.pages import index as board_page

    left_out: list[str] = []
    index = board_page.build(_chosen(context, board), left_out=left_out)
    _tell(left_out)
    click.echo(f"written: {index}")


@leaderboard.command("verify")
@_board
@click.option("--sample", type=int, default=100, show_default=True, metavar="N",
              help="Measure so many examples of each model again, 50 or more; 0 for none.")  # fmt: skip
@click.option("--data-dir", "data_dirs", multiple=True, metavar="NAME=DIR",
              help="Where a data set is, for each but the digits.")  # fmt: skip
@click.option("--batch-size", type=int, default=128, show_default=True, metavar="N")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
@click.pass_context
def verify(
    context: click.Context, board: Path | None, sample: int, data_dirs: tuple[str, ...], batch_size: int, device: str
) -> None:
    """Read and hash every file, and measure some examples of every model again.

    Says what is wrong and where, and exits with status 1 if anything is.
    """
    from deat_rb.cli.evaluation_progress import EvaluationProgress
    from deat_rb.leaderboard.verify import verify as verify_board
    from deat_rb.utils.devices import resolve_device
    from deat_rb.utils.errors import DeatError

    folders = {}
    for text in data_dirs:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise DeatError(f"--data-dir {text} is not of the form NAME=DIR, such as cifar10=data")
        folders[name] = Path(folder)
    where = str(resolve_device(device))
    with EvaluationProgress(sample) as progress:
        found = verify_board(_chosen(context, board), sample=sample, data_dirs=folders, batch_size=batch_size,
                             device=where, progress=progress)  # fmt: skip
    for note in found.notes:
        click.echo(f"note: {note}")
    for problem in found.problems:
        click.echo(f"problem: {problem}")
    click.echo(f"{found.entries} entries, {found.measured} measured again, {len(found.problems)} problems")
    if found.problems:
        raise click.exceptions.Exit(1)


@leaderboard.command("export")
@_board
@click.option("--robustbench", "output", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Where model_info/ and models/ go.")  # fmt: skip
@click.option("--dataset", metavar="NAME", help="Only the entries of this data set.")
@click.option("--as-dataset", metavar="NAME", help="cifar10 or cifar100: what data of other names stand for.")
@click.pass_context
def export(
    context: click.Context, board: Path | None, output: Path, dataset: str | None, as_dataset: str | None
) -> None:
    """Write the board's models in RobustBench's form."""
    from deat_rb.leaderboard.robustbench_export import export_board

    exported = export_board(_chosen(context, board), output, dataset=dataset, as_dataset=as_dataset)
    for sentence in exported.left_out:
        click.echo(f"left out: {sentence}")
    for name in exported.names:
        click.echo(f"written: {name}")
