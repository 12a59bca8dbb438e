"""``deat-rb methods``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

WIDTH = 400
"""Of the table where no terminal limits it: a method then has a line of its own."""


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or explain one.

    NAME is read as the paper writes it, in any case: m+trades, DEAT-40%, FREE-8.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from deat_rb.methods.describe import describe, explain, method_table

    if name is not None:
        text = explain(name)
        click.echo(json.dumps({**asdict(describe(name)), "explanation": text}, indent=2) if as_json else text)
        return
    rows = [asdict(row) for row in method_table(lambda complaint: click.echo(f"Warning: {complaint}", err=True))]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
