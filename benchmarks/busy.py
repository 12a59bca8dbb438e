"""Training and evaluation on a CPU that other processes use too, with different settings of OpenMP.

OpenMP reads its settings when torch is loaded, so each setting has its own process, which waits without using the CPU
while another one is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks.timing import Clock, Notify, Side, Times, alternate
from deat_rb.utils.threads import BUSY, COUNTS, POLICIES, QUIET, processors, running_elsewhere, waiting

BEFORE = "torch's default"

SETTINGS: dict[str, dict[str, str]] = {
    BEFORE: {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    **{", ".join(f"{name}={value}" for name, value in each.items() if name[0] != "K"): each for each in (QUIET, BUSY)},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
"""Environment variables, by name of the setting; `deat_rb.utils.threads.waiting` chooses the third or the fourth."""

WORKLOADS = tuple((kind, arch) for arch in ("wrn-10-1", "preactresnet18") for kind in ("evaluation", "training"))

QUIET_TARGETS = {"wrn-10-1": 1.1, "preactresnet18": 1.02}
"""Largest quotient of our choice and torch's default without busy loops, by architecture."""

BUSY_TARGET = 1.2
"""Largest quotient of our choice and the best setting with busy loops."""

LOOPS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class Row:
    """Times of a workload.

    Attributes:
        kind: ``evaluation`` or ``training``.
        arch: Architecture of the network.
        loops: Number of busy loops beside.
        others: Threads of processes other than the benchmark's that ran or waited for a processor before.
        ours: The setting that the command would choose beside these loops and processes.
        times: Seconds, by setting and round.
    """

    kind: str
    arch: str
    loops: int
    others: float
    ours: str
    times: Times

    @property
    def quotient(self) -> float:
        """The time of our choice divided by that of torch's default or, with busy loops, of the best setting."""
        best = min(self.times, key=lambda name: median(self.times[name]))
        return median(self.times[self.ours]) / median(self.times[best if self.loops else BEFORE])

    @property
    def target(self) -> float:
        """The largest quotient aimed at."""
        return BUSY_TARGET if self.loops else QUIET_TARGETS[self.arch]


def measure(
    repeats: int,
    *,
    settings: Mapping[str, Mapping[str, str]] = SETTINGS,
    workloads: Sequence[tuple[str, str]] = WORKLOADS,
    clock: Clock = time.perf_counter,
    notify: Notify = lambda side: None,
) -> Iterator[Row]:
    """Time each workload under each setting in turn, without and with busy loops, two per processor.

    Args:
        repeats: Number of rounds.
        settings: Environment variables, by name of the setting.
        workloads: Kinds and architectures.
        clock: Function that returns seconds.
        notify: Called with the name of the next measurement.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(settings[name])) for name in settings}
        for kind, arch in workloads:
            sides = {name: Side(partial(_ask, worker, f"{kind} {arch}")) for name, worker in workers.items()}
            for loops in (0, LOOPS_PER_PROCESSOR * processors()):
                label = f"{kind} of {arch}, {loops} busy loops"
                others = running_elsewhere()
                with _busy_loops(loops):
                    chosen = waiting()
                    ours = next((name for name, each in settings.items() if each == chosen), BEFORE)
                    times = alternate(sides, repeats, warm_up=not loops, clock=clock,
                                      notify=partial(_notify, notify, label))  # fmt: skip
                yield Row(kind, arch, loops, others, ours, times)


def _notify(notify: Notify, label: str, side: str) -> None:
    notify(f"{label}: {side}")


@contextmanager
def _worker(variables: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a worker; when it is yielded it waits for its first workload and uses no CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in (*POLICIES, *COUNTS)}
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.busy_worker"], env={**kept, **variables}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _answer(worker)
        yield worker
    finally:
        worker.kill()
        worker.communicate()


def _ask(worker: subprocess.Popen[str], workload: str) -> None:
    """Run a workload in a worker, and wait until it is done."""
    assert worker.stdin is not None
    worker.stdin.write(f"{workload}\n")
    worker.stdin.flush()
    _answer(worker)


def _answer(worker: subprocess.Popen[str]) -> None:
    """Wait for the worker's next line.

    Raises:
        RuntimeError: The worker has ended.
    """
    assert worker.stdout is not None
    if not worker.stdout.readline():
        raise RuntimeError("benchmarks.busy_worker ended")


@contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
