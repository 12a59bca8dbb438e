"""Worker processes that decode images while the network learns from those before."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deat_rb.utils.errors import DeatError

MAX_WORKERS = 16

BATCHES_AHEAD = 2
"""How many batches each worker decodes in advance: what bounds the memory."""

Decoder = Callable[[list[int]], tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Decodes the images at some positions: (n, C, H, W) and labels (n,). It is sent to the workers, so it must pickle."""


def worker_count() -> int:
    """How many processes decode: the usable cores, divided over the training processes of this machine, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(max(usable // (int(local) if local.isdecimal() and int(local) else 1), 1), MAX_WORKERS)


class WorkerReader:
    """Gives batches that worker processes decode ahead, in the order asked for.

    The workers start with the first batch and stay for the next epoch. They end with this object, with an error, with
    Ctrl-C, and some seconds after a main process that was killed. Two iterations at once have workers of their own.
    """

    def __init__(self, decode: Decoder, device: torch.device | str) -> None:
        """Starts nothing yet.

        Args:
            decode: Run by the workers.
            device: Where the batches are wanted.
        """
        self._decode = decode
        self._device = torch.device(device)
        self._idle: list[_Workers] = []

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `deat_rb.data.images.Reader`.

        Raises:
            DeatError: An image cannot be decoded, or the workers were killed again and again.
        """
        done, done_at_death = 0, -1
        while done < len(windows):
            workers = self._idle.pop() if self._idle else _Workers(self._decode, pinned=self._device.type == "cuda")
            try:
                for images, labels in workers.read(_positions(order, window) for window in windows[done:]):
                    done += 1
                    yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            except _WorkersDiedError as error:
                if done == done_at_death:
                    raise DeatError(
                        f"the processes that decode images were ended from outside twice over one batch ({error}): "
                        "see whether the memory is used up, or keep the data in memory by a larger --memory-limit"
                    ) from error
                done_at_death = done
                warnings.warn(f"processes that decode images were ended from outside and replaced ({error})",
                              RuntimeWarning, stacklevel=2)  # fmt: skip
            except GeneratorExit:
                self._idle.append(workers)
                raise
            else:
                self._idle.append(workers)


def _positions(order: Tensor | None, window: slice) -> list[int]:
    return list(range(window.start, window.stop)) if order is None else order[window].tolist()


class _WorkersDiedError(RuntimeError):
    """A worker has ended without having been told to."""


class _Workers:
    """A group of worker processes; of use for one iteration at a time."""

    def __init__(self, decode: Decoder, *, pinned: bool) -> None:
        self._tasks = _Tasks()
        self._loader: DataLoader[Any] = DataLoader(
            _Decoding(decode),
            sampler=self._tasks,
            batch_size=None,
            num_workers=worker_count(),
            prefetch_factor=BATCHES_AHEAD,
            persistent_workers=True,
            pin_memory=pinned,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_live_with, os.getpid()),
            # DataLoader draws the workers' seeds; not from the global generator, whose numbers are the attacks'.
            generator=torch.Generator(),
        )

    def read(self, tasks: Iterable[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Decodes one list of positions after another. Whatever is raised has ended the workers."""
        self._tasks.pending = tasks
        batches: Any = None
        while True:
            try:
                if batches is None:
                    with _child_signals_as_they_are(), _ctrl_c_kept_waiting():
                        batches = iter(self._loader)
                batch = next(batches)
                if isinstance(batch, DeatError):
                    raise batch
            except StopIteration:
                return
            except BaseException as error:
                if batches is not None:
                    # Dropping the iterator would end them too, but a traceback can keep it alive.
                    batches._shutdown_workers()
                if isinstance(error, RuntimeError):
                    raise _WorkersDiedError(str(error).partition("\n")[0]) from error
                if isinstance(error, OSError):
                    raise DeatError(
                        f"processes that decode images cannot be started ({error.strerror or error}): raise the limits "
                        "of this machine, or keep the data in memory by a larger --memory-limit"
                    ) from error
                raise
            yield batch.tensors()


class _Tasks:
    """What is to be decoded next; set anew for each iteration."""

    pending: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.pending)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A decoded batch on its way through a pipe, which unlike shared memory has no limit that containers set low."""

    images: Any
    labels: Any

    def pin_memory(self) -> _Batch:
        """Called by DataLoader's thread, so that the copy to the GPU does not hold up the main thread."""
        return _Batch(torch.from_numpy(self.images).pin_memory(), torch.from_numpy(self.labels).pin_memory())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The images and the labels."""
        return torch.as_tensor(self.images), torch.as_tensor(self.labels)


@dataclass(frozen=True, eq=False)
class _Decoding(Dataset[Any]):
    """What a worker does with a task. Errors are results, for DataLoader would wrap what is raised in a traceback."""

    decode: Decoder

    def __getitem__(self, positions: list[int]) -> _Batch | DeatError:
        try:
            return _Batch(*self.decode(positions))
        except DeatError as error:
            return DeatError(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def _live_with(parent: int, worker: int) -> None:
    """Makes a worker end when its parent has, and not by a Ctrl-C.

    That reaches every process of the terminal, and the one that trains may want another batch before it stops.
    DataLoader's own watch over the parent does not help a worker that waits for its batch to be taken from the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _ctrl_c_kept_waiting() -> Iterator[None]:
    """Lets no Ctrl-C end a worker that starts and does not ignore it yet: they inherit what is blocked here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_signals_as_they_are() -> Iterator[None]:
    """Keeps DataLoader from raising a worker's end wherever the main thread just is: it is seen at the next batch."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
