"""Lower limit of a method's training time: only its forward and backward passes, in the fastest memory layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deat_rb.methods.trainers import ReplayTrainer
from deat_rb.training.trainer import Trainer
from deat_rb.utils.devices import full_float32

Kind = Literal["forward", "input", "update", "replay"]
GROUP: dict[Kind, str] = {"forward": "craft", "input": "craft", "update": "update", "replay": "replay"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pass:
    """One pass through the network.

    Attributes:
        kind: ``forward``: no gradients; ``input``: gradient of the images; ``update``: gradients of the parameters;
            ``replay``: both.
        rows: Number of images.
        training: Whether the model is in train mode.
        cast: Whether the pass runs under autocast.
        full: Whether the pass runs in float32 without TF32, which only a GPU has.
    """

    kind: Kind
    rows: int
    training: bool
    cast: bool = False
    full: bool = False


@contextmanager
def observed(trainer: Trainer) -> Iterator[list[Pass]]:
    """Record the passes of a trainer's training steps."""
    passes: list[Pass] = []
    with_gradient: Kind = "replay" if isinstance(trainer, ReplayTrainer) else "input"

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        images: Tensor = inputs[0]
        kind: Kind = "update"
        if not torch.is_grad_enabled():
            kind = "forward"
        elif images.requires_grad:
            kind = with_gradient
        cast = torch.is_autocast_enabled(images.device.type)
        full = images.device.type == "cuda" and not torch.backends.cudnn.allow_tf32
        passes.append(Pass(kind, len(images), module.training, cast, full))

    handle = trainer.model.register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


class Limit:
    """Callable that runs a list of passes.

    Args:
        model: The model, in channels_last on the device.
        passes: Passes in order; consecutive updates share one backward pass, as in TRADES and MART.
        precision: fp32, bf16 or fp16, for passes under autocast.
    """

    def __init__(self, model: nn.Module, passes: list[Pass], precision: str) -> None:
        self.model = model
        self.passes = passes
        self.dtype = DTYPES.get(precision)
        self.parameters = list(model.parameters())

    def __call__(self, images: Tensor) -> None:
        """Run all passes on images (N, C, H, W) in channels_last."""
        # One autocast context per group: a weight cast without gradients would be cached without them.
        for group, passes in groupby(self.passes, key=lambda a_pass: GROUP[a_pass.kind]):
            if group == "craft":
                with self._autocast():
                    for a_pass in passes:
                        self._craft(a_pass, images)
            else:
                self._update(list(passes), images)
        self.model.train()

    def _autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast(self.parameters[0].device.type, self.dtype)

    def _forward(self, a_pass: Pass, images: Tensor) -> Tensor:
        if self.model.training != a_pass.training:
            self.model.train(a_pass.training)
        with torch.autocast(images.device.type, enabled=False) if not a_pass.cast else nullcontext():
            logits: Tensor = self.model(images)
        return logits

    def _craft(self, a_pass: Pass, images: Tensor) -> None:
        images = images[: a_pass.rows].detach()
        with full_float32(images.device) if a_pass.full else nullcontext():
            if a_pass.kind == "forward":
                with torch.no_grad():
                    self._forward(a_pass, images)
                return
            images.requires_grad_()
            logits = self._forward(a_pass, images)
            torch.autograd.grad(logits, images, torch.ones_like(logits))

    def _update(self, passes: list[Pass], images: Tensor) -> None:
        if passes[0].kind == "replay":
            for a_pass in passes:
                self._backward([a_pass], images.detach().requires_grad_())
        else:
            self._backward(passes, images)

    def _backward(self, passes: list[Pass], images: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with self._autocast():
            logits = [self._forward(a_pass, images[: a_pass.rows]) for a_pass in passes]
        torch.autograd.backward(logits, [torch.ones_like(each) for each in logits])
