"""Versions of Python and of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

DISTRIBUTIONS = ("deat-rb", "torch", "torchvision", "torchattacks", "robustbench", "pyautoattack")


def versions() -> dict[str, str]:
    """Return the version of Python and of each distribution by name, "not installed" for a missing one."""
    by_name = {"python": platform.python_version()}
    for distribution in DISTRIBUTIONS:
        try:
            by_name[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            by_name[distribution] = "not installed"
    return by_name
