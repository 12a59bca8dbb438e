"""Versions of Python and of the packages that affect results."""

from __future__ import annotations

import platform
from importlib import metadata

DISTRIBUTIONS = ("deat-rb", "torch", "torchvision", "torchattacks", "robustbench", "pyautoattack")


def versions() -> dict[str, str]:
    """Return the versions of Python and of each distribution by name; "not installed" for missing ones."""
    by_name = {"python": platform.python_version()}
    for distribution in DISTRIBUTIONS:
        try:
            by_name[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            by_name[distribution] = "not installed"
    return by_name
