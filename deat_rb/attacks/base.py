"""Base class of attacks that preserve the model's state, and the statistics of an attack on a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import OutOfMemoryError, Tensor, enable_grad, nn
from torchattacks.attack import Attack

from deat_rb.data.check import ROUNDING, check_label_values, check_pixels, check_tensors, check_types
from deat_rb.models.check import trial_logits
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes, preserve_state, require_autograd

AttackMode = Literal["train", "eval"]

NORMALIZED_ROUNDING = 1e-2
"""Tolerance for pixels outside [0, 1] after the normalization of float16 images was inverted."""

NEEDS_LABELS = "this attack needs labels: call it with (images, labels)"


class StatelessAttack(Attack):
    """A torchattacks attack that leaves the model unchanged.

    Calling, nesting, saving and normalization work as for every `torchattacks.attack.Attack`. In addition, the mode of
    each module, the buffers and the gradients are restored, even after an exception. Modules frozen in eval mode stay
    in eval mode even if the attack runs in train mode.

    Several threads may attack the same model at once if it is in eval mode and so are the attacks. In train mode that
    is not supported, because the threads would change and restore each other's modes and BatchNorm statistics.

    Args:
        name: The attack's name.
        model: The model to attack: takes images (N, C, H, W), returns logits (N, K).
        attack_mode: The model's mode during the attack, ``train`` or ``eval``; by default its current mode. In eval
            mode, as in torchattacks, the examples of a batch do not affect each other; adversarial training attacks in
            train mode. `set_model_training_mode` overrides this.

    Raises:
        DeatError: If ``attack_mode`` is invalid.
    """

    def __init__(self, name: str, model: nn.Module, attack_mode: AttackMode | None = None) -> None:
        super().__init__(name, model)
        if attack_mode not in ("train", "eval", None):
            raise DeatError(f"attack_mode = '{attack_mode}' is neither 'train' nor 'eval'")
        self._keeps_mode = True
        if attack_mode is not None:
            train = attack_mode == "train"
            self.set_model_training_mode(model_training=train, batchnorm_training=train, dropout_training=train)

    def __setattr__(self, name: str, value: Any) -> None:
        # To find nested attacks, the parent searches every assigned value with `in`, which raises for tensors. Here
        # nested attacks are plain attributes.
        object.__setattr__(self, name, value)
        if isinstance(value, Attack):
            nested = self.__dict__["_attacks"]
            nested[f"{name}.0"] = value
            for inner_name, inner in value.__dict__["_attacks"].items():
                nested[f"{name}.{inner_name}"] = inner

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate adversarial examples and restore the model's state.

        Reading the range of the images waits for the device; training, which calls ``forward``, does not.

        Args:
            inputs: Images in [0, 1], (N, C, H, W), or normalized ones after `set_normalization_used`.
            labels: (N,).
            args: Passed to ``forward``.
            kwargs: Passed to ``forward``.

        Returns:
            The adversarial examples (N, C, H, W), normalized if ``inputs`` are.

        Raises:
            DeatError: If pixels are outside [0, 1], this is called inside `torch.inference_mode`, the model was created
                there, or the attack fails on these images because of the model's output, the labels or its number of
                classes.
        """
        require_autograd(f"the attack {self.attack}")
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise DeatError(
                "the model was created inside torch.inference_mode(), so it has no gradients; create it outside"
            )
        check_tensors(inputs, inputs if labels is None else labels)
        if inputs.is_inference():
            inputs = inputs.clone()
        if labels is not None and labels.is_inference():
            labels = labels.clone()
        applied = self._normalization_applied
        if inputs.is_floating_point() and inputs.numel():
            images = self.inverse_normalize(inputs.to(self.device)) if applied else inputs
            check_pixels(images, allow_nan=True, tolerance=NORMALIZED_ROUNDING if applied else ROUNDING)
        with preserve_state(self.model), enable_grad(), explained_failures(self, inputs, labels):
            self.enter_mode()
            try:
                adv: Tensor = super().__call__(inputs, labels, *args, **kwargs)
            finally:
                self._set_normalization_applied(applied)
        return adv

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Set the model's mode during the attack, as in torchattacks."""
        self._keeps_mode = False
        super().set_model_training_mode(model_training, batchnorm_training, dropout_training)

    @property
    def in_train_mode(self) -> bool:
        """Whether the attack runs BatchNorm in train mode if the model is in train mode."""
        return self._keeps_mode or (self._model_training and self._batchnorm_training)

    def enter_mode(self) -> None:
        """Set the model to the mode of the attack."""
        if self._keeps_mode and self.model.training:
            return
        if self._keeps_mode or not self._model_training:
            self.model.eval()
            return
        if not self.model.training:
            self.model.train()
        for module in self.model.modules():
            kind = type(module).__name__
            if ("BatchNorm" in kind and not self._batchnorm_training) or (
                "Dropout" in kind and not self._dropout_training
            ):
                module.eval()

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Save adversarial examples as `torchattacks.attack.Attack.save` does, and restore the modes."""
        with preserve_modes(self.model):
            return super().save(*args, **kwargs)

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, K) of images (N, C, H, W) in eval mode, and restore the modes."""
        with preserve_modes(self.model):
            logits: Tensor = super().get_output_with_eval_nograd(inputs)
        return logits

    # torchattacks sets and restores a single mode for the whole model, also for nested attacks.
    def _change_model_mode(self, given_training: bool) -> None:
        pass

    def _recover_model_mode(self, given_training: bool) -> None:
        pass


DLR_CLASSES = {"APGD": 3, "APGDT": 4}
"""Number of classes that the DLR losses of torchattacks' APGD and APGDT need."""


@contextmanager
def explained_failures(attack: Attack, images: Tensor, labels: Tensor | None) -> Iterator[None]:
    """Replace an error of an attack by a `DeatError` if the model, the images or the labels explain it.

    Nothing is checked unless the attack fails.

    Args:
        attack: The attack that is called inside the context.
        images: The images it is called with.
        labels: The labels it is called with, if any.

    Raises:
        DeatError: The model's output cannot be attacked, the images or labels are invalid, or the attack was created
            for a different number of classes; other errors are raised unchanged.
    """
    try:
        yield
    except (DeatError, OutOfMemoryError):
        raise
    except Exception as error:  # any exception: the model and the attack may be user code
        _explain(attack, images, labels, error)
        raise


def _explain(attack: Attack, images: Tensor, labels: Tensor | None, error: Exception) -> None:
    """Raise the `DeatError` that explains a failure, if one does."""
    if labels is not None:
        check_types(images, labels)
    few = images[:2].to(attack.device)
    advice = "attacks need a model that returns logits (N, K) for these images"
    with preserve_state(attack.model):
        num_classes = trial_logits(attack.model, few, advice=advice).shape[1]
    if labels is not None:
        check_label_values(labels, num_classes)
    nested = (attack, *attack._attacks.values())
    for each in nested:
        kind = each.attack
        if num_classes < DLR_CLASSES.get(kind, 0) and getattr(each, "loss", "dlr") == "dlr":
            raise DeatError(
                f"{kind} needs {DLR_CLASSES[kind]} or more classes for its loss, but the model has {num_classes}: use "
                "another attack"
            ) from error
        if num_classes <= getattr(each, "n_target_classes", 0) and getattr(each, "multi_targeted", True):
            outer = next((other.attack for other in nested if hasattr(other, "n_classes")), kind)
            raise DeatError(
                f"{kind} is for {each.n_target_classes + 1} classes, but the model has {num_classes}: create {outer} "
                f"with n_classes={num_classes}"
            ) from error


@dataclass
class CraftStats:
    """Statistics of one attack on a batch.

    Attributes:
        l_x: Sum over the batch of the L1 norm of each example's last input gradient, in pixel space, a 0-d tensor.
        forwards: Forward passes, in units of this mini-batch.
        backwards: Backward passes, in units of this mini-batch.
        overflows: Number of gradients of single examples, over all steps, that overflowed in fp16 and count as zero.
        gradient: The last input gradient, up to a factor, (N, C, H, W), if the attack provides it.
    """

    l_x: Tensor
    forwards: float | Tensor
    backwards: float | Tensor
    overflows: float | Tensor = 0.0
    gradient: Tensor | None = None
