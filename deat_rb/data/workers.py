"""Worker processes that decode image files in advance, based on torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deat_rb.utils.errors import DeatError
from deat_rb.utils.threads import processors

MAX_WORKERS = 16

BATCHES_AHEAD = 2
"""Number of batches that each worker decodes in advance; limits memory use."""

Decoder = Callable[[list[int]], tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Function that decodes the images at given positions to (n, C, H, W) and labels (n,); it must be picklable."""


def worker_count() -> int:
    """Return the number of worker processes: usable processors divided by the ranks on this machine, 1 to 16."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(max(processors() // (int(local) if local.isdecimal() and int(local) else 1), 1), MAX_WORKERS)


class WorkerReader:
    """Reads batches, decoded in advance by worker processes, in the requested order.

    The workers are started with the first batch, reused in later epochs and ended with this object. Concurrent
    iterations use separate workers.
    """

    def __init__(self, decode: Decoder, device: torch.device | str) -> None:
        """Store the arguments without starting workers.

        Args:
            decode: Function that the workers call to decode images.
            device: Device of the batches.
        """
        self._decode = decode
        self._device = torch.device(device)
        self._idle: list[DataLoader[Any]] = []
        self._loaders: list[DataLoader[Any]] = []
        # The finalizer keeps the loaders out of garbage cycles: in one, a loader's queues may be finalized before the
        # loader, which then waits 5 s for each worker.
        weakref.finalize(self, self._loaders.clear)

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batches; see `deat_rb.data.images.Reader`.

        Raises:
            DeatError: An image cannot be decoded, or a worker process cannot be started or was killed.
        """
        loader: Any = self._idle.pop() if self._idle else self._new_loader()
        batches: Any = None
        loader.sampler.positions = (_positions(order, window) for window in windows)
        try:
            with _sigint_blocked():
                batches = iter(loader)
            for batch in batches:
                if isinstance(batch, DeatError):
                    raise batch
                images, labels = batch.tensors()
                yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        except GeneratorExit:
            self._idle.append(loader)
            raise
        except OSError as error:
            raise DeatError(
                f"worker processes for decoding images cannot be started ({error.strerror or error}): raise the limits "
                "of this machine, or increase --memory-limit to keep the images in memory"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            spawned = multiprocessing.get_start_method() != "fork"
            guard = "; in a script, put the code under `if __name__ == '__main__':`" if spawned else ""
            raise DeatError(
                f"a worker process for decoding images ended ({str(error).partition(chr(10))[0]}): check whether "
                f"memory ran out, or increase --memory-limit to keep the images in memory{guard}"
            ) from error
        else:
            self._idle.append(loader)
        finally:
            if loader not in self._idle:
                self._loaders.remove(loader)
            loader = batches = None  # otherwise a traceback would keep them and the workers alive

    def _new_loader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            _DecodedBatches(self._decode),
            sampler=_PositionSampler(),
            batch_size=None,
            num_workers=worker_count(),
            prefetch_factor=BATCHES_AHEAD,
            persistent_workers=True,
            pin_memory=self._device.type == "cuda",
            collate_fn=_unchanged,
            worker_init_fn=_initialize_worker,
            # Used for the workers' seeds; by default they are drawn from the global generator, which attacks use.
            generator=torch.Generator(),
        )
        self._loaders.append(loader)
        return loader


def _positions(order: Tensor | None, window: slice) -> list[int]:
    return list(range(window.start, window.stop)) if order is None else order[window].tolist()


class _PositionSampler:
    """Sampler that yields the positions of each batch; ``positions`` is set before every iteration."""

    positions: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.positions)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A decoded batch of NumPy arrays, sent through a pipe: tensors would use shared memory, which containers limit."""

    images: Any
    labels: Any

    def pin_memory(self) -> _Batch:
        """Copy to pinned memory; called by DataLoader's thread."""
        return _Batch(torch.from_numpy(self.images).pin_memory(), torch.from_numpy(self.labels).pin_memory())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the images and the labels."""
        return torch.as_tensor(self.images), torch.as_tensor(self.labels)


@dataclass(frozen=True, eq=False)
class _DecodedBatches(Dataset[Any]):
    """Dataset that decodes in a worker; errors are returned, because DataLoader adds a traceback to raised ones."""

    decode: Decoder

    def __getitem__(self, positions: list[int]) -> _Batch | DeatError:
        try:
            return _Batch(*self.decode(positions))
        except DeatError as error:
            return DeatError(str(error))


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Hold back Ctrl-C (SIGINT) inside the context, in which worker processes are started.

    Workers inherit this and ignore the signal as soon as they run, so none of them is interrupted while it starts. A
    Ctrl-C meanwhile reaches this process when the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialize_worker(worker: int) -> None:
    """Ignore Ctrl-C, which the training process handles, and exit when that process ends.

    DataLoader's own check of the parent never runs in a worker that is blocked writing a batch to the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
