"""Worker processes on this machine: the same command several times, on the CPU or on several GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.threads import processors

POLL = 1.0
"""Seconds between checks of the workers."""


def environments(jobs: int | None, gpus: Sequence[str], per_gpu: int) -> list[dict[str, str]]:
    """Return the environment variables that each worker gets in addition to those of this process.

    Args:
        jobs: Number of workers; by default 1, or ``per_gpu`` for each GPU.
        gpus: Indices or UUIDs of GPUs; each worker sees one of them.
        per_gpu: Workers per GPU.

    Raises:
        DeatError: A number is below 1, or both ``jobs`` and ``gpus`` are given.
    """
    if jobs is not None and gpus:
        raise DeatError(
            f"--jobs {jobs} and --gpus {','.join(gpus)} are mutually exclusive: --gpus starts --per-gpu workers per GPU"
        )
    if jobs is not None and jobs < 1:
        raise DeatError(f"--jobs {jobs} is below 1; give the number of workers")
    if per_gpu < 1:
        raise DeatError(f"--per-gpu {per_gpu} is below 1; give the number of workers for each GPU")
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus for _ in range(per_gpu)]
    count = jobs or 1
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, processors() // count))}
    return [threads if count > 1 else {} for _ in range(count)]


def check_gpus(gpus: Sequence[str]) -> None:
    """Check that each GPU exists, since a worker without one would train on the CPU.

    Args:
        gpus: Indices or UUIDs, as for `environments`.

    Raises:
        DeatError: One does not exist.
    """
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    asked = {
        gpu: subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, stderr=subprocess.DEVNULL)
        for gpu in gpus
    }
    missing = [gpu for gpu, process in asked.items() if process.wait()]
    if missing:
        raise DeatError(
            f"--gpus {','.join(gpus)}: torch finds no GPU {missing[0]} on this machine; name those that nvidia-smi "
            "lists, or use --jobs to train on the CPU"
        )


def at_once(environs: Sequence[Mapping[str, str]], threads: int | None) -> int:
    """Return how many workers compute at the same time as fast as one alone.

    Args:
        environs: Their environment variables.
        threads: CPU threads of each; None if they compute on GPUs, of which several workers may share one.
    """
    if threads is None:
        return max(1, len({each["CUDA_VISIBLE_DEVICES"] for each in environs if "CUDA_VISIBLE_DEVICES" in each}))
    return min(len(environs), max(1, processors() // threads))


def run_workers(
    arguments: Sequence[str],
    environs: Sequence[Mapping[str, str]],
    logs: Path,
    *,
    on_poll: Callable[[], None],
    on_end: Callable[[str], None],
) -> None:
    """Start a worker per environment and wait until all have ended.

    Args:
        arguments: Arguments of `deat-rb`.
        environs: Environment variables of each worker, in addition to those of this process.
        logs: Folder to whose files ``worker-N.log`` the workers' output is appended.
        on_poll: Called about once per second.
        on_end: Called with a sentence when a worker was killed or ended with an error.

    Raises:
        DeatError: The folder of logs cannot be written.
        Interrupted: Ctrl-C was pressed or SIGTERM received; the workers have stopped, and their runs can be resumed.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"the folder {logs} cannot be created ({error.strerror})") from None
    with ExitStack() as stack:
        files = [stack.enter_context(open(logs / f"worker-{k}.log", "ab")) for k in range(1, len(environs) + 1)]
        # In sessions of their own, so that Ctrl-C reaches only this process, which asks them to stop once.
        workers = [
            subprocess.Popen([sys.executable, "-m", "deat_rb", *arguments], stdin=subprocess.DEVNULL, stdout=file,
                             stderr=subprocess.STDOUT, env={**os.environ, **extra}, start_new_session=True)
            for file, extra in zip(files, environs, strict=True)
        ]  # fmt: skip
        stack.callback(_stop, workers)
        stack.enter_context(_TermIsInterrupt())
        running = dict(enumerate(workers, start=1))
        try:
            while running:
                time.sleep(POLL)
                on_poll()
                for number, worker in list(running.items()):
                    if (status := worker.poll()) is None:
                        continue
                    del running[number]
                    if status:
                        on_end(f"worker {number} {_ending(status)}; see {logs / f'worker-{number}.log'}")
        except KeyboardInterrupt:
            _stop(workers)
            raise Interrupted("the runs that were begun are saved; repeat the command to resume them") from None


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt the workers that are still running, and wait until they have saved their runs."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        worker.wait()


class _TermIsInterrupt:
    """Context manager in which SIGTERM raises KeyboardInterrupt, so that the workers are stopped as well."""

    def __enter__(self) -> None:
        self._before = (
            signal.signal(signal.SIGTERM, self._interrupt)
            if threading.current_thread() is threading.main_thread()
            else None
        )

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
