"""The one exception that bad input of any kind raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeatError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the thing, its value and what to do. The command line prints it as it
    is and exits with status 2; nothing has been written by then.
    """


class UnwritableError(DeatError):
    """A file cannot be written: the disk is full, the folder is gone or read-only. What was there before is kept."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Completes an error message about an unknown name.

    Args:
        name: What was asked for.
        known: The names that exist.

    Returns:
        "did you mean 'a' or 'b'?" where something is near, else the list of all names.
    """
    names = list(known)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{n}'" for n in close) + "?"
    return "known are " + ", ".join(names)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what it left behind.

    Attributes:
        kept: A sentence for the user: what is on the disk and how to go on from it; empty where nothing was kept.
    """

    def __init__(self, kept: str = "") -> None:
        """See the attributes."""
        super().__init__(kept)
        self.kept = kept
