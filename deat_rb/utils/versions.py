"""Versions of Python and of the packages that affect results."""

from __future__ import annotations

import platform
from importlib import metadata

DISTRIBUTIONS = ("deat-rb", "torch", "torchvision", "timm", "torchattacks", "robustbench", "pyautoattack")


def version(distribution: str) -> str:
    """Return the version of a distribution; "not installed" if it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python and of each distribution by name; "not installed" for missing ones."""
    return {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}}
