"""The command ``deat-rb push``."""

from __future__ import annotations

from pathlib import Path

import click

from deat_rb.utils.errors import DeatError


@click.command("push")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("target", metavar="hf:OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--license", "license_name", metavar="NAME",
              help="License of the weights as the Hub spells it, such as mit, apache-2.0 or cc-by-4.0.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Write the files to a folder instead of uploading them.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for --dry-run.  [default: RUN/hub]")  # fmt: skip
def push(run: Path, target: str, private: bool, license_name: str | None, dry_run: bool, output: Path | None) -> None:
    """Upload a run to the Hugging Face Hub.

    Uploads the selected weights (safetensors), config.json, metrics.jsonl, the evaluation and a model card made from
    them. Paths in these files are shortened to file names. Log in first with hf auth login, or set HF_TOKEN.

    Others can then pass hf:OWNER/NAME, or hf:OWNER/NAME@REVISION for a fixed commit, to eval, predict, submit, export,
    train --init-from and deat_rb.load_model.
    """
    from deat_rb.models.names import trust_flag
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.sharing import push

    if output is not None and not dry_run:
        raise DeatError(f"--output {output} is only for --dry-run: omit it")
    folder = (output or run / "hub") if dry_run else None
    pushed = push(run, target, private=private, license=license_name, folder=folder)
    for name, size in pushed.files.items():
        click.echo(f"{name:<26} {size:>12,} bytes")
    for note in pushed.notes:
        click.echo(f"note: {note}")
    click.echo(f"written: {pushed.address}")
    if not dry_run:
        words = [pushed.address, *trust_flag(RunDirectory.open(run).config.model.arch)]
        click.echo(f"next     deat-rb eval {' '.join(words)}")
