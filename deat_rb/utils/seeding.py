"""Seeding: every random stream is derived from the run's seed.

No generator state is stored. The seed of a stream is derived from the run's seed and a key such as ``("augment", epoch,
batch)``, so that streams are independent and a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

_division: ContextVar[tuple[slice, int | None, torch.Generator] | None] = ContextVar("division", default=None)


def derive(seed: int, *key: str | int) -> int:
    """Return the seed of a stream, a 63-bit integer derived from the run's seed and the stream's key."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded for a stream.

    Args:
        seed: The run's seed.
        key: The stream's key, for instance ``("order", epoch)``.
        device: The generator's device.
    """
    stream = torch.Generator(device=device)
    stream.manual_seed(derive(seed, *key))
    return stream


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the states of the global generators of torch, numpy and Python on exit."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def seed_global(seed: int, *key: str | int) -> None:
    """Seed the global generators for a stream: torch's, and numpy's and Python's, with which loaders may augment."""
    derived = derive(seed, *key)
    torch.manual_seed(derived)
    np.random.seed(derived % 2**32)
    random.seed(derived)


@contextmanager
def global_batch_noise(part: slice, total: int, stream: torch.Generator) -> Iterator[None]:
    """Let `uniform_like` and `normal_like` draw noise for the global batch and return this rank's part of it.

    Args:
        part: This rank's rows of the global batch.
        total: Size of the global batch.
        stream: Generator of the noise, in the same state on every rank.
    """
    token = _division.set((part, total, stream))
    try:
        yield
    finally:
        _division.reset(token)


@contextmanager
def same_on_all_ranks() -> Iterator[None]:
    """Let `uniform_like` and `normal_like` draw the same noise on every rank, in the shape of their argument."""
    division = _division.get()
    token = _division.set(None if division is None else (slice(None), None, division[2]))
    try:
        yield
    finally:
        _division.reset(token)


def uniform_like(images: Tensor, bound: float) -> Tensor:
    """Draw from U(-bound, bound), in the shape of ``images`` (N, C, H, W), or of any tensor with a row per example.

    Values are drawn in the order of a contiguous tensor, so that the noise does not depend on the memory format.
    """
    return _drawn(images, lambda blank, stream: blank.uniform_(-bound, bound, generator=stream))


def normal_like(images: Tensor, std: float) -> Tensor:
    """Draw from N(0, std^2), in the shape of ``images`` (N, C, H, W), independently of their memory format."""
    return std * _drawn(images, lambda blank, stream: blank.normal_(generator=stream))


def _drawn(images: Tensor, draw: Callable[[Tensor, torch.Generator | None], Tensor]) -> Tensor:
    division = _division.get()
    part, total, stream = division if division is not None else (slice(None), len(images), None)
    rows = len(images) if total is None else total
    blank = torch.empty((rows, *images.shape[1:]), dtype=images.dtype, device=images.device)
    noise = draw(blank, stream)[part]
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return noise.contiguous(memory_format=torch.channels_last)
    return noise
