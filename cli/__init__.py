"""The command ``deat-rb``.

The module of a subcommand is imported only when it runs, so that ``--help`` does not have to import torch. Exceptions
are converted to exit statuses here only: 2 for errors that the user can correct, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
from importlib import import_module

import click

from deat_rb import __version__
from deat_rb.utils.errors import DeatError, Interrupted, did_you_mean
from deat_rb.utils.threads import share_cpu

COMMANDS = {
    "train": ("train", "Train a network with one of the methods."),
    "eval": ("evaluate", "Attack a trained network and report its robust accuracy."),
    "compare": ("compare", "Compare evaluations and test their differences for significance."),
    "data": ("data", "Inspect a folder of images, or split it into train and test."),
    "reproduce": ("reproduce", "Reproduce the paper's tables and figures."),
    "sweep": ("sweep", "Train and evaluate all runs of a study."),
    "predict": ("predict", "Classify images with a trained network."),
    "export": ("export", "Export a network for RobustBench, ONNX or torch.export."),
    "push": ("push", "Upload a run to the Hugging Face Hub."),
    "submit": ("submit", "Submit a trained network to a leaderboard."),
    "leaderboard": ("leaderboard", "Show, build, verify or export a leaderboard."),
    "methods": ("methods", "List the methods, or describe one."),
}

_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "it is a symbolic link that refers to itself; give the actual file",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
}
"""Messages for operating system errors that the user can correct."""


class _UserError(click.ClickException):
    """Error printed as ``Error: <sentence>`` on stderr, with control characters (as in file names) escaped."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        from deat_rb.utils.text import printable

        super().__init__(printable(message, 4000))


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        share_cpu()  # before the command's module imports torch
        module = COMMANDS[cmd_name][0]
        command = getattr(import_module(f"{__name__}.{module}"), module)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise DeatError(f"unknown command '{args[0]}': {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except DeatError as error:
            raise _UserError(str(error)) from None
        except KeyboardInterrupt as interrupt:
            saved = interrupt.kept if isinstance(interrupt, Interrupted) else ""
            click.echo(f"Interrupted: {saved or 'nothing was saved'}", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno not in _SYSTEM_ERRORS:
                raise
            file = f"'{error.filename}'" if error.filename else "a file"
            raise _UserError(f"cannot use {file}: {_SYSTEM_ERRORS[error.errno]}") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deat-rb")
def main() -> None:
    """Adversarial training with gradient-guided methods, and robustness evaluation.

    Images are in [0, 1]; --eps and --alpha use the same unit and may be given as fractions such as 8/255.
    """
