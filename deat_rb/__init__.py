"""Gradient-guided dynamic efficient adversarial training, beside torchattacks and RobustBench.

Importing this package costs next to nothing: torch and what rests on it are imported when a name is first used
(PEP 562).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deat_rb.attacks import PGD, QuietAttack
    from deat_rb.catalogue import method_table
    from deat_rb.data import load_data
    from deat_rb.errors import DeatError
    from deat_rb.evaluation.evaluate import evaluate
    from deat_rb.evaluation.subject import load_model
    from deat_rb.export import export, register
    from deat_rb.methods import Recipe, create, register_method
    from deat_rb.models import ModelSpec, build_model
    from deat_rb.probe import GradientProbe, lipschitz_lower_bound
    from deat_rb.schedules import AccuracyThreshold, Constant, EveryDEpochs, GradientMagnitude
    from deat_rb.stopping import GradientRatio, RobustnessDrop
    from deat_rb.trainers import AttackTrainer, ReplayTrainer
    from deat_rb.training import train

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AccuracyThreshold",
    "AttackTrainer",
    "Constant",
    "DeatError",
    "EveryDEpochs",
    "GradientMagnitude",
    "GradientProbe",
    "GradientRatio",
    "ModelSpec",
    "QuietAttack",
    "Recipe",
    "ReplayTrainer",
    "RobustnessDrop",
    "__version__",
    "build_model",
    "create",
    "evaluate",
    "export",
    "lipschitz_lower_bound",
    "load_data",
    "load_model",
    "method_table",
    "register",
    "register_method",
    "train",
]

_MODULE_OF = {
    "PGD": "attacks",
    "AccuracyThreshold": "schedules",
    "AttackTrainer": "trainers",
    "Constant": "schedules",
    "DeatError": "errors",
    "EveryDEpochs": "schedules",
    "GradientMagnitude": "schedules",
    "GradientProbe": "probe",
    "GradientRatio": "stopping",
    "ModelSpec": "models",
    "QuietAttack": "attacks",
    "Recipe": "methods",
    "ReplayTrainer": "trainers",
    "RobustnessDrop": "stopping",
    "build_model": "models",
    "create": "methods",
    "evaluate": "evaluation.evaluate",
    "export": "export",
    "lipschitz_lower_bound": "probe",
    "load_data": "data",
    "load_model": "evaluation.subject",
    "method_table": "catalogue",
    "register": "export",
    "register_method": "methods",
    "train": "training",
}


if not TYPE_CHECKING:  # a type checker is to find an unknown name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `deat_rb.export` the function, although importing the module of that name would bind the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
