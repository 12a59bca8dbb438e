"""Threat models, attack losses, PGD, the input-gradient probe and the evaluation attacks.

Code that generates adversarial examples belongs here; code that trains on them belongs in `deat_rb.training` and
`deat_rb.methods`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.utils.lazy import attach

if TYPE_CHECKING:
    from deat_rb.attacks.base import StatelessAttack
    from deat_rb.attacks.gradient_probe import GradientProbe, lipschitz_lower_bound
    from deat_rb.attacks.pgd import PGD

__all__ = [
    "PGD",
    "GradientProbe",
    "StatelessAttack",
    "lipschitz_lower_bound",
]

_MODULE_OF = {
    "GradientProbe": "gradient_probe",
    "PGD": "pgd",
    "StatelessAttack": "base",
    "lipschitz_lower_bound": "gradient_probe",
}

if not TYPE_CHECKING:  # a type checker reports unknown names
    __getattr__, __dir__ = attach(__name__, _MODULE_OF)
