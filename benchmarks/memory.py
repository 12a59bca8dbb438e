"""Peak memory of a training step and of its bare passes, each in its own process since a peak never decreases."""

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
    """Peak memory of one method in one precision, in bytes.

    Attributes:
        method: Its name, and those of the methods whose step is the same.
        precision: fp32, bf16 or fp16.
        ours: Peak of the training step: the process's resident set or, on a GPU, torch's allocations.
        ours_before: Peak before the first step, with the network and torch itself.
        limit: Peak of the bare passes.
        limit_before: Peak before the first of them.
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
        """The same ratio of what the steps add to the memory before them."""
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
    """Measure one method: its step, then the passes recorded from it.

    Args:
        arch: As for `Problem`.
        batch_size: N.
        device: The device.
        names: The method, and those whose step is the same.
        precision: fp32, bf16 or fp16.
        compiled: Whether `torch.compile` makes our passes.
    """
    job = _Job(arch, batch_size, str(device), torch.get_num_threads(), names[0], precision, compiled)
    ours, ours_before, passes = _alone(job, None)
    limit, limit_before, _ = _alone(job, passes)
    return Memory(", ".join(names), precision, ours, ours_before, limit, limit_before)


def _alone(job: _Job, passes: list[Pass] | None) -> tuple[int, int, list[Pass]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, job, passes).result()


def _peak(job: _Job, passes: list[Pass] | None) -> tuple[int, int, list[Pass]]:
    """Run the passes or, without any, the method's steps; return the peak, the peak before, and the passes."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    problem = Problem(job.arch, job.batch_size, device)
    if passes is not None:
        with Step(problem, job.method, job.precision):
            pass  # both processes then have imported the same modules
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
