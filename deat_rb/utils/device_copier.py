"""Copies of batches from host memory to a GPU, concurrent with the GPU's work."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCopier:
    """Copies batches to a device; to a GPU from pinned memory on a separate stream, at most one batch ahead.

    Args:
        device: The device.
        beside: Whether to copy concurrently with the device's work; by default on a CUDA GPU.
    """

    def __init__(self, device: torch.device | str, *, beside: bool | None = None) -> None:
        self.device = torch.device(device)
        self.beside = self.device.type == "cuda" if beside is None else beside
        self._stream: torch.cuda.Stream | None = None
        self._reached: torch.cuda.Event | None = None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device; those already there are returned unchanged."""
        if not self.beside or all(tensor.device.type != "cpu" for tensor in tensors):
            return [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if self._reached is not None:
            self._reached.synchronize()  # the batch before the current one is done; otherwise copies would pile up
        self._reached = current.record_event()
        with torch.cuda.stream(self._stream):
            copies = [
                tensor.pin_memory().to(self.device, non_blocking=True) if tensor.device.type == "cpu" else tensor
                for tensor in tensors
            ]
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)
        return [copy.to(self.device, non_blocking=True) for copy in copies]
