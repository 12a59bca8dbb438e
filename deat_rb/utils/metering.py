"""Measurement of energy and peak memory on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

JOULES_PER_KWH = 3.6e6


class Usage(NamedTuple):
    """Energy and memory used by some work; None where it cannot be measured.

    Attributes:
        joules: Energy of the whole GPU, including that of other processes on it.
        memory: Peak of the GPU memory that torch allocated, in bytes.
    """

    joules: float | None = None
    memory: int | None = None


class Meter:
    """Meter of energy and peak memory; on a CPU, nothing is measured.

    Energy is read from NVML, through the optional package nvidia-ml-py, and needs an NVIDIA GPU of Volta or later.

    Args:
        device: The device.
        joules: Function that returns the energy used by the device so far; by default NVML's counter.
    """

    def __init__(self, device: torch.device, joules: Callable[[], float] | None = None) -> None:
        self.device = device
        self._joules = joules or _nvml_counter(device)
        self._began: float | None = None

    def start(self) -> None:
        """Start measuring."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = self._joules() if self._joules is not None else None

    def read(self) -> Usage:
        """Return the usage since `start`; on a GPU, synchronize before calling this."""
        joules = None if self._joules is None or self._began is None else self._joules() - self._began
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Usage(joules, memory)


def _nvml_counter(device: torch.device) -> Callable[[], float] | None:
    """Return a function that reads the GPU's energy counter in joules; None if there is none."""
    if device.type != "cuda":
        return None
    with contextlib.suppress(Exception):  # the package, the driver, or the counter is missing
        import pynvml

        pynvml.nvmlInit()
        # The UUID also finds the GPU behind CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    return None
