"""The command ``deat-rb export``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from deat_rb.utils.errors import DeatError

from .network_options import NETWORK, description, import_from_current_folder, network_options
from .options import GroupedCommand, GroupedOption

ROBUSTBENCH = "Only with --format robustbench"
"""Heading of the options in ``--help``."""

robustbench_option = partial(click.option, cls=GroupedOption, group=ROBUSTBENCH)


@click.command("export", cls=GroupedCommand)
@click.argument("target", metavar="RUN|CHECKPOINT|NAME")
@click.option("--format", "file_format", type=click.Choice(["robustbench", "onnx", "torch-export"]),
              default="robustbench", show_default=True, help="Format of the files.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), default=".", show_default=True, metavar="PATH",
              help="Folder for the files; for onnx and torch-export also a file name.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing export of the same name.")
@network_options
@robustbench_option("--model-name", metavar="NAME",
                    help="Name <FirstAuthor><Year><FirstWordOfTitle>, such as Wang2021Gradient_R18; required."
                    )  # fmt: skip
@robustbench_option(
    "--as-dataset", metavar="NAME", help="Export other data as this RobustBench dataset: cifar10 or cifar100."
)
@robustbench_option(
    "--link", metavar="URL", help="URL of the paper.  [default: the DEAT paper for its methods, if no detail is given]"
)
@robustbench_option("--name", metavar="TITLE", help="Title of the paper.")
@robustbench_option("--authors", metavar="A, B, ...", help="Authors of the paper.")
@robustbench_option("--venue", metavar="VENUE", help="Venue and year of the paper.")
@robustbench_option("--additional-data/--no-additional-data", default=None,
                    help="Whether other training images were used; by default derived from the run.")  # fmt: skip
@robustbench_option("--reported", type=float, metavar="PERCENT",
                    help="Robust accuracy reported by the authors; by default the lowest measured.")  # fmt: skip
@robustbench_option(
    "--external", type=float, metavar="PERCENT", help="Best known robust accuracy; RobustBench ranks by it."
)
@robustbench_option("--unreliable/--reliable", default=None,
                    help="Whether AutoAttack's accuracy is unreliable; by default derived from the evaluation's checks."
                    )  # fmt: skip
@robustbench_option("--footnote", metavar="TEXT", help="Text appended to the automatic footnote.")
@click.pass_context
def export(ctx: click.Context, /, target: str, file_format: str, output: Path, overwrite: bool, **options: Any) -> None:
    """Export a network for RobustBench, ONNX or torch.export.

    robustbench: writes the weights to models/, the metadata for RobustBench's table to model_info/, and the source code
    for a pull request to RobustBench to pull_request/. Accuracies are taken from `deat-rb eval RUN --autoattack`.

    onnx, torch-export: writes one file RUN.onnx or RUN.pt2, which takes batches of any size of images in [0, 1]; it
    includes the normalization, and its metadata the class names and the origin. Its logits are compared with the
    network's before it is written. Leaderboard entries, checkpoints described with --arch, and networks given by name,
    as for eval, can be exported, too.
    """
    groups = {each.name: getattr(each, "group", "") for each in ctx.command.params}
    network = {name: value for name, value in options.items() if groups[name] == NETWORK}
    metadata = {name: value for name, value in options.items() if groups[name] == ROBUSTBENCH and value is not None}
    if file_format == "robustbench":
        if "model_name" not in metadata:
            raise DeatError("--model-name is missing: RobustBench needs a name such as Wang2021Gradient_R18")
        other = next((name for name, value in network.items() if value), None)
        if other is not None:
            raise DeatError(f"--{other.replace('_', '-')} is only for --format onnx and torch-export: omit it")
        _robustbench(target, output=output, overwrite=overwrite, **metadata)
        return
    other = next(iter(metadata), None)
    if other is not None:
        raise DeatError(f"--{other.replace('_', '-')} is only for --format robustbench, not for {file_format}: omit it")
    _deploy(target, format=file_format, output=output, overwrite=overwrite, **description(**network))


def _robustbench(run: str, **options: Any) -> None:
    from deat_rb.robustbench.export import UNKNOWN_ACCURACY, evaluation_advice, export

    paths = export(run, **options)
    for note in paths.notes:
        click.echo(f"note: {note}", err=True)
    for path in (paths.weights, paths.info, paths.source):
        click.echo(f"written: {path}")
    if paths.unknown:
        click.echo(
            f"note: AutoAttack was not run, so {', '.join(paths.unknown)} is written as {UNKNOWN_ACCURACY}, which "
            f"ranks last on RobustBench: {evaluation_advice(run)}"
        )


def _deploy(target: str, **options: Any) -> None:
    from deat_rb.deployment import CHECKED_BATCHES, deploy
    from deat_rb.utils.text import printable

    import_from_current_folder(target)
    deployed = deploy(target, **options)
    for note in deployed.notes:
        click.echo(f"note: {note}", err=True)
    by = "onnxruntime" if options["format"] == "onnx" else "torch.export.load"
    classes = printable(", ".join(deployed.classes), 200) if deployed.classes else "unknown"
    click.echo(f"classes    {classes}")
    click.echo(f"check      logits from {by} differ by at most {deployed.difference:.1e} (largest logit "
               f"{deployed.largest_logit:.3g}; batches of {', '.join(map(str, CHECKED_BATCHES))} random images)"
               )  # fmt: skip
    click.echo(f"written: {deployed.path}")
