"""The command ``deat-rb``.

A command's module is imported when that command runs, so that ``--help`` does not wait for torch. Here, and nowhere
else, an error becomes an exit status: 2 for what the user can put right, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
from importlib import import_module

import click

from deat_rb import __version__
from deat_rb.utils.errors import DeatError, Interrupted, did_you_mean

COMMANDS = {
    "train": ("train", "Train a network by one of the methods."),
    "eval": ("evaluate", "Attack a trained network and report its robust accuracy."),
    "compare": ("compare", "Compare evaluations and test whether they differ."),
    "predict": ("predict", "Classify images with a trained network."),
    "export": ("export", "Export a run in RobustBench's format."),
    "submit": ("submit", "Submit a trained network to a leaderboard."),
    "leaderboard": ("leaderboard", "Show a leaderboard, build its pages, verify it or export it."),
    "methods": ("methods", "List the methods, or explain one."),
}

_SYSTEM_REFUSALS = {
    errno.ENOSPC: "the disk that holds it is full; free some space or choose another folder",
    errno.EDQUOT: "your quota of the disk that holds it is used up; free some space or choose another folder",
    errno.EROFS: "it lies on a read-only file system; choose another folder",
    errno.ENAMETOOLONG: "no file can have so long a name; give another",
    errno.ELOOP: "it is a link that leads in a circle; give the file itself",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
}


def _shown(message: str) -> str:
    """A message in which the names of files and the like cannot move the cursor or hide anything."""
    from deat_rb.utils.text import printable

    return printable(message, 4000)


class _Refusal(click.ClickException):
    """Printed as ``Error: <sentence>`` on stderr."""

    exit_code = 2


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = COMMANDS[cmd_name][0]
        command = getattr(import_module(f"{__name__}.{module}"), module)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise DeatError(f"there is no command '{args[0]}': {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except DeatError as error:
            raise _Refusal(_shown(str(error))) from None
        except KeyboardInterrupt as interrupt:
            kept = interrupt.kept if isinstance(interrupt, Interrupted) else ""
            click.echo(f"Interrupted: {kept or 'nothing was kept'}", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno not in _SYSTEM_REFUSALS:
                raise
            what = f"'{error.filename}'" if error.filename else "a file"
            raise _Refusal(_shown(f"cannot use {what}: {_SYSTEM_REFUSALS[error.errno]}")) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deat-rb")
def main() -> None:
    """Train robust networks by gradient-guided dynamic efficient adversarial training.

    Sizes such as --eps are in units of the image range [0, 1] and may be written 8/255.
    """
