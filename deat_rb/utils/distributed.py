"""Data-parallel training: the ranks that torchrun or `accelerate launch` started, and their communication.

Each global batch is divided among the ranks. Gradients, l_X, accuracies, counts and stop requests are reduced over
all ranks, so that a run does not depend on their number. Only rank 0 writes files.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deat_rb.utils.errors import DeatError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""Timeout of communication: how long a rank waits for rank 0, which validates and writes files."""


def share(count: int, rank: int, size: int) -> slice:
    """Return the part of a global batch of ``count`` examples that ``rank`` of ``size`` ranks processes.

    Shares are contiguous, in the order of the ranks, and their lengths differ by at most one.
    """
    return slice(rank * count // size, (rank + 1) * count // size)


def is_main() -> bool:
    """Return whether this is rank 0, which writes and prints, according to torchrun's environment variables."""
    return os.environ.get("RANK", "0") == "0"


class World:
    """The ranks of a training job; by default a single one, for which every reduction is the identity.

    Tensors are reduced on the training device and must be on it; other objects are sent over the CPU.

    Attributes:
        rank: Rank of this process (0-based).
        size: Number of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this rank's part of a global batch; see `share`."""
        return share(count, self.rank, self.size)

    def leave(self) -> None:
        """Destroy the process groups before Python shuts down.

        If one were still referenced at shutdown, its threads would abort the process (SIGABRT).
        """
        self._control = None
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """Abort communication between GPUs, so that a rank that fails alone ends instead of waiting for the others.

        torchrun ends the others then. Between CPUs, they notice by themselves that this process has ended.
        """
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating-point tensors, such as BatchNorm's statistics, by their mean over all ranks.

        The mean is computed in double precision, so that values that are equal on all ranks, such as normalization
        constants, do not change.
        """
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.size == 1 or not floats:
            return
        flat = torch.cat([tensor.flatten().double() for tensor in floats])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(floats, flat.split([tensor.numel() for tensor in floats]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def max_over_ranks(self, number: int) -> int:
        """Return the maximum over all ranks; synchronizes with the other ranks, not with the device."""
        if self.size > 1:
            maximum = torch.tensor(number)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self._control)
            number = int(maximum)
        return number

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank; values are pickled and should be small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def local_main_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on one rank of each machine first, then on the others, which can use the files it created.

        Raises:
            DeatError: ``action`` raised it on one of the first ranks; every rank then raises it.
            KeyboardInterrupt: As for `DeatError`.
        """
        is_first = self.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        result: T | None = None
        raised: BaseException | None = None
        if is_first:
            try:
                result = action()
            except (DeatError, KeyboardInterrupt) as error:
                raised = error
        for each in self.all_gather(raised):
            if each is not None:
                raise each
        return cast(T, result) if is_first else action()

    def on_main(self, action: Callable[[], T]) -> T:
        """Run a function on rank 0 only and return its result on every rank; all ranks must call this together.

        Args:
            action: The function; its result is pickled and sent to the other ranks, so it should be small.

        Raises:
            DeatError: ``action`` raised it on rank 0; then every rank raises it.
            KeyboardInterrupt: As for `DeatError`.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [action(), None]
            except (DeatError, KeyboardInterrupt) as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        result, raised = outcome
        if raised is not None:
            raise raised
        return cast(T, result)


@cache
def world(cpu: bool) -> World:
    """Return the ranks that torchrun's environment variables describe; the first call joins the process group.

    Args:
        cpu: Whether to train on CPUs even if there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from accelerate import PartialState

    # DDP imports it after initialization, when its default arguments would hold a reference to the process group.
    import_module("torch.distributed.nn.functional")

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    # Control messages use a separate gloo group, so that they do not wait for the device.
    joined = World(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=PATIENCE))
    atexit.register(joined.leave)
    return joined


def is_peer_failure(error: RuntimeError, among: World) -> bool:
    """Return whether an error means that another rank failed, rather than this one."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "process group", "socket", "timed out")
    return among.size > 1 and (isinstance(error, dist.DistError) or any(sign in text for sign in signs))
