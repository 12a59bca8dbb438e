"""Runs on the Hugging Face Hub, as uploaded by `deat-rb push`, and local copies of their files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deat_rb.runs.directory import CONFIG, METRICS, RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.hub import MAX_TEXT, MAX_WEIGHTS, HubAddress, HubFiles, is_hub

CARD = "README.md"

OPTIONAL_FILES = {METRICS: MAX_TEXT, "eval.json": MAX_TEXT, "eval-verdicts.safetensors": 64 * 2**20}
"""Files that a run may have in addition to its configuration and weights, with their largest size in bytes."""


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub with its local files.

    Attributes:
        path: A run directory with the selected weights, or a single file if the address names one.
        address: The address with the commit's hash.
        notes: Notes for the user.
        weights: The file of the weights.
    """

    path: Path
    address: str
    notes: tuple[str, ...]
    weights: Path

    @contextmanager
    def named(self) -> Iterator[None]:
        """Make error messages name the address instead of the files in the Hub's cache."""
        try:
            yield
        except DeatError as error:
            raise DeatError(str(error).replace(str(self.path), self.address)) from error

    def facts(self, provenance: dict[str, str]) -> dict[str, str]:
        """Return the provenance of a network loaded from these files, with the address instead of the run's name."""
        return {"model": self.address, **{name: value for name, value in provenance.items() if name != "run"}}

    def copy(self, folder: Path) -> Path:
        """Copy the files, which are links in the Hub's cache, into a new folder; return their path there."""
        copied = folder / self.address.rpartition("@")[0].rpartition("/")[2]
        if self.path.is_file():
            folder.mkdir(parents=True)
            shutil.copyfile(self.path, copied)
        else:
            copied.mkdir(parents=True)
            for name in (CONFIG, *OPTIONAL_FILES, self.weights.name):
                if (self.path / name).exists():
                    shutil.copyfile(self.path / name, copied / name)
        return copied


def pinned(source: str | None) -> str | None:
    """Return an address on the Hub with the commit's hash, or None for other sources."""
    if source is None or not is_hub(source):
        return None
    return source if HubAddress.parse(source).is_pinned else open_hub(source).address


def open_hub(target: str) -> HubModel:
    """Download a run or a file of weights from the Hub, unless it is in the Hub's cache.

    Args:
        target: Such as ``hf:owner/name``, ``hf:owner/name@revision`` or ``hf:owner/name/weights.safetensors``.

    Raises:
        DeatError: The address is malformed, or the model does not exist, cannot be reached or is not a run.
    """
    address = HubAddress.parse(target)
    files = HubFiles.open(address, address.file or CONFIG)
    if address.file:
        path = files.fetch(address.file, MAX_WEIGHTS)
        return HubModel(path, str(files.address), files.notes, path)
    config = files.fetch(CONFIG, MAX_TEXT)
    try:
        run = RunDirectory.open(config.parent)
    except DeatError as error:
        raise DeatError(f"{files.address} is not a run of deat-rb: "
                        f"{str(error).replace(str(config.parent), str(files.address))}") from None  # fmt: skip
    weights = files.fetch(f"{run.config.optim.select}.safetensors", MAX_WEIGHTS)
    for name, limit in OPTIONAL_FILES.items():
        if files.sizes is not None and files.has(name):
            files.fetch(name, limit)
    return HubModel(run.path, str(files.address), files.notes, weights)
