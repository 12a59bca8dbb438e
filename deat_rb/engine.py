"""Where and in which precision a training step runs: the few device branches there are."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from deat_rb.errors import DeatError, nearest

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def resolve_device(name: str = "auto") -> torch.device:
    """Finds the device ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``...

    Raises:
        DeatError: If there is no such device here.
    """
    if name == "auto":
        if torch.accelerator.is_available():
            return torch.device(str(torch.accelerator.current_accelerator()))
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError):
        raise DeatError(f"there is no device '{name}' here; --device auto takes the best there is") from None
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Finds the precision that ``auto`` stands for on a device, and refuses what the device cannot do.

    ``auto`` is bf16 where the hardware multiplies it (CPU: AVX-512 bf16 or AMX; GPU: compute capability 8 and up), fp16
    on older GPUs, fp32 elsewhere.

    Raises:
        DeatError: If the precision is unknown, or is fp16 on a CPU.
    """
    if name not in PRECISIONS:
        raise DeatError(f"there is no precision '{name}': {nearest(name, PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise DeatError("fp16 does not train on a CPU; use --precision bf16, fp32 or auto")
    if name != "auto":
        return cast(Precision, name)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


class Engine:
    """Runs the passes of a training step.

    Args:
        device: Where.
        precision: fp32, or bf16 or fp16 by autocast; fp16 updates with a loss scale.

    Attributes:
        loss_scale: The fixed scale under which our own attacks craft, so that fp16 gradients do not vanish.
    """

    def __init__(self, device: torch.device | str = "cpu", precision: Precision = "fp32") -> None:
        self.device = torch.device(device)
        self.precision = precision
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.loss_scale = 1024.0 if precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def sgd(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> SGD:
        """Makes the optimiser; on a GPU the fused one, but for fp16.

        A fused step that a loss scale skips on overflow leaves its first momentum uninitialised.
        """
        fused = self.device.type == "cuda" and self.precision != "fp16"
        return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the model is forwarded."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Moves a model here, convolutions in channels_last."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def receive(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a batch here, the images in channels_last."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def descend(self, loss: Tensor, optimizer: Optimizer, images: Tensor) -> Tensor:
        """One backward pass and one update.

        Args:
            loss: The loss, averaged over the batch.
            optimizer: Of the model's parameters.
            images: What was forwarded, (N, C, H, W).

        Returns:
            The gradient at ``images`` from the same pass, before the update and without the loss scale; zeros where
            ``images`` is not a leaf that requires one.
        """
        optimizer.zero_grad(set_to_none=True)
        scaled = self.scaler.scale(loss)
        scaled.backward()
        gradient = torch.zeros_like(images) if images.grad is None else images.grad
        if self.scaler.is_enabled():
            # get_scale() would wait for the device; the tensor behind it does not.
            scale = self.scaler._get_scale_async()
            assert scale is not None
            gradient = gradient / scale
            # A scale that grows overflows now and then, by design; the update is skipped, and so is the gradient.
            gradient = torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient))
        self.scaler.step(optimizer)
        self.scaler.update()
        return gradient

    def peak_memory(self) -> int:
        """Peak memory in bytes: allocated on the GPU, or the process's resident set elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
