"""Import hooks installed by ``import deat_rb``: ``autoattack`` for robustbench, and ``deat_rb.cli`` in a checkout.

Each handles a single name, only if no installed package provides it, and costs nothing until that name is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKOUT = Path(__file__).parents[2]


class CommandFinder:
    """Finds ``deat_rb.cli`` in a checkout of the repository, where it is the folder ``cli/`` next to ``deat_rb/``.

    An installed deat_rb contains the module ``deat_rb.cli``, so the finder is not used. In the folder of a checkout,
    ``python -m deat_rb`` imports the checkout's ``deat_rb``, which does not contain it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of ``deat_rb.cli``; None for other names or outside a checkout."""
        file = CHECKOUT / "cli" / "__init__.py"
        if name != "deat_rb.cli" or not file.is_file():
            return None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])


class AutoAttackFinder:
    """Provides the module ``autoattack``, which robustbench imports, with `deat_rb.utils.compat.AutoAttack`.

    The original package takes precedence if it is installed; a folder ``autoattack/`` without ``__init__.py``, which
    Python would import as a namespace package, does not.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of our ``autoattack``; None for other names or if the original package is installed."""
        loader: Any = self
        return ModuleSpec(name, loader) if name == "autoattack" and not self.find_upstream() else None

    def find_upstream(self) -> ModuleSpec | None:
        """Return the spec of an installed ``autoattack``; None if there is none or it is a namespace package."""
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find("autoattack", None) if find and not isinstance(finder, type(self)) else None
            if spec is not None:
                return spec if spec.origin is not None else None
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python create the module."""

    def exec_module(self, module: Any) -> None:
        """Define the names that robustbench imports from the module."""
        from deat_rb.utils.compat import AutoAttack

        module.AutoAttack = AutoAttack
        module.state = sys.modules["autoattack.state"] = importlib.import_module("pyautoattack.state")


def install() -> None:
    """Add the finders to ``sys.meta_path``, once."""
    if not any(isinstance(finder, AutoAttackFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoAttackFinder())
        sys.meta_path.append(CommandFinder())
