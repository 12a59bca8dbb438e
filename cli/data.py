"""The command ``deat-rb data``."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from .progress import ImageProgress

if TYPE_CHECKING:
    from deat_rb.data.folder_info import FolderInfo, PartInfo

SHOWN = 10
"""Number of duplicates and problems that are printed of each kind; --json has all."""


@click.group("data")
def data() -> None:
    """Inspect a folder of images, or split it into train and test."""


@data.command("info")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Output as JSON.")
@click.pass_context
def info(ctx: click.Context, /, folder: Path, as_json: bool) -> None:
    """Show what a folder of images contains and what training would skip or refuse.

    FOLDER has train/<class>/* and test/<class>/*, as for train --dataset folder, or <class>/*. All images are decoded.
    The exit status is 1 if training would refuse the folder.
    """
    from deat_rb.data.folder_info import folder_info

    with ImageProgress("decoded") as progress:
        found = folder_info(folder, progress=progress)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print_info(found, folder)
    if found.problems:
        ctx.exit(1)


def _as_json(found: FolderInfo) -> dict[str, Any]:
    parts = {
        name: {**vars(part), "widths": _spread(part.widths), "heights": _spread(part.heights)}
        for name, part in found.parts.items()
    }
    return {**vars(found), "parts": parts}


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def _print_info(found: FolderInfo, folder: Path) -> None:
    from rich.markup import escape

    from deat_rb.data.image_files import describe_left_out
    from deat_rb.utils.text import as_text, counted, new_table, printable

    for name, part in found.parts.items():
        click.echo(f"{name}: {counted(len(part), 'image')} in {counted(len(part.classes), 'class')}, "
                   f"{part.bytes / 1e6:,.1f} MB{_describe(part)}")  # fmt: skip
    if found.note:
        click.echo(f"  {found.note}")
    table = new_table("images per class")
    table.add_column("class", overflow="fold")
    for name in found.parts:
        table.add_column(name, justify="right")
    table.add_column("")
    for label in sorted({label for part in found.parts.values() for label in part.classes}):
        counts = (f"{part.classes.get(label, 0):,}" for part in found.parts.values())
        table.add_row(escape(printable(label)), *counts, "rare" if label in found.rare else "")
    click.echo(as_text(table))
    if skipped := describe_left_out(Counter(found.skipped)):
        click.echo(f"\n{skipped}")
    parts, classes = found.across_parts(), found.across_classes()
    inside = [group for group in found.duplicates if group not in parts and group not in classes]
    for groups, where in ((parts, "in several parts, such as training and test images"),
                          (classes, "in several classes"), (inside, "in one class")):  # fmt: skip
        _print_some([", ".join(path for _, _, path in group) for group in groups],
                    "group", f" of identical images {where}")  # fmt: skip
    _print_some(found.problems, "reason", " why training would refuse the folder")
    if not found.problems and "all" in found.parts:
        click.echo(f"\nsplit it with: deat-rb data split {shlex.quote(str(folder))}")


def _describe(part: PartInfo) -> str:
    if not part.widths:
        return ""
    width, height = _range(part.widths), _range(part.heights)
    counts = [f"{kind} {count:,}" for kind, count in (*part.formats.most_common(), *part.modes.most_common())]
    counts += [f"{count:,} {what}" for count, what in ((part.turned, "rotated by EXIF"),
                                                      (part.transparent, "with transparency")) if count]  # fmt: skip
    return f"\n  width {width}, height {height} pixels\n  {', '.join(counts)}"


def _range(values: Sequence[int]) -> str:
    if min(values) == max(values):
        return str(values[0])
    return f"{min(values)} to {max(values)} (median {median(values):g})"


def _print_some(lines: Sequence[str], noun: str, what: str) -> None:
    from deat_rb.utils.text import counted, printable

    if not lines:
        return
    click.echo(f"\n{counted(len(lines), noun)}{what}:")
    for line in lines[:SHOWN]:
        click.echo(f"  {printable(line, 4000)}")
    if len(lines) > SHOWN:
        click.echo(f"  ... and {len(lines) - SHOWN:,} more (all with --json)")


@data.command("split")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--test", type=float, default=0.2, show_default=True, metavar="SHARE", help="Share of test images.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the split.")
@click.option("--by-group", metavar="PATTERN",
              help="Keep images together whose paths have the same first group of this regular expression, such as "
              "'(patient\\d+)'.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR",
              help="New folder with train and test.  [default: FOLDER-split]")  # fmt: skip
@click.option("--copy", is_flag=True, help="Copy the files; by default, symbolic links are created.")
def split(folder: Path, test: float, seed: int, by_group: str | None, output: Path | None, copy: bool) -> None:
    """Split FOLDER/<class>/* into train/<class>/* and test/<class>/* of a new folder.

    The split is stratified by class. Images with identical pixels are put into the same part. The original files are
    neither moved nor changed.
    """
    from rich.markup import escape

    from deat_rb.data.folder_split import split_folder
    from deat_rb.data.image_files import describe_left_out
    from deat_rb.utils.text import as_text, counted, new_table, printable

    with ImageProgress("decoded") as progress:
        done = split_folder(folder, output, test=test, seed=seed, by_group=by_group, copy=copy, progress=progress)
    table = new_table("images per class")
    table.add_column("class", overflow="fold")
    for name in ("train", "test"):
        table.add_column(name, justify="right")
    for label, (train, tested) in done.counts.items():
        table.add_row(escape(printable(label)), f"{train:,}", f"{tested:,}")
    totals = [sum(numbers) for numbers in zip(*done.counts.values(), strict=True)]
    table.add_row("all", *(f"{total:,}" for total in totals))
    click.echo(as_text(table))
    if skipped := describe_left_out(done.left_out):
        click.echo(skipped)
    kept = f"; {counted(done.identical, 'image')} with identical ones, kept in the same part" if done.identical else ""
    grouped = f"; {counted(done.groups, 'group')}" if by_group else ""
    click.echo(f"{done.output}: {100 * totals[1] / sum(totals):.1f} % test images{grouped}{kept}")
    click.echo(f"train with: deat-rb train --dataset folder --data-dir {shlex.quote(str(done.output))}")
