"""The command ``deat-rb leaderboard``."""

from __future__ import annotations

from pathlib import Path

import click

from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted

from .options import size, threads_option

_board = click.option(
    "--board", type=click.Path(path_type=Path), default="leaderboard", show_default=True, metavar="DIR"
)


def _inherit(context: click.Context) -> None:
    """Pass the options given before the subcommand on to it.

    Raises:
        DeatError: The subcommand has no such option.
    """
    from click.core import ParameterSource

    name = str(context.invoked_subcommand)
    known = {each.name for each in leaderboard.commands[name].params}
    given = {option: value for option, value in context.params.items()
             if context.get_parameter_source(option) is not ParameterSource.DEFAULT}  # fmt: skip
    for option, value in given.items():
        if option not in known:
            flag = value if option == "form" else option
            raise DeatError(f"--{flag} is not an option of leaderboard {name}: omit it")
    context.default_map = {name: given}


def _print_left_out(left_out: list[str]) -> None:
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
@click.option("--dataset", metavar="NAME", help="Show only entries of this dataset.")
@click.option("--sort", default="rank", show_default=True, metavar="COLUMN",
              help="Row order: rank, autoattack, natural, fgsm, pgd100, cw20, cost, seconds or name.")  # fmt: skip
@click.option("--json", "form", flag_value="json", help="Print JSON with all fields.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown tables.")
@click.option("--latex", "form", flag_value="latex", help="Print LaTeX tables (booktabs).")
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON schema of an entry.")  # fmt: skip
@click.pass_context
def leaderboard(context: click.Context, board: Path, dataset: str | None, sort: str, form: str | None) -> None:
    """Show, build, verify or export a leaderboard.

    Entries are ranked by robust accuracy (the best known or, if none is, AutoAttack's) among evaluations on the whole
    test set with the same dataset and eps. Evaluations on a subset of the test set are listed separately, without rank.
    """
    if context.invoked_subcommand is not None:
        _inherit(context)
        return
    from deat_rb.leaderboard import ranking, tables
    from deat_rb.leaderboard.board import Board

    left_out: list[str] = []
    ranked = ranking.rank(Board(board).entries(left_out=left_out), dataset=dataset, sort=sort)
    _print_left_out(left_out)
    if form is not None:
        click.echo(getattr(tables, f"as_{form}")(ranked).rstrip("\n"))
        return
    from rich.console import Console

    console = Console()
    for table in tables.as_tables(ranked, console.width):
        console.print(table)


@leaderboard.command("build")
@_board
def build(board: Path) -> None:
    """Write the board's HTML pages, which can be viewed offline."""
    from deat_rb.leaderboard.pages import index as board_page
    from deat_rb.utils.text import printable

    left_out: list[str] = []
    index = board_page.build(board, left_out=left_out)
    _print_left_out(left_out)
    click.echo(f"written: {printable(str(index))}")


@leaderboard.command("verify")
@_board
@click.option("--sample", type=int, default=100, show_default=True, metavar="N",
              help="Number of random examples to re-measure each model on (50 or more; 0 for none).")  # fmt: skip
@click.option("--data-dir", "data_dirs", multiple=True, metavar="NAME=DIR",
              help="Folder of a dataset; may be repeated. The digits need none.")  # fmt: skip
@click.option("--memory-limit", type=size, metavar="SIZE",
              help="Decode a folder's test images batch by batch if all of them would take more memory than this, such "
              "as 8G.")  # fmt: skip
@click.option("--batch-size", type=int, metavar="N", help="Images per batch.  [default: 500 on a GPU, otherwise 128]")
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, ..."
)
@threads_option
def verify(
    board: Path,
    sample: int,
    data_dirs: tuple[str, ...],
    memory_limit: int | None,
    batch_size: int | None,
    device: str,
) -> None:
    """Check all files and hashes, and re-measure random examples of every model.

    Prints all problems, and exits with status 1 if there are any.
    """
    from deat_rb.cli.evaluation_progress import EvaluationProgress
    from deat_rb.leaderboard.verify import verify as verify_board
    from deat_rb.utils.devices import resolve_device

    folders = {}
    for text in data_dirs:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise DeatError(f"--data-dir {text} is invalid: give NAME=DIR, such as cifar10=data")
        folders[name] = Path(folder)
    where = str(resolve_device(device))
    with EvaluationProgress() as progress:
        result = verify_board(board, sample=sample, data_dirs=folders, batch_size=batch_size,
                             memory_limit=memory_limit, device=where, progress=progress)  # fmt: skip
    for note in result.notes:
        click.echo(f"note: {note}")
    for problem in result.problems:
        click.echo(f"problem: {problem}")
    click.echo(f"{counted(result.entries, 'entry')}, {result.measured} re-measured, "
               f"{counted(len(result.problems), 'problem')}")  # fmt: skip
    if result.problems:
        raise click.exceptions.Exit(1)


@leaderboard.command("export")
@_board
@click.option("--robustbench", "output", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Output folder for model_info/ and models/.")  # fmt: skip
@click.option("--dataset", metavar="NAME", help="Export only entries of this dataset.")
@click.option("--as-dataset", metavar="NAME",
              help="Export other datasets under this name (cifar10 or cifar100), with a footnote.")  # fmt: skip
def export(board: Path, output: Path, dataset: str | None, as_dataset: str | None) -> None:
    """Export the board's models in RobustBench's format."""
    from deat_rb.leaderboard.robustbench_export import export_board

    exported = export_board(board, output, dataset=dataset, as_dataset=as_dataset)
    for sentence in exported.left_out:
        click.echo(f"left out: {sentence}")
    for name in exported.names:
        click.echo(f"written: {name}")
