"""CPU threads of torch: their number, and how long they spin while waiting for each other.

`share_cpu` must be called before torch is loaded, so this module imports torch only inside functions.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QUIET = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""Settings if there are enough processors: waiting threads spin for a fraction of a millisecond before they sleep with
GNU's libgomp (in torch's packages for Linux), and for 1 ms with LLVM's and Intel's runtimes (in other packages)."""

BUSY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Settings if processors are scarce: waiting threads sleep at once, with any of these runtimes."""

POLICIES = (*BUSY, *QUIET)
"""Environment variables that determine how threads wait."""

CHOSEN = "DEAT_RB_OPENMP"
"""Environment variable that lists the settings of `share_cpu`, so that a child process replaces them by its own."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that determine the number of threads."""


def share_cpu() -> dict[str, str]:
    """Set environment variables that make torch's waiting threads give up the CPU instead of spinning.

    By default, waiting threads spin for milliseconds. If other processes need the CPU, a spinning thread takes time
    from the threads that it waits for, and training becomes many times slower. Therefore they spin for a shorter time,
    and not at all if other processes are using the CPU now; results do not change. In a container whose quota is below
    the machine's number of processors, the number of threads is that of the quota. See docs/shared_cpu.md.

    OpenMP reads the variables when torch is loaded, so call this before torch is imported. The command `deat-rb` does.

    Returns:
        The variables that were set; none if torch is already loaded. Variables of the environment are not changed,
        except those that this function set in a parent process.
    """
    chosen: dict[str, str] = {}
    if "torch" in sys.modules:
        return chosen
    for setting in os.environ.pop(CHOSEN, "").split():
        name, _, value = setting.partition("=")
        if os.environ.get(name) == value:
            del os.environ[name]
    if not any(name in os.environ for name in POLICIES):
        chosen |= waiting()
    if not any(name in os.environ for name in COUNTS) and processors() < _affinity():
        chosen["OMP_NUM_THREADS"] = str(processors())
    os.environ.update(chosen)
    if chosen:
        os.environ[CHOSEN] = " ".join(f"{name}={value}" for name, value in chosen.items())
    return chosen


def processors() -> int:
    """Return the number of processors that this process may use, according to its affinity and its container's quota.

    A quota of 1.5 processors counts as 2.
    """
    quota = _quota()
    return _affinity() if quota == math.inf else max(1, min(_affinity(), math.ceil(quota)))


def waiting() -> dict[str, str]:
    """Return `BUSY` if this process and the others together have more running threads than processors, else `QUIET`."""
    lacking = running_elsewhere() + processors() - (os.cpu_count() or 1)
    return BUSY if lacking > max(0.5, 0.1 * processors()) else QUIET


def running_elsewhere(file: Path = Path("/proc/stat"), samples: int = 10) -> float:
    """Return the mean number of other threads that run or wait for a processor, over 50 ms; 0 if it is not known."""
    running = 0
    for _ in range(samples):
        time.sleep(0.005)
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:  # not Linux: the mean over the last minute
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        running += next((int(line.split()[1]) for line in lines if line.startswith("procs_running ")), 1) - 1
    return running / samples


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _quota(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the container's quota of processors; infinity if there is none."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not Linux, or "max": no quota
        return math.inf


def thread_count(threads: int | None) -> int:
    """Return the number of threads to use: ``threads``, but at most one per processor; by default torch's own."""
    import torch

    return torch.get_num_threads() if threads is None else min(threads, processors())


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Use `thread_count` threads within the context."""
    import torch

    before, count = torch.get_num_threads(), thread_count(threads)
    if count == before:  # setting it, even to the same number, changes how MKL chooses its own
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
