"""The command ``deat-rb methods``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Output as JSON.")
@click.option("--markdown", is_flag=True, help="Output the table as Markdown.")
def methods(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the methods, or describe one.

    NAME is a method's name as in the paper, such as m+trades, DEAT-40% or FREE-8; case does not matter.
    """
    from deat_rb.methods.describe import COLUMNS, cells, describe, explain, markdown_table, method_table

    if name is not None:
        text = explain(name)
        if as_json:
            click.echo(json.dumps({**asdict(describe(name)), "explanation": text}, indent=2))
        else:
            click.echo("\n".join(_wrapped(line) for line in text.splitlines()))
        return
    rows = method_table(lambda sentence: click.echo(f"Warning: {sentence}", err=True))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if markdown:
        click.echo(markdown_table(rows), nl=False)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def _wrapped(line: str) -> str:
    """Wrap a line of an explanation at the terminal's width, with later lines below the text after the heading."""
    import textwrap

    from rich.console import Console

    indent = " " * 13 if line.startswith("  ") else "  "
    width = max(Console().width, 40)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
