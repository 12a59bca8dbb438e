"""The versions of Python and of the packages that a result may depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for distribution in ("deat-rb", "torch", "torchvision", "torchattacks", "robustbench"):
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for distribution in ("deat-rb", "torch", "torchattacks", "pyautoattack"):
        name = distribution.replace("-", "_")
        versions[name] = "not installed"
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(distribution)
    return versions
