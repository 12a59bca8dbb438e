"""Devices and precisions: what a name stands for here."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch

from deat_rb.utils.errors import DeatError, did_you_mean

Precision = Literal["fp32", "bf16", "fp16"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def resolve_device(name: str = "auto") -> torch.device:
    """Finds the device ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``...

    Of several GPUs a process that torchrun started gets its own, as Accelerate numbers them, and never touches another.

    Raises:
        DeatError: If there is no such device here.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, ZeroDivisionError):
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
        raise DeatError(f"there is no precision '{name}': {did_you_mean(name, PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise DeatError("fp16 does not train on a CPU; use --precision bf16, fp32 or auto")
    if name != "auto":
        return cast(Precision, name)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def check_sync_bn(sync_bn: bool, device: torch.device) -> None:
    """Refuses ``sync_bn`` on a CPU.

    Raises:
        DeatError: Always then.
    """
    if sync_bn and device.type == "cpu":
        raise DeatError("--sync-bn needs GPUs: torch synchronises BatchNorm on them alone; leave it out on a CPU")
