"""Options of `fit`: optimization and runtime."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from deat_rb.training.lr import LR_SCHEDULES, MOMENTUM_RANGE, LearningRate
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN, Epochs, Names, OptionGroup, option
from deat_rb.utils.text import counted


class OptimConfig(OptionGroup):
    """Optimization."""

    epochs: Epochs = option(
        10, "Training epochs, or open: until --patience or Ctrl-C ends training; can be raised with --resume under a "
        "flat or multistep learning rate.", ge=1,
    )  # fmt: skip
    optimizer: Literal["sgd", "adamw"] = option("sgd", "Optimizer.")
    lr: float = option(0.1, "Peak learning rate.", gt=0, allow_inf_nan=False)
    lr_schedule: str = option("cyclic", "Learning-rate schedule.", choices=LR_SCHEDULES)
    lr_epochs: int | None = option(
        None, "Place the milestones of a multistep schedule as in a run of this many epochs.",
        default_text="--epochs", ge=1,
    )  # fmt: skip
    warmup_epochs: float = option(
        0, "Raise the learning rate linearly from 0 in the first epochs; the schedule extends over the others.", ge=0,
        allow_inf_nan=False,
    )  # fmt: skip
    momentum: float = option(0.9, "Momentum of SGD, or beta1 of AdamW.", ge=0, lt=1)
    nesterov: bool = option(False, "Use Nesterov momentum.")
    weight_decay: float = option(5e-4, "Weight decay.", ge=0, allow_inf_nan=False)
    no_decay: Names = option(
        (), "Parameters without weight decay: norm (normalization layers), bias, or norm,bias.", metavar="KINDS",
        default_text="none",
    )  # fmt: skip
    grad_clip: float | None = option(
        None, "Scale gradients down to this total L2 norm before each update.", default_text="off", gt=0,
        allow_inf_nan=False,
    )  # fmt: skip
    ema: float | None = option(
        None, "Validate, select and save an exponential moving average of the weights with this decay, such as 0.9995; "
        "0 for none.", default_text="off", ge=0, lt=1,
    )  # fmt: skip
    early_stopping: bool = option(True, "Only record where the method's stopping rule would end training.")
    patience: int | None = option(
        None, "End training when robust validation accuracy has not risen for this many epochs.", default_text="off",
        ge=1,
    )  # fmt: skip
    validate_every: int = option(1, "Validate every N epochs, and after the last one.", ge=1)
    select: Literal["best", "last"] | None = option(
        None, "Epoch whose weights are the result: the best robust validation accuracy, or the last."
    )
    seed: int = option(0, "Random seed for the data split, weights, batches and attacks.", ge=0)

    @field_validator("no_decay")
    @classmethod
    def _are_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [kind for kind in kinds if kind not in ("norm", "bias")]:
            raise ValueError(f"unknown kind of parameter '{wrong[0]}': give norm, bias or norm,bias")
        return kinds

    @property
    def learning_rate(self) -> LearningRate:
        """The learning rate and the momentum as functions of training progress."""
        return LearningRate(self.lr, self.lr_schedule, self.lr_epochs or self.epochs, self.warmup_epochs, self.momentum)


class RuntimeConfig(OptionGroup):
    """Runtime."""

    device: str = option(
        "auto", "Device: cpu, cuda, cuda:1, mps or auto, the best available.", metavar="NAME", may_change=True
    )
    threads: int | None = option(
        None, "CPU threads, at most one per processor; affects rounding. With several ranks, set OMP_NUM_THREADS.",
        default_text="one per processor", may_change=True, ge=1,
    )  # fmt: skip
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "fp32", "Floating-point precision; auto is bf16 or fp16 if the hardware supports it."
    )
    compile: bool = option(False, "Compile the model with torch.compile.")
    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto", "Record training steps as CUDA graphs; auto does so for known networks, losses and attacks.",
        may_change=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Use deterministic algorithms only, so that a GPU repeats or resumes a run bit for bit; slower."
    )
    sync_bn: bool = option(False, "Synchronize BatchNorm statistics across ranks; GPUs only.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "If the loss, a gradient or l_X becomes NaN or infinite: stop, or skip that batch.", may_change=True
    )
    save_every: float = option(
        5.0, "Minutes between checkpoints within an epoch.", metavar="MINUTES", may_change=True, gt=0,
        allow_inf_nan=False,
    )  # fmt: skip


def optimizer_defaults(optimizer: str | None) -> dict[str, Any]:
    """Return the default options of an optimizer that differ from those of SGD; AdamW's are torch's."""
    return {"lr": 1e-3, "weight_decay": 1e-2} if optimizer == "adamw" else {}


def check_optim(optim: OptimConfig, prefix: str = "--") -> None:
    """Check that the options of `OptimConfig` can be combined.

    Args:
        optim: The options.
        prefix: As for `deat_rb.utils.options.validate`.

    Raises:
        DeatError: They cannot be combined.
    """

    def named(name: str) -> str:
        return prefix + name.replace("_", "-") if prefix else name

    schedule, epochs = optim.lr_schedule, optim.lr_epochs or optim.epochs
    if optim.lr_epochs is not None and schedule != "multistep":
        raise DeatError(
            f"{named('lr_epochs')} = {optim.lr_epochs} applies only to the multistep schedule, not to {schedule}; "
            "omit it"
        )
    warmup = f"{named('warmup_epochs')} = {optim.warmup_epochs:g}"
    if optim.warmup_epochs and schedule in ("cyclic", "onecycle"):
        raise DeatError(f"{warmup} cannot be combined with the {schedule} schedule, which has its own warm-up; omit it")
    if optim.epochs == OPEN and schedule != "flat":
        raise DeatError(
            f"{named('epochs')} = open needs a learning-rate schedule without an end: give {named('lr_schedule')} flat"
        )
    if optim.warmup_epochs >= epochs:
        raise DeatError(f"{warmup} leaves none of {counted(epochs, 'epoch')} for the schedule; reduce it")
    if optim.nesterov and (optim.optimizer != "sgd" or optim.momentum == 0):
        what = "the optimizer sgd" if optim.optimizer != "sgd" else f"a {named('momentum')} above 0"
        raise DeatError(f"{named('nesterov')} needs {what}; omit it")
    if schedule == "onecycle" and not MOMENTUM_RANGE <= optim.momentum < 1 - MOMENTUM_RANGE:
        raise DeatError(
            f"{named('momentum')} = {optim.momentum:g} cannot be used with the onecycle schedule, which varies it by "
            f"±{MOMENTUM_RANGE:g} within [0, 1); give a value from {MOMENTUM_RANGE:g} to below {1 - MOMENTUM_RANGE:g}"
        )
