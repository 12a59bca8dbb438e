"""Recording of training steps as CUDA graphs."""

from __future__ import annotations

from typing import Protocol

import torch

from deat_rb.utils.cuda_graphs import CudaRecorder, Recorder
from deat_rb.utils.devices import check_cuda_graphs


class Graphs(Recorder, Protocol):
    """Interface of the recorders of training steps.

    Attributes:
        any_code: Whether to record even steps that run user code, whose host operations a graph does not repeat.
    """

    any_code: bool


class CudaGraphs(CudaRecorder):
    """Records steps as CUDA graphs.

    Args:
        device: The GPU.
        any_code: See `Graphs`.
    """

    def __init__(self, device: torch.device, *, any_code: bool = False) -> None:
        super().__init__(device)
        self.any_code = any_code


def choose_graphs(setting: str, device: torch.device, ranks: int) -> Graphs | None:
    """Return the recorder of training steps, for a CUDA GPU and a single rank; None if steps are not recorded.

    Args:
        setting: ``on``, ``off``, or ``auto`` to record only steps without user code.
        device: The device.
        ranks: Number of ranks.

    Raises:
        DeatError: ``setting`` is ``on``, but the device or the ranks do not allow it.
    """
    check_cuda_graphs(setting, device, ranks)
    if setting == "off" or device.type != "cuda" or ranks > 1:
        return None
    return CudaGraphs(device, any_code=setting == "on")
