"""A run directory: what a training run leaves behind.

config.json          everything that decides the run; `deat-rb train --config` runs it again
metrics.jsonl        a row of `EpochStats` per epoch
last.safetensors     the newest weights, and last.json about them
best.safetensors     those most robust on validation, and best.json
checkpoints/         what an interrupted run is continued from, the newest two
curves.png           the metrics as a picture
eval.json            the last evaluation
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from deat_rb.config import RunConfig
from deat_rb.errors import DeatError
from deat_rb.files import atomic_write, read_json, save_tensors, sha256_tensors, write_json
from deat_rb.models import ModelSpec
from deat_rb.stats import EpochStats

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+%-]*")


def check_name(name: str) -> str:
    """Gives back a run's name that is a plain file name.

    Raises:
        DeatError: If it is not, for instance with ``/`` or ``..`` in it.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise DeatError(f"'{name}' cannot be a run's name; use letters, digits and . _ + % - in it, no path")
    return name


def check_free(path: Path) -> None:
    """Looks whether a run can be made there.

    Raises:
        DeatError: If the name cannot be a run's or is taken.
    """
    check_name(path.name)
    if path.exists():
        raise DeatError(f"there is a run at {path} already; choose another --name or --output")


class RunDirectory:
    """One run's files.

    Attributes:
        path: The folder.
        config: What decided the run.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Makes the folder, which must not exist, and writes ``config.json``.

        Raises:
            DeatError: If the name is taken or the folder cannot be made.
        """
        check_free(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            raise DeatError(
                f"the run directory {path} cannot be made ({error.strerror}); choose another --output"
            ) from None
        try:
            write_json(path / CONFIG, config.model_dump(mode="json"))
        except DeatError:
            path.rmdir()
            raise
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Opens a run that is there.

        Raises:
            DeatError: If the folder is no run directory or its ``config.json`` is damaged.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise DeatError(f"{path} is not a run directory: it has no {CONFIG}")
        try:
            return cls(path, RunConfig.model_validate(read_json(path / CONFIG)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DeatError(f"{path / CONFIG} is not a run's configuration: {where}: {first['msg']}") from None

    def reconfigured(self, config: RunConfig) -> RunDirectory:
        """Records another configuration, the old one beside it as ``config-before.json``."""
        write_json(self.path / "config-before.json", self.config.model_dump(mode="json"))
        write_json(self.path / CONFIG, config.model_dump(mode="json"))
        return RunDirectory(self.path, config)

    @property
    def model_spec(self) -> ModelSpec:
        """The network."""
        return self.config.model

    @property
    def selected_weights_path(self) -> Path:
        """The weights that are the run's result.

        Raises:
            DeatError: If the run has written none yet.
        """
        path = self.path / f"{self.config.select}.safetensors"
        if not path.is_file():
            raise DeatError(f"the run {self.path} has no {path.name}; it ended before its first epoch did")
        return path

    def checkpoint(self, which: str) -> dict[str, Any]:
        """What is known of the ``best`` or ``last`` weights: epoch, figures, SHA-256."""
        content = read_json(self.path / f"{which}.json")
        if not isinstance(content, dict):
            raise DeatError(f"{self.path / which}.json is not a JSON object; the run is damaged")
        return content

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from training in this folder; the lock dies with its owner.

        Raises:
            DeatError: If another process holds it.
        """
        with open(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DeatError(f"another process is training in {self.path}; wait for it or end it") from None
            yield

    def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None:
        """Writes weights and what is known of them, atomically."""
        tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
        save_tensors(self.path / f"{which}.safetensors", tensors)
        write_json(self.path / f"{which}.json", {**asdict(row), "sha256": sha256_tensors(tensors)})

    def append(self, row: EpochStats) -> None:
        """Adds an epoch to ``metrics.jsonl``, on the disk before this returns.

        Raises:
            DeatError: If it cannot be written; then the file is as it was.
        """
        path = self.path / METRICS
        line = (json.dumps(asdict(row), allow_nan=False) + "\n").encode()
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab", buffering=0) as file:
                written = file.write(line)
                os.fsync(file.fileno())
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if path.is_file():
                os.truncate(path, before)
            raise DeatError(f"{path} cannot be written ({error.strerror}); the epochs before are kept") from None

    def discard_unfinished(self) -> None:
        """Removes what a killed process had not finished writing."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def truncate(self, epochs: int) -> list[EpochStats]:
        """Forgets the metrics of all but the first epochs, and gives those.

        Raises:
            DeatError: If there are fewer.
        """
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if len(lines) < epochs:
            raise DeatError(
                f"{path} has {len(lines)} epochs where the run is {epochs} on; it is damaged, start it anew"
            )
        if len(lines) > epochs:
            atomic_write(path, "".join(lines[:epochs]).encode())
        return self.rows()

    def rows(self) -> list[EpochStats]:
        """The epochs so far.

        Raises:
            DeatError: If a line is not JSON.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            return [EpochStats.from_row(json.loads(line)) for line in lines]
        except (json.JSONDecodeError, AttributeError):
            raise DeatError(f"{path} has a line that is not a JSON object; the run is damaged") from None
