"""The command ``deat-rb reproduce``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deat_rb.utils.errors import DeatError

from .network_options import import_from_current_folder
from .options import seed_list
from .study_options import WorkOptions, study_options, work

if TYPE_CHECKING:
    from deat_rb.reproduction.experiments import Setup
    from deat_rb.reproduction.folder import StudyFolder


@click.command("reproduce")
@click.argument("targets", metavar="TARGET...", nargs=-1)
@click.option("--list", "list_targets", is_flag=True,
              help="Describe the scales and all targets, or the given ones, and exit.")  # fmt: skip
@click.option("--scale", default="digits", show_default=True, metavar="[digits|small|paper]",
              help="Data, networks and epochs: minutes, hours or days.")  # fmt: skip
@click.option("--seeds", type=seed_list, metavar="0,1,2", help="Seeds.  [default: the scale's]")
@click.option("--dataset", metavar="NAME",
              help="Dataset instead of the one set by --scale: cifar10, cifar100, digits or folder.")  # fmt: skip
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the dataset.")
@click.option("--arch", metavar="NAME", help="Architecture in place of the scale's.")
@click.option("--n-examples", type=click.IntRange(min=1), metavar="N",
              help="Number of test images to evaluate.  [default: the scale's]")  # fmt: skip
@click.option("--train-size", type=click.IntRange(min=1), metavar="N",
              help="Number of training images.  [default: the scale's]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Batch size.  [default: the scale's]")
@click.option("--curve-test", type=click.IntRange(min=1), metavar="N",
              help="Number of test images of Figure 7's curves.  [default: the scale's]")  # fmt: skip
@click.option("--autoattack", type=click.IntRange(min=0), metavar="N",
              help="Also run AutoAttack on the first N test images of each table's runs; 0 for all.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), default="reproduction", show_default=True, metavar="PATH",
              help="Folder of the runs, tables, figures and the page.")  # fmt: skip
@study_options
def reproduce(
    targets: tuple[str, ...],
    list_targets: bool,
    scale: str,
    seeds: tuple[int, ...] | None,
    dataset: str | None,
    data_dir: Path | None,
    arch: str | None,
    n_examples: int | None,
    train_size: int | None,
    batch_size: int | None,
    curve_test: int | None,
    autoattack: int | None,
    output: Path,
    **options: Any,
) -> None:
    """Reproduce the paper's tables and figures.

    They are shown next to the paper's values. TARGET is table1 to table7, figure2 to figure8, or all. A run that
    several targets need is trained once. Runs are shared among processes, resumed and skipped as by deat-rb sweep.
    --output holds the tables and figures, and index.html with all of them.
    """
    from deat_rb.reproduction.experiments import Setup, chosen_targets
    from deat_rb.reproduction.folder import StudyFolder
    from deat_rb.reproduction.reproduce import check_setup, record_targets, study_of

    if list_targets:
        _list(chosen_targets(targets) if targets else ())
        return
    if not targets:
        raise DeatError("no target is given: name table1 to table7, figure2 to figure8 or all; --list describes them")
    chosen = chosen_targets(targets)
    import_from_current_folder(arch or "")
    setup = Setup(scale, seeds or (), dataset, None if data_dir is None else str(data_dir), arch, autoattack,
                  n_examples, train_size, batch_size, curve_test)  # fmt: skip
    study = study_of(chosen, setup)
    folder = StudyFolder(output)
    check_setup(folder, setup)
    given = _given(scale=scale, seeds=seeds, dataset=dataset, data_dir=data_dir, arch=arch, n_examples=n_examples,
                   train_size=train_size, batch_size=batch_size, curve_test=curve_test, autoattack=autoattack,
                   output=output)  # fmt: skip
    arguments = ["reproduce", *targets, *given]

    def write() -> None:
        _write(record_targets(folder, setup, chosen), chosen, folder)

    work(study, folder, WorkOptions(**options), arguments, write)


def _given(**values: Any) -> list[str]:
    words = []
    for name, value in values.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def _write(setups: dict[str, Setup], chosen: list[str], folder: StudyFolder) -> None:
    """Write the files of all targets of the folder, each with its own setup, and print the requested ones."""
    from rich.console import Console

    from deat_rb.reproduction.page import render_index
    from deat_rb.reproduction.reproduce import outcome, write_outcome
    from deat_rb.reproduction.tables import as_rich, unfinished_lines
    from deat_rb.utils.files import atomic_write

    console = Console()
    outcomes = [outcome(name, own, folder) for name, own in setups.items()]
    for each in outcomes:
        write_outcome(each, folder.path)
        if each.name not in chosen:
            continue
        if each.is_figure:
            click.echo(
                f"{each.title}: {folder.path / f'{each.name}.png' if each.pictures else 'no run is trained yet'}"
            )
        else:
            console.print(as_rich(each.table))
        if each.differences:
            click.echo(each.differences)
        for line in unfinished_lines(each.table):
            click.echo(line)
        for verdict in each.verdicts:
            click.echo(f"{verdict.outcome}: {verdict.text} ({verdict.detail})")
        click.echo("")
    atomic_write(folder.path / "index.html", render_index(outcomes, setups[chosen[0]], folder.path))
    click.echo(f"written: {folder.path / 'index.html'} and the files of {shlex.join(setups)}")


def _list(chosen: Sequence[str]) -> None:
    from deat_rb.reproduction.experiments import experiments
    from deat_rb.utils.text import counted

    found = experiments()
    for name, target in found.targets.items():
        if chosen and name not in chosen:
            continue
        rows = sum(len(part.methods) * max(len(part.alpha), 1) * max(len(part.gamma), 1) for part in target.parts)
        click.echo(f"{name:<8} {target.title} ({counted(rows, 'row')})")
    click.echo()
    for name, scale in found.scales.items():
        click.echo(f"--scale {name:<7} {scale.title}, {counted(len(scale.seeds), 'seed')}")
