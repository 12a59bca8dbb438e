"""Exceptions for invalid input and for interruption."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeatError(ValueError):
    """Invalid input.

    The message is one sentence that names the option or object and its value, and says what to do. The command line
    prints it and exits with status 2.
    """


class UnwritableError(DeatError):
    """A file cannot be written: the disk is full, or the folder is missing or read-only. The old file is kept."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None, *, prefix: str = "") -> str:
    """Return a hint for an error message about an unknown name.

    Args:
        name: The unknown name.
        known: The valid names.
        otherwise: Hint if no name is similar; by default "choose one of" and all names.
        prefix: Prefix of each name in the hint, such as ``--``; names are compared without it.

    Returns:
        "did you mean 'a' or 'b'?" if there are similar names, else ``otherwise``.
    """
    names = list(known)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{prefix}{n}'" for n in close) + "?"
    return "choose one of " + ", ".join(prefix + n for n in names) if otherwise is None else otherwise


class Interrupted(KeyboardInterrupt):
    """KeyboardInterrupt with a message about what was saved.

    Attributes:
        kept: Message for the user about what was saved and how to resume; empty if nothing was saved.
    """

    def __init__(self, kept: str = "") -> None:
        """Store ``kept``."""
        super().__init__(kept)
        self.kept = kept
