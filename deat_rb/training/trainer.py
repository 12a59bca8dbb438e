"""The base class of all trainers: `TrainerBase` with `fit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deat_rb.training.base import Batch, TrainerBase
from deat_rb.training.fit import fit
from deat_rb.training.history import History


class Trainer(TrainerBase):
    """Adversarial training method with `fit`; see `deat_rb.training.base.TrainerBase`."""

    def fit(self, train_loader: Iterable[Batch], val_loader: Iterable[Batch] | None = None, **options: Any) -> History:
        """Train the model; see `deat_rb.training.fit.fit` for the options and the result."""
        return fit(self, train_loader, val_loader, **options)
