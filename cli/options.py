"""Option types shared by several commands, and click options generated from option groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import Option

F = TypeVar("F", bound=Callable[..., Any])

ALIASES = {"early_stopping": ["--no-stop"]}
"""Alternative flags that are accepted but not shown in ``--help``."""


class GroupedOption(click.Option):
    """A click option with the heading under which ``--help`` lists it."""

    def __init__(self, *args: Any, group: str = "Output", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A click command whose ``--help`` lists the options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if not isinstance(parameter, click.Option):
                continue
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Output"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def config_options(options: Iterable[Option]) -> Callable[[F], F]:
    """Return a decorator that adds the options of option groups to a command.

    Values are passed to the command as typed by the user, or None if an option is absent; option groups validate them.
    """

    def add(command: F) -> F:
        for each in reversed(list(options)):
            extra = "; ".join([f"default: {each.default}"] * bool(each.default) + [each.bounds] * bool(each.bounds))
            shared: dict[str, Any] = {"help": each.help + (f"  [{extra}]" if extra else ""), "group": each.group,
                                      "cls": GroupedOption, "default": None}  # fmt: skip
            if each.kind in ("flag", "off"):
                shared |= {"is_flag": True, "flag_value": each.kind == "flag"}
            elif each.kind == "switch":
                shared |= {"is_flag": True}
            else:
                kind = click.Choice(each.choices) if each.choices else click.STRING
                shared |= {"type": kind, "metavar": None if each.choices else each.metavar,
                           "multiple": each.kind == "many"}  # fmt: skip
            for alias in ALIASES.get(each.name, ()):
                command = click.option(alias, each.name, **{**shared, "hidden": True})(command)
            command = click.option(each.flag, each.name, **shared)(command)
        return command

    return add


@contextmanager
def _bad_parameter() -> Iterator[None]:
    """Convert a `DeatError` into click's error for an invalid value, which names the option."""
    try:
        yield
    except DeatError as error:
        raise click.BadParameter(str(error)) from None


def fraction_list(text: str) -> tuple[float, ...]:
    """Parse a list of numbers such as ``0,2/255,4/255``, in units of the image range [0, 1]."""
    from deat_rb.utils.units import parse_fraction

    with _bad_parameter():
        return tuple(parse_fraction(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers such as ``0.485,0.456,0.406``."""
    from deat_rb.utils.options import parse_numbers

    with _bad_parameter():
        return parse_numbers(text)


def attack_names(text: str) -> tuple[str, ...]:
    """Split a list such as ``fgsm,torchattacks.PGD(steps=5,alpha=0.01)`` at commas outside parentheses."""
    from deat_rb.attacks.names import split_names

    names = tuple(name for name in split_names(text) if name)
    if not names:
        raise click.BadParameter("the list is empty; give names separated by commas")
    return names


def seed_list(text: str) -> tuple[int, ...]:
    """Parse a list of seeds such as ``0,1,2``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise click.BadParameter(f"'{text}' is not a list of different seeds; give integers such as 0,1,2")
    return tuple(int(part) for part in parts)


def size(text: str) -> int:
    """Return the number of bytes in a size such as ``8G``."""
    from deat_rb.utils.options import parse_size

    with _bad_parameter():
        return parse_size(text)


def json_file(text: str) -> Path:
    """Return the path of a JSON file to write, after checking suffix and folder."""
    path = Path(text)
    if path.suffix != ".json":
        raise click.BadParameter(f"'{text}' does not end in .json; give a file name that does")
    if path.is_dir():
        raise click.BadParameter(f"'{text}' is a folder; give a file")
    if not path.parent.is_dir():
        raise click.BadParameter(f"the folder '{path.parent}' for '{path.name}' does not exist; create it")
    return path


def _use_threads(context: click.Context, parameter: click.Parameter, threads: int | None) -> None:
    from deat_rb.utils.threads import cpu_threads

    context.with_resource(cpu_threads(threads))


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", expose_value=False, callback=_use_threads,
    help="CPU threads, at most one per processor; by default one per processor.",
)  # fmt: skip
"""The option ``--threads`` of commands that do not train; the number applies while the command runs."""
