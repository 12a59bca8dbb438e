"""Peak memory of training steps and of their bare passes, each in its own process since a peak never decreases."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.limit import Pass
from benchmarks.problem import Problem, Step, limit_side
from benchmarks.timing import Side
from deat_rb.training.engine import Engine

MEMORY_TARGET = 1.05
RUNS = 3


@dataclass(frozen=True)
class Memory:
    """Peak memory of a method in one precision, in bytes.

    Attributes:
        method: Name of the method, and of those with the same training step.
        precision: fp32, bf16 or fp16.
        ours: Peak of the training steps: resident set size or, on a GPU, memory allocated by torch.
        ours_before: Peak before the first step, including the network and torch itself.
        limit: Peak of the bare passes.
        limit_before: Peak before the first bare pass.
    """

    method: str
    precision: str
    ours: int
    ours_before: int
    limit: int
    limit_before: int

    @property
    def of_limit(self) -> float:
        """The training step's peak divided by that of the bare passes."""
        return self.ours / self.limit

    @property
    def growth_of_limit(self) -> float:
        """The same ratio for the increases over the memory before the first step or pass."""
        return (self.ours - self.ours_before) / max(self.limit - self.limit_before, 1)


@dataclass(frozen=True)
class _Job:
    arch: str
    batch_size: int
    device: str
    threads: int
    method: str
    precision: str
    compiled: bool


def measure(
    arch: str,
    batch_size: int,
    device: torch.device,
    names: Sequence[str],
    precision: str,
    *,
    compiled: bool = False,
) -> Memory:
    """Measure a method's training step, then the passes recorded from it.

    Args:
        arch: Architecture, as for `Problem`.
        batch_size: Images per batch.
        device: The device.
        names: The method, and those with the same training step.
        precision: fp32, bf16 or fp16.
        compiled: Whether to use `torch.compile` for our passes.
    """
    job = _Job(arch, batch_size, str(device), torch.get_num_threads(), names[0], precision, compiled)
    ours, ours_before, passes = _alone(job, None)
    limit, limit_before, _ = _alone(job, passes)
    return Memory(", ".join(names), precision, ours, ours_before, limit, limit_before)


def _alone(job: _Job, passes: list[Pass] | None) -> tuple[int, int, list[Pass]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, job, passes).result()


def _peak(job: _Job, passes: list[Pass] | None) -> tuple[int, int, list[Pass]]:
    """Run the passes or, if None, training steps; return the peak, the peak before them, and the passes."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    problem = Problem(job.arch, job.batch_size, device)
    if passes is not None:
        with Step(problem, job.method, job.precision):
            pass  # so that both processes import the same modules
        before, after = _around(limit_side(problem, passes, job.precision), device)
        return after, before, passes
    with Step(problem, job.method, job.precision, compiled=job.compiled) as step:
        before, after = _around(step.side(), device)
        return after, before, step.passes()


def _around(side: Side, device: torch.device) -> tuple[int, int]:
    before = peak(device)
    for _ in range(RUNS):
        side.prepare()
        side.run()
    return before, peak(device)


def peak(device: torch.device) -> int:
    """Return this process's peak memory in bytes.

    On Linux ``getrusage`` includes the peak of the parent process; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if device.type == "cpu" and sys.platform == "linux":
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return Engine(device).peak_memory()
