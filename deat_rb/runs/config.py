"""Configuration of a run: its options with all defaults filled in, and the values derived from them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from deat_rb.models.spec import ModelSpec
from deat_rb.runs.options import MAY_CHANGE, TrainOptions
from deat_rb.training.lr import OPEN_ENDED
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN, format_epochs, validate


class RunConfig(TrainOptions):
    """Everything that determines a run, stored as ``config.json`` in the run directory.

    Attributes:
        network: Specification of the network.
        classes: Class names, in the order of the network's outputs.
        data_fingerprint: SHA-256 of the dataset.
        extra_fingerprint: SHA-256 of the extra images and labels, if there are any.
        init_sha256: SHA-256 of the initial weights; None for random ones, and for runs of earlier versions.
        train_images: Number of training images; None for runs of earlier versions.
        val_images: Number of validation images; None for runs of earlier versions.
        versions: Versions of the packages at the start of the run.
    """

    network: ModelSpec
    classes: tuple[str, ...] = ()
    data_fingerprint: str
    extra_fingerprint: str | None = None
    init_sha256: str | None = None
    train_images: int | None = None
    val_images: int | None = None
    versions: dict[str, str]

    @property
    def additional_data(self) -> bool | None:
        """Whether other training images were used; None if unknown, since a checkpoint was the start."""
        if self.data.extra_data is not None or self.model.pretrained:
            return True
        return None if self.model.init_from is not None else False

    def but(self, **changes: Any) -> RunConfig:
        """Return the same configuration with some options changed.

        Raises:
            DeatError: A value is invalid.
        """
        return validate(RunConfig, {**self.flat(), **self._facts(), **changes})

    def extended(self, epochs: int) -> RunConfig:
        """Return the same configuration with more epochs; the milestones of the learning rate do not change.

        Raises:
            DeatError: ``epochs`` is less than before, or is increased although the learning rate ends at 0.
        """
        optim = self.optim
        if epochs < optim.epochs == OPEN:
            raise DeatError(
                f"--epochs = {epochs} cannot limit a run with --epochs open, whose averaged weights are a result after "
                "every epoch: resume it without --epochs and press Ctrl-C when it has trained enough"
            )
        if epochs < optim.epochs:
            raise DeatError(
                f"--epochs = {epochs} is less than the run's {format_epochs(optim.epochs)}; start a new run"
            )
        if epochs > optim.epochs and optim.lr_schedule not in OPEN_ENDED:
            raise DeatError(
                f"--epochs = {format_epochs(epochs)} differs from the run's {optim.epochs}, and a run with a "
                f"{optim.lr_schedule} learning rate, which ends at 0, cannot be extended; start a new run"
            )
        if epochs == optim.epochs or optim.lr_schedule == "flat":
            return self.but(epochs=epochs)
        return self.but(epochs=epochs, lr_epochs=optim.lr_epochs or optim.epochs)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Return the names of the options that must not change but differ from those of the run so far.

        Args:
            before: The run's earlier configuration as JSON values, possibly with fewer epochs.

        Raises:
            DeatError: ``before`` is not a valid configuration.
        """
        was = validate(RunConfig, before)
        now, then = self._decisive(), was._decisive()
        differing = [name for name in now if then[name] != now[name]]
        if "epochs" in differing:
            with contextlib.suppress(DeatError):
                if was.extended(self.optim.epochs).optim.lr_epochs == self.optim.lr_epochs:
                    differing = [name for name in differing if name not in ("epochs", "lr_epochs")]
        return differing

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in RunConfig.model_fields if name not in TrainOptions.model_fields}

    def _decisive(self) -> dict[str, Any]:
        values = {**self.flat(), **self._facts()}
        return {name: value for name, value in values.items() if name not in (*MAY_CHANGE, "versions")}
