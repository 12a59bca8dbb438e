"""One seed for everything (law 9).

No generator's state is ever carried along. Every random stream is derived from the run's seed and a key such as
``("augment", epoch, batch)``, so that a run which is continued at any batch draws exactly what the uninterrupted one
would have drawn there, and the order of one stream cannot disturb another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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


def uniform_like(images: Tensor, bound: float) -> Tensor:
    """Draws from U(-bound, bound), in the shape of ``images`` (N, C, H, W).

    The numbers come in the order of a contiguous tensor whatever the memory format of ``images`` is, so that
    channels_last changes the speed of a run and not its noise.
    """
    noise = torch.empty(images.shape, dtype=images.dtype, device=images.device).uniform_(-bound, bound)
    return _laid_out_as(images, noise)


def normal_like(images: Tensor, std: float) -> Tensor:
    """Draws from std * N(0, 1), in the shape of ``images`` and in the order of `uniform_like`."""
    return _laid_out_as(images, std * torch.randn(images.shape, dtype=images.dtype, device=images.device))


def _laid_out_as(images: Tensor, noise: Tensor) -> Tensor:
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return noise.contiguous(memory_format=torch.channels_last)
    return noise
