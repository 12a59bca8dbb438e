"""Training infrastructure: trainer base class, epoch loop, callbacks, engine, learning rates, checkpoints, validation.

Code shared by all methods belongs here, method-specific code in `deat_rb.methods`, and run files in `deat_rb.runs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.utils.lazy import attach

if TYPE_CHECKING:
    from deat_rb.training.callbacks import Callback
    from deat_rb.training.history import History
    from deat_rb.training.schedule import Constant, Schedule
    from deat_rb.training.stopping_rule import Stop, StoppingRule
    from deat_rb.training.surrogate_loss import SurrogateLoss
    from deat_rb.training.trainer import Trainer

__all__ = [
    "Callback",
    "Constant",
    "History",
    "Schedule",
    "Stop",
    "StoppingRule",
    "SurrogateLoss",
    "Trainer",
]

_MODULE_OF = {
    "Callback": "callbacks",
    "Constant": "schedule",
    "History": "history",
    "Schedule": "schedule",
    "Stop": "stopping_rule",
    "StoppingRule": "stopping_rule",
    "SurrogateLoss": "surrogate_loss",
    "Trainer": "trainer",
}

if not TYPE_CHECKING:  # a type checker reports unknown names
    __getattr__, __dir__ = attach(__name__, _MODULE_OF)
