"""The methods of the paper's tables and others: recipes, trainers, surrogate losses, step schedules and stopping rules.

Method-specific code belongs here; training code that all methods share belongs in `deat_rb.training`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.utils.lazy import attach

if TYPE_CHECKING:
    from deat_rb.methods.describe import method_table
    from deat_rb.methods.recipes import Recipe
    from deat_rb.methods.registry import create, register_method
    from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
    from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
    from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer

__all__ = [
    "AccuracyThreshold",
    "AttackTrainer",
    "EveryDEpochs",
    "GradientMagnitude",
    "GradientRatio",
    "Recipe",
    "ReplayTrainer",
    "RobustnessDrop",
    "create",
    "method_table",
    "register_method",
]

_MODULE_OF = {
    "AccuracyThreshold": "schedules",
    "AttackTrainer": "trainers",
    "EveryDEpochs": "schedules",
    "GradientMagnitude": "schedules",
    "GradientRatio": "stopping",
    "Recipe": "recipes",
    "ReplayTrainer": "trainers",
    "RobustnessDrop": "stopping",
    "create": "registry",
    "method_table": "describe",
    "register_method": "registry",
}

if not TYPE_CHECKING:  # a type checker reports unknown names
    __getattr__, __dir__ = attach(__name__, _MODULE_OF)
