"""Imports of libraries that warn about their own or torch's deprecated code."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def import_timm() -> ModuleType:
    """Import timm without torch's warning that timm uses `torch.jit`, about which a user of timm can do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"timm\.")
        return importlib.import_module("timm")
