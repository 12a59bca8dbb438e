"""The base of our attacks, which leaves no trace on the model, and what crafting cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torchattacks.attack import Attack

from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes, preserve_state

if TYPE_CHECKING:
    pass


AttackMode = Literal["train", "eval"]


class StatelessAttack(Attack):
    """A torchattacks attack that leaves no trace on the model it is called on (law 2).

    It is called, nested, saved and normalised as every `torchattacks.attack.Attack`. Unlike those it gives each
    module its own mode back, when it raises too, keeps buffers and gradients as they were, and, where it crafts in
    train mode, leaves modules alone that their owner has frozen in eval.
    """

    def __init__(self, name: str, model: nn.Module, attack_mode: AttackMode = "train") -> None:
        super().__init__(name, model)
        if attack_mode not in ("train", "eval"):
            raise DeatError(f"attack_mode = '{attack_mode}' is neither 'train' nor 'eval'")
        train = attack_mode == "train"
        self.set_model_training_mode(model_training=train, batchnorm_training=train, dropout_training=train)

    def __setattr__(self, name: str, value: Any) -> None:
        # The parent's version compares every value ever assigned with `in`, which raises on tensors; what it is for
        # is to find nested attacks, and here they are assigned bare.
        object.__setattr__(self, name, value)
        if isinstance(value, Attack):
            nested = self.__dict__["_attacks"]
            nested[f"{name}.0"] = value
            for inner_name, inner in value.__dict__["_attacks"].items():
                nested[f"{name}.{inner_name}"] = inner

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Crafts, and leaves the model as it was.

        Args:
            inputs: Images in [0, 1], (N, C, H, W), or normalised ones after `set_normalization_used`.
            labels: (N,).
            args: For the attack's own ``forward``.
            kwargs: For the attack's own ``forward``.

        Returns:
            The adversarial images (N, C, H, W), normalised where ``inputs`` are.
        """
        applied = self._normalization_applied
        with preserve_state(self.model):
            self.enter_mode()
            try:
                adv: Tensor = super().__call__(inputs, labels, *args, **kwargs)
            finally:
                self._set_normalization_applied(applied)
        return adv

    def enter_mode(self) -> None:
        """Puts the model into the mode that crafting runs in."""
        if not self._model_training:
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
        """Saves adversarial images as `torchattacks.attack.Attack.save` does, and leaves the modes as they were."""
        with preserve_modes(self.model):
            return super().save(*args, **kwargs)

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """The logits (N, K) of images (N, C, H, W) in eval mode, which leaves the modes as they were."""
        with preserve_modes(self.model):
            logits: Tensor = super().get_output_with_eval_nograd(inputs)
        return logits

    # torchattacks would set and recover one mode for the whole model, on nested attacks as well.
    def _change_model_mode(self, given_training: bool) -> None:
        pass

    def _recover_model_mode(self, given_training: bool) -> None:
        pass


@dataclass
class CraftStats:
    """What crafting one batch cost and saw.

    Attributes:
        l_x: The sum over the batch of the L1 norm of each example's last input gradient, in pixel space, a 0-d tensor.
        forwards: Forward passes, in units of this mini-batch.
        backwards: Backward passes, in units of this mini-batch.
    """

    l_x: Tensor
    forwards: float | Tensor
    backwards: float | Tensor
