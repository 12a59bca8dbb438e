"""Checks of the model, the loaders and every batch before training on them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.data.check import ROUNDING, are_soft, check_batch, check_label_values, check_types
from deat_rb.models.check import check_not_meta, check_trainable, check_weights_exist, trial_logits
from deat_rb.training.base import Batch, TrainerBase
from deat_rb.training.engine import Engine, explain_nondeterminism
from deat_rb.training.surrogate_loss import check_shape
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state

ADVICE = "images must have a shape and type that the model accepts, and its output must be logits (N, K)"


class BatchError(DeatError):
    """Raised for a batch that cannot be used for training."""


def check_parameters(model: nn.Module) -> None:
    """Check that a model has parameters to train.

    Raises:
        DeatError: There are no parameters, all are frozen, or some are lazy or inference tensors.
    """
    check_weights_exist(model, "training")
    parameters = list(model.parameters())
    if not parameters:
        raise DeatError("the model has no parameters, so there is nothing to train")
    if not any(parameter.requires_grad for parameter in parameters):
        raise DeatError(
            "all parameters of the model are frozen (requires_grad is False), so there is nothing to train: "
            "unfreeze those to be trained"
        )


def check_fit(model: nn.Module) -> None:
    """Check that a model can be trained in the current context and saved afterwards.

    Raises:
        DeatError: The model cannot be trained, or gradients are disabled by `torch.inference_mode` or `torch.no_grad`.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        context = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise DeatError(f"training needs gradients, which {context} disables: call fit outside of it")
    check_parameters(model)
    check_not_meta(model)
    check_trainable(model, source="the model")


def check_requirements(trainer: type[TrainerBase], name: str, *, compiled: bool, open_ended: bool) -> None:
    """Check that a method can be trained with these options.

    Args:
        trainer: The class of the trainer.
        name: The name of the method.
        compiled: Whether the model is compiled.
        open_ended: Whether the number of epochs is open.

    Raises:
        DeatError: The method cannot be compiled, or needs the number of epochs.
    """
    if compiled and trainer.not_compilable is not None:
        raise DeatError(f"{name} {trainer.not_compilable}: omit --compile")
    if open_ended and trainer.needs_epochs:
        raise DeatError(f"{name} raises the weight of its penalty up to the last epoch, so it cannot be open-ended: "
                        "give --epochs a number")  # fmt: skip


def check_positions(trainer: TrainerBase, loader: Any) -> None:
    """Check that a loader tells which training images each batch has, if the trainer needs to know.

    Raises:
        DeatError: The trainer needs to know, and the loader does not tell.
    """
    if trainer.needs_positions and not (hasattr(loader, "positions") and hasattr(loader, "number_of_images")):
        raise DeatError(
            f"{trainer.attack} keeps a perturbation for each training image, but a {type(loader).__name__} does not "
            "tell which images a batch has: use deat_rb.data.batches.Batches"
        )


class BatchChecker:
    """Checks of the batches of a loader.

    Values on the CPU are checked before training on the batch; those on an accelerator are checked by `InputFlags`,
    without a device sync.

    Args:
        trainer: The method and its model.
        engine: Device, precision and ranks.
        validation: Whether the batches are for validation, on which the model is run in eval mode only.

    Attributes:
        name: Name of the loader in error messages.
        num_classes: Number of outputs of the model; None before `check_model`.
    """

    def __init__(self, trainer: TrainerBase, engine: Engine, *, validation: bool = False) -> None:
        self.trainer = trainer
        self.engine = engine
        self.validation = validation
        self.name = "the validation loader" if validation else "the training loader"
        self.num_classes: int | None = None
        self._kinds: set[tuple[torch.Size, torch.dtype, bool, bool]] = set()

    def check_values(self, batch: Any, where: str, *, allow_nan: bool = False) -> Batch:
        """Check a batch that the loader yields and return its images and labels.

        Args:
            batch: The batch.
            where: Name of the batch in error messages.
            allow_nan: Whether to accept images with NaN, which `NonFiniteMonitor` handles.

        Raises:
            BatchError: It is not a pair of images and labels, or its values are invalid.
        """
        images, labels = _as_pair(batch, self.name, where)
        soft = not self.validation
        try:
            if self.num_classes is None:
                check_batch(images, labels, allow_nan=allow_nan, soft=soft)
                return images, labels
            check_types(images, labels, soft=soft)
            if images.device.type == self.engine.device.type == "cpu":
                check_batch(images, labels, self.num_classes, allow_nan=allow_nan, soft=soft)
            elif labels.device.type == "cpu":
                check_label_values(labels, self.num_classes)
        except DeatError as error:
            raise BatchError(f"{where}: {error}") from None
        return images, labels

    def check_model(self, images: Tensor, labels: Tensor, where: str) -> None:
        """Check the model's output and gradients on a batch, once for each shape and type of images.

        Args:
            images: (N, C, H, W), on the device.
            labels: (N,), or class probabilities (N, K), on the device.
            where: Name of the batch in error messages.

        Raises:
            BatchError: The model or the attack does not work with these images or labels.
        """
        kind = images.shape[1:], images.dtype, len(images) == 1, are_soft(labels)
        if kind in self._kinds:
            return
        engine, model = self.engine, self.trainer.model
        train_mode = not self.validation and model.training
        if engine.sync_bn and engine.world.size > 1:  # SyncBatchNorm communicates in train mode
            train_mode = False
        images = images.nan_to_num(nan=0.5)  # a later batch may have NaN, which `NonFiniteMonitor` handles
        try:
            with preserve_state(model), engine.eager(model), engine.autocast():
                if train_mode:
                    trial_logits(model, images[:2], source="the model in train mode", advice=ADVICE)
                    self._check_gradients(images[:2])
                logits = trial_logits(model.eval(), images[:2], advice=ADVICE)
                num_classes = logits.shape[1]
                if not train_mode:
                    self._check_gradients(images[:2])
            check_label_values(labels, num_classes)
            weights = self.trainer.loss.class_weights
            if weights is not None and len(weights.weights) != num_classes:
                raise DeatError(f"class_weights has {len(weights.weights)} numbers, but the model {num_classes} "
                                "classes: give one for each")  # fmt: skip
            if are_soft(labels):
                self.trainer.check_soft_labels()
            with engine.autocast(), seeding.preserved():
                check_shape(self.trainer.loss, logits, labels[:2])
            self.trainer.check_attack(images)
        except DeatError as error:
            if (nondeterminism := explain_nondeterminism(error)) is not None:
                raise DeatError(nondeterminism) from None
            reason = str(error)
            if len(images) == 1 and "more than 1 value per channel" in reason:
                reason = (
                    "it has a single image, from which BatchNorm cannot compute statistics: use a different batch size "
                    "or drop_last=True"
                )
            raise BatchError(f"{where}: {reason}") from None
        self._kinds.add(kind)
        self.num_classes = num_classes

    def _check_gradients(self, images: Tensor) -> None:
        """Check that the logits have gradients with respect to the parameters and, if attacked, the images."""
        inputs = images.detach().clone().requires_grad_()
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        with seeding.preserved():
            logits = self.trainer.model(inputs + 0)  # not a leaf
        if logits.requires_grad:
            gradient, *gradients = torch.autograd.grad(logits.sum(), [inputs, *trained], allow_unused=True)
            if any(each is not None for each in gradients) and (gradient is not None or not self.trainer.steps):
                return
        raise DeatError("the model's logits have no gradient: remove no_grad() and detach() from its forward method")


def _as_pair(batch: Any, name: str, where: str) -> Batch:
    needed = f"{where}: {name} must yield pairs of tensors (images (N, C, H, W), labels (N,))"
    if isinstance(batch, tuple | list) and len(batch) == 2:
        images, labels = batch
        if isinstance(labels, Integral) or (isinstance(labels, Tensor) and labels.ndim == 0):
            raise BatchError(
                f"{needed}, but it yields single examples, as a Dataset does: use "
                "torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True)"
            )
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            return images, labels
    raise BatchError(f"{needed}, but it yields {_describe(batch)}")


def _describe(batch: Any) -> str:
    """Describe the type of a batch."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(part).__name__ for part in batch[:4])})"
    return f"a {type(batch).__name__}"


class BatchFlags:
    """On-device record of the first batch in an epoch with each of the faults `WATCHED`."""

    WATCHED: tuple[str, ...]

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def record(self, bad: Tensor, batch: int) -> None:
        """Record which faults a batch, numbered from 0, has: a mask on the device."""
        if self._first is None:
            self._first = torch.full_like(bad, -1, dtype=torch.long)
        self._first = torch.where(bad & (self._first < 0), batch, self._first)

    def found(self) -> tuple[int, str] | None:
        """Return the first bad batch, numbered from 1, and its first fault; synchronizes with the device."""
        first = [] if self._first is None else self._first.tolist()
        bad = [(batch + 1, what) for batch, what in zip(first, self.WATCHED, strict=False) if batch >= 0]
        return min(bad, key=lambda each: each[0]) if bad else None


class InputFlags(BatchFlags):
    """Record of the first batch with an image value outside [0, 1] or a label out of range."""

    WATCHED = ("an image has values outside [0, 1]", "a label is negative or not below the number of classes")
    """What is recorded; class probabilities are below 1, and so pass the second check unless they are negative."""

    def note(self, images: Tensor, labels: Tensor, num_classes: int | None, batch: int) -> Tensor:
        """Record whether a batch, numbered from 0, is invalid.

        Returns:
            The labels, clamped to valid classes, because an invalid label would crash the CUDA context.
        """
        low, high = images.detach().aminmax()
        clamped = labels.clamp(0, None if num_classes is None else num_classes - 1)
        bad = torch.stack([(low < -ROUNDING) | (high > 1 + ROUNDING), (clamped != labels).any()])
        self.record(bad, batch)
        return clamped
