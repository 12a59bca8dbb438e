"""Several processes that train one model, started by torchrun or `accelerate launch`.

A global batch is divided over them, and everything that decides anything (gradients, l_X, accuracies, counts, the wish
to stop) is summed over them, so that a run is the same whatever their number is. Process 0 alone writes.
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
"""How long a process waits for process 0, which validates and writes."""


def share(count: int, rank: int, size: int) -> slice:
    """Which of ``count`` examples of a global batch are process ``rank``'s, of ``size`` processes.

    Shares are contiguous, in the order of the ranks, and differ by one at most.
    """
    return slice(rank * count // size, (rank + 1) * count // size)


def is_main() -> bool:
    """Whether this process is the one that writes and talks, as torchrun's environment says."""
    return os.environ.get("RANK", "0") == "0"


class World:
    """The processes that train together; a single one by default, for which everything here is the identity.

    Tensors are summed where the processes train, so that they have to be on that device; all else goes over the CPU.

    Attributes:
        rank: Which process this is, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of a global batch; see `share`."""
        return share(count, self.rank, self.size)

    def leave(self) -> None:
        """Ends the communication, for good, while Python is whole.

        Threads of a group that something still held would outlive it, and end the process by SIGABRT when they are
        through with a last message.
        """
        self._control = None
        gc.collect()
        dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every one of them."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Makes floating-point tensors, such as BatchNorm's statistics, their mean over all processes.

        In double precision, in which the mean of equal single-precision numbers is that number: what all processes have
        alike, such as the normalisation's mean and deviation, stays what it is.
        """
        whole = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.size == 1 or not whole:
            return
        flat = torch.cat([tensor.flatten().double() for tensor in whole])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(whole, flat.split([tensor.numel() for tensor in whole]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def max_over_ranks(self, number: int) -> int:
        """The greatest of all processes' numbers. It waits for all of them, on the CPU and not for the device."""
        if self.size > 1:
            max_over_ranks = torch.tensor(number)
            dist.all_reduce(max_over_ranks, op=dist.ReduceOp.MAX, group=self._control)
            number = int(max_over_ranks)
        return number

    def all_gather(self, value: T) -> list[T]:
        """What each of the processes has, in the order of their ranks; small, for it is pickled for its own kin."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def local_main_first(self, action: Callable[[], T]) -> T:
        """Lets one process of each machine act before the others there do the same and find what it has left behind.

        Raises:
            DeatError: Everywhere, if one of the first raised it; and KeyboardInterrupt likewise.
        """
        is_first = self.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        done: T | None = None
        refusal: BaseException | None = None
        if is_first:
            try:
                done = action()
            except (DeatError, KeyboardInterrupt) as error:
                refusal = error
        for each in self.all_gather(refusal):
            if each is not None:
                raise each
        return cast(T, done) if is_first else action()

    def on_main(self, action: Callable[[], T]) -> T:
        """Lets process 0 act while the others wait, and gives all of them what came of it.

        Args:
            action: What it returns has to be small; process 0 pickles it for its own kin.

        Raises:
            DeatError: Everywhere, if process 0 raised it; and KeyboardInterrupt likewise.
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
        result, refusal = outcome
        if refusal is not None:
            raise refusal
        return cast(T, result)


@cache
def world(cpu: bool) -> World:
    """The processes that this one belongs to, as torchrun's environment variables say; joins them when first asked.

    Args:
        cpu: Whether they train on the CPU although there may be GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from accelerate import PartialState

    # Imported later, by DDP, its functions would have the group of all processes as a default argument, and hold it.
    import_module("torch.distributed.nn.functional")

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    # A group of its own for decisions: over gloo, so that they do not wait for the device.
    joined = World(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=PATIENCE))
    atexit.register(joined.leave)
    return joined


def is_peer_failure(error: RuntimeError, among: World) -> bool:
    """Whether an error says that another process is gone rather than that something is wrong here."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "process group", "socket", "timed out")
    return among.size > 1 and (isinstance(error, dist.DistError) or any(sign in text for sign in signs))
