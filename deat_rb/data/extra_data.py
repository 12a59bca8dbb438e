"""Generated or pseudo-labeled images in addition to the training images, and batches with a fixed share of them."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from deat_rb.data.images import ImageSet, LabeledImages, Reader
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator

ADVICE = "give an .npz file as published by DM-Improves-AT, with the arrays image (N, H, W, 3), uint8, and label (N,)"

LOCAL_HEADER = struct.Struct("<26xHH")
"""Lengths of the name and the extra field in the header of a file in a ZIP archive, APPNOTE 4.3.7."""

CHUNK = 10_000


@dataclass(frozen=True, eq=False)
class ExtraData:
    """Images used in addition to the training images.

    Attributes:
        path: The file.
        images: The images with their labels.
        mapped: Whether the images are memory-mapped from the file instead of being in memory.
    """

    path: Path
    images: ImageSet
    mapped: bool

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all images and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.images.shape)).encode())
        for start in range(0, len(self.images), CHUNK):
            digest.update(self.images.images[start : start + CHUNK].permute(0, 2, 3, 1).contiguous().numpy().data)
        digest.update(self.images.labels.contiguous().numpy().data)
        return digest.hexdigest()


_DAMAGED = (
    zipfile.BadZipFile,
    KeyError,  # an array is missing
    EOFError,  # cut off
    zlib.error,  # compressed data are damaged
    ValueError,  # the header of an array is invalid
    RuntimeError,  # encrypted, or compressed in a way that zipfile does not know
)
"""Exceptions of zipfile and NumPy for files that are damaged or not .npz files."""


def load_extra_data(
    path: str | Path, *, shape: tuple[int, int, int], num_classes: int, memory_limit: int | None = None
) -> ExtraData:
    """Read an ``.npz`` file with the arrays ``image`` and ``label``, without unpickling anything.

    Images in an uncompressed file (`numpy.savez`) are memory-mapped, so they take no memory until they are used; those
    in a compressed file are read into memory.

    Args:
        path: The file.
        shape: (C, H, W) of the training images.
        num_classes: Number of classes.
        memory_limit: Maximum size in bytes of images that are not mapped.

    Raises:
        DeatError: The file cannot be read, has other arrays or shapes, contains Python objects, or a label is out of
            range.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            images, mapped = _read_array(archive, path, "image", memory_limit)
            labels, _ = _read_array(archive, path, "label", memory_limit)
    except DeatError:
        raise
    except OSError as error:
        raise DeatError(f"--extra-data {path} cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise DeatError(f"--extra-data {path} is damaged or not an .npz file ({error}): {ADVICE}") from error
    channels, height, width = shape
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DeatError(f"--extra-data {path} has the array image of type {images.dtype} and shape {images.shape}: "
                        f"{ADVICE}; convert images in [0, 1] with (255 * image).round().astype('uint8')")  # fmt: skip
    if images.shape[1:] != (height, width, channels):
        raise DeatError(f"--extra-data {path} has images of shape {images.shape[1:]}, but the training images are "
                        f"(H, W, C) = {(height, width, channels)}: resize them, or transpose them")  # fmt: skip
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DeatError(f"--extra-data {path} has {len(images)} images but the array label of type {labels.dtype} and "
                        f"shape {labels.shape}: give one whole number per image")  # fmt: skip
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DeatError(f"--extra-data {path} has the label {wrong}, which is out of range: labels of the "
                        f"{num_classes} classes must be 0 to {num_classes - 1}")  # fmt: skip
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ExtraData(path, ImageSet(tensor, torch.from_numpy(labels.astype(np.int64))), mapped)


def _read_array(archive: zipfile.ZipFile, path: Path, name: str, memory_limit: int | None) -> tuple[NDArray[Any], bool]:
    """Return an array of the archive, and whether it is memory-mapped."""
    if f"{name}.npy" not in archive.namelist():
        names = ", ".join(sorted(each.removesuffix(".npy") for each in archive.namelist())[:8])
        raise DeatError(f"--extra-data {path} has no array {name} (found: {names or 'none'}): {ADVICE}")
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read_header is None:
            raise DeatError(f"--extra-data {path} has the array {name} in version {version} of NumPy's format, which "
                            "is for structured arrays: save plain numbers")  # fmt: skip
        shape, fortran_order, dtype = read_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise DeatError(f"--extra-data {path} has Python objects in the array {name}, which are not unpickled: save "
                        "plain numbers")  # fmt: skip
    size = math.prod(shape) * dtype.itemsize
    if start + size != member.file_size:
        raise DeatError(f"--extra-data {path} is damaged: the array {name} should have {size} bytes, but has "
                        f"{member.file_size - start}; copy the file again")  # fmt: skip
    if member.compress_type == zipfile.ZIP_STORED and not fortran_order and size:
        with path.open("rb") as raw:
            raw.seek(member.header_offset)
            name_length, extra_length = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))
        offset = member.header_offset + LOCAL_HEADER.size + name_length + extra_length + start
        if offset + size > os.path.getsize(path):
            raise DeatError(f"--extra-data {path} is truncated: copy the file again")
        # Copy-on-write, since torch.from_numpy takes writable arrays.
        return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape), True
    if memory_limit is not None and size > memory_limit:
        raise DeatError(f"--extra-data {path} is compressed, and its {size / 1e9:.3g} GB exceed --memory-limit: save "
                        "it with numpy.savez, so that it can be mapped")  # fmt: skip
    with archive.open(member) as file:
        return npy.read_array(file, allow_pickle=False), False


def check_share(extra: LabeledImages, shape: tuple[int, int, int], fraction: float, batch_size: int) -> None:
    """Check that every batch can contain a given share of extra images.

    Args:
        extra: The extra images.
        shape: (C, H, W) of the training images.
        fraction: Share of extra images in a batch.
        batch_size: Images per batch.

    Raises:
        DeatError: The share or the number of extra images is too small for the batch size, or their shape differs from
            ``shape``.
    """
    if not 0 < fraction < 1 or int(batch_size * fraction) < 1:
        raise DeatError(f"--extra-fraction {fraction:g} of --batch-size {batch_size} is invalid: give a fraction below "
                        "1 that yields at least one image per batch")  # fmt: skip
    if len(extra) < batch_size:
        raise DeatError(f"{len(extra)} extra images are fewer than one batch of --batch-size {batch_size}: reduce "
                        "--batch-size or use more images")  # fmt: skip
    if extra.shape != shape:
        raise DeatError(f"the extra images are {extra.shape}, but the training images are {shape}: their shapes "
                        "(C, H, W) must be equal")  # fmt: skip


def mixed_order(count: int, extra: int, batches: int, own_size: int, extra_size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch in which every batch has the same number of extra images.

    The training images are taken without replacement, reshuffled whenever all have been used; extra images are drawn
    with replacement. This is the sampling of Carmon et al. 2019 and of DM-Improves-AT, except that no batch gets more
    extra images than the others.

    Args:
        count: Number of training images.
        extra: Number of extra images.
        batches: Number of batches.
        own_size: Training images per batch.
        extra_size: Extra images per batch.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Indices (batches * (own_size + extra_size),) int64; those of extra images begin at ``count``.
    """
    stream = generator(seed, "order", epoch)
    rounds = [torch.randperm(count, generator=stream) for _ in range(-(-batches * own_size // count))]
    own = torch.cat(rounds)[: batches * own_size].view(batches, own_size)
    stream = generator(seed, "extra", epoch)
    drawn = torch.randint(count, count + extra, (batches, extra_size), generator=stream)
    mixed = torch.cat([own, drawn], dim=1)
    places = torch.rand(mixed.shape, generator=stream).argsort(dim=1)
    return mixed.gather(1, places).flatten()


@dataclass(frozen=True, eq=False)
class MixedReader:
    """Reads batches from two sets of images.

    Attributes:
        own: Reader of the training images.
        extra: Reader of the extra images.
        count: Number of training images; indices from this number on refer to extra images.
    """

    own: Reader
    extra: Reader
    count: int

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batches; see `deat_rb.data.images.Reader`."""
        assert order is not None
        is_extra = order >= self.count
        parts = []
        for reader, mask, offset in ((self.own, ~is_extra, 0), (self.extra, is_extra, self.count)):
            before = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)]).tolist()
            own_windows = [slice(before[window.start], before[window.stop]) for window in windows]
            parts.append(reader(order[mask] - offset, own_windows))
        for window, (images, labels), (more_images, more_labels) in zip(windows, *parts, strict=True):
            mask = is_extra[window]
            places = torch.cat([torch.nonzero(~mask), torch.nonzero(mask)])[:, 0].argsort().to(labels.device)
            yield torch.cat([images, more_images])[places], torch.cat([labels, more_labels])[places]
