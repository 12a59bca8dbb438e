"""Configuration of a run: its options with all defaults resolved, and what they were resolved to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from deat_rb.models.spec import ModelSpec
from deat_rb.runs.options import MAY_CHANGE, TrainOptions
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import validate


class RunConfig(TrainOptions):
    """Everything that determines a run; ``config.json`` of a run directory.

    Attributes:
        network: The network.
        classes: Class names, in the order of the network's outputs.
        data_fingerprint: SHA-256 of the dataset.
        versions: Of the packages that the run started with.
    """

    network: ModelSpec
    classes: tuple[str, ...] = ()
    data_fingerprint: str
    versions: dict[str, str]

    def but(self, **changes: Any) -> RunConfig:
        """Return the same configuration with some options changed.

        Raises:
            DeatError: A value is not admissible.
        """
        return validate(RunConfig, {**self.flat(), **self._facts(), **changes})

    def extended(self, epochs: int) -> RunConfig:
        """Return the same configuration for more epochs; the learning rate keeps its milestones.

        Raises:
            DeatError: There are fewer epochs, or the learning rate is cyclic.
        """
        optim = self.optim
        if epochs < optim.epochs:
            raise DeatError(f"--epochs = {epochs} is less than the run's {optim.epochs}; start a new run for it")
        if epochs > optim.epochs and optim.lr_schedule == "cyclic":
            raise DeatError(
                f"--epochs = {epochs} differs from the run's {optim.epochs}, and a cyclic learning rate, which has "
                "reached 0 by then, cannot be extended; start a new run for it"
            )
        if epochs == optim.epochs or optim.lr_schedule == "flat":
            return self.but(epochs=epochs)
        return self.but(epochs=epochs, lr_epochs=optim.lr_epochs or optim.epochs)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Return the names of what differs from the configuration that has been trained and may not differ.

        Args:
            before: That configuration as JSON values, of fewer epochs perhaps.

        Raises:
            DeatError: It is no configuration.
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
