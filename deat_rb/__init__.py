"""Gradient-guided dynamic efficient adversarial training, with torchattacks and RobustBench.

Public names are imported lazily (PEP 562), so that ``import deat_rb`` does not import torch. Importing this
package also installs hooks that let ``import robustbench`` work without the package autoattack
(`deat_rb.utils.import_hooks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.utils import import_hooks
from deat_rb.utils.lazy import attach

if TYPE_CHECKING:
    from deat_rb.attacks.pgd import PGD
    from deat_rb.data.datasets import load_data
    from deat_rb.deployment import deploy
    from deat_rb.evaluation.evaluate import evaluate
    from deat_rb.loading import load_model
    from deat_rb.methods.registry import create, register_method
    from deat_rb.methods.schedules import GradientMagnitude
    from deat_rb.methods.trainers import AttackTrainer
    from deat_rb.models.spec import build_model
    from deat_rb.robustbench.export import export
    from deat_rb.robustbench.register import register
    from deat_rb.runs.train import train
    from deat_rb.sharing import push
    from deat_rb.utils.errors import DeatError

import_hooks.install()

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AttackTrainer",
    "DeatError",
    "GradientMagnitude",
    "__version__",
    "build_model",
    "create",
    "deploy",
    "evaluate",
    "export",
    "load_data",
    "load_model",
    "push",
    "register",
    "register_method",
    "train",
]

_MODULE_OF = {
    "AttackTrainer": "methods.trainers",
    "DeatError": "utils.errors",
    "GradientMagnitude": "methods.schedules",
    "PGD": "attacks.pgd",
    "build_model": "models.spec",
    "create": "methods.registry",
    "deploy": "deployment",
    "evaluate": "evaluation.evaluate",
    "export": "robustbench.export",
    "load_data": "data.datasets",
    "load_model": "loading",
    "push": "sharing",
    "register": "robustbench.register",
    "register_method": "methods.registry",
    "train": "runs.train",
}

if not TYPE_CHECKING:  # a type checker reports unknown names
    __getattr__, __dir__ = attach(__name__, _MODULE_OF)
