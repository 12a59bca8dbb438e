"""Exceptions for invalid input and for interruption."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeatError(ValueError):
    """Invalid input.

    The message is one sentence that names the option or object, its value and what to do. The command line prints it
    and exits with status 2, before anything is written.
    """


class UnwritableError(DeatError):
    """A file cannot be written: the disk is full, the folder missing or read-only. The previous file is kept."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message about an unknown name.

    Args:
        name: The unknown name.
        known: The names that exist.

    Returns:
        "did you mean 'a' or 'b'?" if there are similar names, else the list of all names.
    """
    names = list(known)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{n}'" for n in close) + "?"
    return "known are " + ", ".join(names)


class Interrupted(KeyboardInterrupt):
    """An interruption by Ctrl-C, with what was saved.

    Attributes:
        kept: A sentence for the user: what was saved and how to continue from it; empty if nothing was saved.
    """

    def __init__(self, kept: str = "") -> None:
        """See the attributes."""
        super().__init__(kept)
        self.kept = kept
