"""What decides a run: the options a user gives, the paper's settings, and the configuration they resolve to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deat_rb.models.spec import ModelSpec
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json

Setting = Literal["fast", "standard"]

LrSchedule = Literal["cyclic", "multistep", "flat"]

Select = Literal["best", "last"]

MAY_DIFFER = ("data_dir", "device", "on_nonfinite", "conduct", "versions")
"""Of a configuration, what a run that goes on may have otherwise than before."""

METHOD_OPTIONS = ("alpha", "steps", "max_steps", "gamma", "beta", "tau", "attack_mode", "lr_per_replay")


class TrainOptions(BaseModel):
    """What `deat-rb train` is asked for. None means: as the method, the setting and the data set have it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    dataset: str = "digits"
    data_dir: str | None = None
    image_size: int | None = Field(None, ge=1)
    train_size: int | None = Field(None, ge=1)
    val_size: int | None = Field(None, ge=1)
    arch: str | None = None
    init_from: str | None = None
    setting: Setting = "fast"
    epochs: int | None = Field(None, ge=1)
    lr_epochs: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    lr_schedule: LrSchedule | None = None
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    batch_size: int | None = Field(None, ge=2)
    eps: float | None = None
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    steps: int | None = Field(None, ge=0)
    max_steps: int | None = Field(None, ge=1)
    gamma: float | None = Field(None, gt=0, allow_inf_nan=False)
    beta: float | None = Field(None, ge=0, allow_inf_nan=False)
    tau: int | None = Field(None, ge=0)
    attack_mode: Literal["train", "eval"] | None = None
    lr_per_replay: bool | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    device: str = "auto"
    seed: int = Field(0, ge=0)
    select: Select | None = None
    heed_stop: bool = True
    on_nonfinite: Literal["stop", "skip"] = "stop"
    compiled: bool = False
    sync_bn: bool = False


class RuntimeConfig(BaseModel):
    """How a run is carried out, which decides nothing of it.

    Attributes:
        save_every: Minutes between two checkpoints within an epoch.
        track: Trackers that are told of each epoch.
        memory_limit: In bytes; a folder whose decoded images exceed it is read by worker processes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    save_every: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    track: tuple[str, ...] = ()
    memory_limit: Annotated[int, Field(ge=0)] | None = None

    def but(self, **changes: Any) -> RuntimeConfig:
        """The same with what is given otherwise; None is what is not given.

        Raises:
            DeatError: Naming the first value that is not admissible.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return RuntimeConfig.model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            raise DeatError(describe_first_error(error)) from None


class RunConfig(BaseModel):
    """Everything that decides a run, resolved; ``config.json`` of a run directory.

    The fields are those of `TrainOptions` without their Nones, the model, and what the run was made with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    setting: Setting
    dataset: str
    data_dir: str | None
    image_size: int
    train_size: int
    val_size: int
    arch: str
    init_from: str | None
    epochs: int
    lr_epochs: int | None = None
    lr: float
    lr_schedule: LrSchedule
    momentum: float
    weight_decay: float
    batch_size: int
    eps: float
    alpha: float | None
    steps: int | None
    max_steps: int | None
    gamma: float | None
    beta: float | None
    tau: int | None
    attack_mode: Literal["train", "eval"] | None
    lr_per_replay: bool | None
    precision: Literal["fp32", "bf16", "fp16"]
    device: str
    seed: int
    select: Select
    heed_stop: bool = True
    on_nonfinite: Literal["stop", "skip"] = "stop"
    compiled: bool = False
    sync_bn: bool = False
    classes: tuple[str, ...] = ()
    model: ModelSpec
    data_fingerprint: str
    versions: dict[str, str]
    conduct: RuntimeConfig = RuntimeConfig()

    def extended(self, epochs: int) -> RunConfig:
        """The same for more epochs: the learning rate goes on as it was, and its milestones stay where they were.

        Raises:
            DeatError: If that cannot be.
        """
        if epochs < self.epochs:
            raise DeatError(f"--epochs = {epochs} is less than the run's {self.epochs}; start a new run for it")
        if epochs > self.epochs and self.lr_schedule == "cyclic":
            raise DeatError(
                f"--epochs = {epochs} differs from the run's {self.epochs}, and a cyclic learning rate, which has come "
                "down to 0 by then, cannot be prolonged; start a new run for it"
            )
        if epochs == self.epochs or self.lr_schedule == "flat":
            return self.model_copy(update={"epochs": epochs})
        return self.model_copy(update={"epochs": epochs, "lr_epochs": self.lr_epochs or self.epochs})

    def differences(self, before: dict[str, Any]) -> list[str]:
        """The options in which this run differs from the one that has been trained, so that it would be another.

        Args:
            before: That one's configuration as JSON values, which may be of fewer epochs.
        """
        now = self.model_dump(mode="json")
        known = [name for name in now if name not in MAY_DIFFER]
        differing = [name for name in known if before.get(name) != now[name]]
        if "epochs" in differing:
            with contextlib.suppress(DeatError, ValidationError):
                if RunConfig.model_validate(before).extended(self.epochs).lr_epochs == self.lr_epochs:
                    differing = [name for name in differing if name not in ("epochs", "lr_epochs")]
        return differing

    def method_options(self) -> dict[str, Any]:
        """The overrides for `deat_rb.create`."""
        return {key: getattr(self, key) for key in METHOD_OPTIONS}


def read_options(path: str | Path) -> dict[str, Any]:
    """Reads the options out of a ``config.json``, a run's own or one written by hand.

    Raises:
        DeatError: If the file does not hold such options.
    """
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise DeatError(f"{path} does not hold a JSON object of training options; a run's config.json does")
    made = set(RunConfig.model_fields) - set(TrainOptions.model_fields)
    return {key: value for key, value in content.items() if key not in made}


def make_options(values: dict[str, Any]) -> TrainOptions:
    """Checks options.

    Raises:
        DeatError: Naming the first option that is not admissible, and its value.
    """
    try:
        return TrainOptions.model_validate(values)
    except ValidationError as error:
        raise DeatError(describe_first_error(error)) from None


def describe_first_error(error: ValidationError) -> str:
    """One sentence about the first thing that pydantic did not accept."""
    first = error.errors()[0]
    name = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
    if first["type"] == "extra_forbidden":
        return f"there is no option {name}"
    if first["type"] == "missing":
        return f"{name} is missing"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{name} = {first['input']!r} cannot be used: {message.replace('input', 'it', 1)}"
