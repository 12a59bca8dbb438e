"""Options of `fit`: optimization and runtime."""

from __future__ import annotations

from typing import Literal

from deat_rb.training.lr import LR_SCHEDULES
from deat_rb.utils.options import OptionGroup, option


class OptimConfig(OptionGroup):
    """Optimization."""

    epochs: int = option(10, "Training epochs; can be raised with --resume, unless the learning rate is cyclic.", ge=1)
    lr: float = option(0.1, "Peak learning rate of SGD.", gt=0, allow_inf_nan=False)
    lr_schedule: str = option("cyclic", "Learning-rate schedule.", choices=LR_SCHEDULES)
    lr_epochs: int | None = option(
        None, "Place the milestones of a multistep schedule as in a run of this many epochs.",
        default_text="--epochs", ge=1,
    )  # fmt: skip
    momentum: float = option(0.9, "Momentum of SGD.", ge=0, lt=1)
    weight_decay: float = option(5e-4, "Weight decay of SGD.", ge=0, allow_inf_nan=False)
    ema: float | None = option(
        None, "Validate, select and save an exponential moving average of the weights with this decay, such as 0.9995.",
        default_text="off", gt=0, lt=1,
    )  # fmt: skip
    early_stopping: bool = option(True, "Only record where the method's stopping rule would end training.")
    select: Literal["best", "last"] | None = option(
        None, "Epoch whose weights are the result: the best robust validation accuracy, or the last."
    )
    seed: int = option(0, "Random seed for the data split, weights, batches and attacks.", ge=0)


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
    sync_bn: bool = option(False, "Synchronize BatchNorm statistics across ranks; GPUs only.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "If the loss, a gradient or l_X becomes NaN or infinite: stop, or skip that batch.", may_change=True
    )
    save_every: float = option(
        5.0, "Minutes between checkpoints within an epoch.", metavar="MINUTES", may_change=True, gt=0,
        allow_inf_nan=False,
    )  # fmt: skip
