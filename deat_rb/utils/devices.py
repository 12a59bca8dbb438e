"""Device and precision selection by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch

from deat_rb.utils.errors import DeatError, did_you_mean

Precision = Literal["fp32", "bf16", "fp16"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device named ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``...

    Under torchrun, ``cuda`` is the GPU of the local rank, assigned as in Accelerate.

    Raises:
        DeatError: The device does not exist on this machine.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, ZeroDivisionError):
        raise DeatError(f"there is no device '{name}' on this machine; use --device auto to choose one") from None
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision to use on a device.

    ``auto`` is bf16 where the hardware supports it (CPU: AVX-512 bf16 or AMX; GPU: compute capability 8 and up), fp16
    on older GPUs and fp32 elsewhere.

    Raises:
        DeatError: The precision is unknown, or it is fp16 and the device is a CPU.
    """
    if name not in PRECISIONS:
        raise DeatError(f"unknown precision '{name}': {did_you_mean(name, PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise DeatError("fp16 is not supported on a CPU; use --precision bf16, fp32 or auto")
    if name != "auto":
        return cast(Precision, name)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def check_sync_bn(sync_bn: bool, device: torch.device) -> None:
    """Check that ``sync_bn`` is not used on a CPU.

    Raises:
        DeatError: ``sync_bn`` is set and the device is a CPU.
    """
    if sync_bn and device.type == "cpu":
        raise DeatError("--sync-bn needs GPUs, because torch synchronizes BatchNorm on GPUs only; omit it on a CPU")


def check_cuda_graphs(setting: str, device: torch.device, ranks: int) -> None:
    """Check that CUDA graphs are not required where they cannot be used.

    Raises:
        DeatError: ``setting`` is ``on``, and the device is not a CUDA GPU or there are several ranks.
    """
    if setting == "on" and device.type != "cuda":
        raise DeatError(f"--cuda-graphs on needs a CUDA GPU, but the device is {device}; use --cuda-graphs auto")
    if setting == "on" and ranks > 1:
        raise DeatError(f"--cuda-graphs on needs a single rank, not {ranks}; use --cuda-graphs auto")


def check_outside_autocast(device: torch.device) -> None:
    """Check that training is not called inside `torch.autocast`, which casts each weight only once, until its end.

    Raises:
        DeatError: Autocast is enabled for the device.
    """
    if _in_autocast(device):
        raise DeatError(
            "training chooses its precision itself, and torch.autocast would keep copies of the weights from before "
            "their updates: call it outside autocast, with precision='bf16' for fit and train, or "
            "engine=Engine(device, 'bf16') for training_step"
        )


def _in_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done the work that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def default_batch_size(device: torch.device) -> int:
    """Return the default number of images that are attacked together: 500 on a GPU, otherwise 128."""
    return 500 if device.type == "cuda" else 128


def uses_tf32(device: torch.device) -> bool:
    """Return whether convolutions in float32 are computed in TF32, as torch does by default on NVIDIA's GPUs."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32" if _newer_settings() else cudnn.allow_tf32)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32: without autocast, and on a GPU without TF32, whose products have 10 bits of precision."""
    autocast = torch.autocast(device.type, enabled=False) if _in_autocast(device) else nullcontext()
    with autocast, _without_tf32(device):
        yield


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with preserved_float32_precision():
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for each in _newer_settings():
            each.fp32_precision = "ieee"
        yield


@contextmanager
def preserved_float32_precision() -> Iterator[None]:
    """Restore on exit in which precision a GPU computes in float32.

    torch 2.9 and later have a second API for it. Getters of the first, whose setters change both, raise an error while
    the two disagree.
    """
    newer = [(each, each.fp32_precision) for each in _newer_settings()]
    for each, _ in newer:
        each.fp32_precision = "ieee"  # with which the first API's products always agree
    matmul = torch.get_float32_matmul_precision()
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it is not False, with which ieee would agree
        convolutions = True

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
        for each, precision in newer:
            each.fp32_precision = precision

    restore()
    try:
        yield
    finally:
        restore()


def _newer_settings() -> list[Any]:
    """Return the settings of torch's second API that the first API changes, too; none before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    return [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
