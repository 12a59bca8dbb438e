"""Recording of training steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from deat_rb.training.metrics import BatchStats
from deat_rb.utils.cuda_graphs import record_graph, run_watched
from deat_rb.utils.devices import check_cuda_graphs

Step = Callable[[], BatchStats]


class Graphs(Protocol):
    """Interface of the recorders of training steps.

    Attributes:
        any_code: Whether to record even steps that run user code, whose host operations a graph does not repeat.
    """

    any_code: bool

    def warm_up(self, step: Step) -> tuple[BatchStats, bool]:
        """Run a step; return its statistics, and whether it can be recorded because it did not sync with the device."""
        ...

    def record(self, step: Step) -> Step:
        """Record a step without running it; return a function that runs it and overwrites its previous result."""
        ...


class CudaGraphs:
    """Records steps as CUDA graphs.

    Args:
        device: The GPU.
        any_code: See `Graphs`.
    """

    def __init__(self, device: torch.device, *, any_code: bool = False) -> None:
        self.device = device
        self.any_code = any_code
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Step) -> tuple[BatchStats, bool]:
        """Run a step on the stream on which it will be recorded, watching for synchronization."""
        return run_watched(step, self._stream)

    def record(self, step: Step) -> Step:
        """Record a step; each graph has its own memory, which is freed with it."""
        replay, stats = record_graph(step, self._stream)

        def run() -> BatchStats:
            replay()
            return stats

        return run


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
