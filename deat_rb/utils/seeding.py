"""One seed for everything (law 9).

No generator's state is ever carried along. Every random stream is derived from the run's seed and a key such as
``("augment", epoch, batch)``, so that a run which is continued at any batch draws exactly what the uninterrupted one
would have drawn there, and the order of one stream cannot disturb another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_division: ContextVar[tuple[slice, int, torch.Generator] | None] = ContextVar("division", default=None)


def derive(seed: int, *key: str | int) -> int:
    """Derives the seed of one stream, a 63-bit integer, from the run's seed and the stream's key."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Makes the generator of one stream.

    Args:
        seed: The run's seed.
        key: What tells this stream from others, for instance ``("order", epoch)``.
        device: Where the numbers are drawn.
    """
    stream = torch.Generator(device=device)
    stream.manual_seed(derive(seed, *key))
    return stream


@contextmanager
def preserved() -> Iterator[None]:
    """Gives torch's global generators back, on leaving, the states they had on entering."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def seed_global(seed: int, *key: str | int) -> None:
    """Seeds torch's global generators, of which attacks draw their starts and dropout its masks, for one stream."""
    torch.manual_seed(derive(seed, *key))


@contextmanager
def global_batch_noise(part: slice, total: int, stream: torch.Generator) -> Iterator[None]:
    """Within it, noise is drawn for a global batch, and that of one process's part of it is given.

    Args:
        part: Which examples of the global batch are this process's.
        total: How many examples the global batch has.
        stream: Where the noise comes from, in the same state in every process.
    """
    token = _division.set((part, total, stream))
    try:
        yield
    finally:
        _division.reset(token)


def uniform_like(images: Tensor, bound: float) -> Tensor:
    """Draws from U(-bound, bound), in the shape of ``images`` (N, C, H, W).

    The numbers come in the order of a contiguous tensor whatever the memory format of ``images`` is, so that
    channels_last changes the speed of a run and not its noise.
    """
    return _drawn(images, lambda blank, stream: blank.uniform_(-bound, bound, generator=stream))


def normal_like(images: Tensor, std: float) -> Tensor:
    """Draws from std * N(0, 1), in the shape of ``images`` and in the order of `uniform_like`."""
    return std * _drawn(images, lambda blank, stream: blank.normal_(generator=stream))


def _drawn(images: Tensor, draw: Callable[[Tensor, torch.Generator | None], Tensor]) -> Tensor:
    division = _division.get()
    part, total, stream = division if division is not None else (slice(None), len(images), None)
    blank = torch.empty((total, *images.shape[1:]), dtype=images.dtype, device=images.device)
    noise = draw(blank, stream)[part]
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return noise.contiguous(memory_format=torch.channels_last)
    return noise
