"""Run directory: the files of a training run.

config.json          everything that determines the run; `deat-rb train --config` starts the same run again. If the
                     run was extended, config-N-epochs.json is its earlier configuration
metrics.jsonl        one `EpochStats` per line and epoch
last.safetensors     the latest weights; their metrics are in last.json
best.safetensors     the weights with the highest validation robust accuracy; their metrics are in best.json
best-raw.safetensors, last-raw.safetensors
                     with --ema, whose average is in the two files above: the weights of the same epochs, not averaged
checkpoints/         the latest two checkpoints, for --resume
curves.png           plots of the metrics
curve-test.jsonl     with --curve-test, the accuracy on test images after each epoch, only to be drawn
trackers.json        the project and identifier of the run in each experiment tracker
eval.json            the most complete evaluation on the run's own data; others are in evaluations/
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from deat_rb.models.names import trust_flag
from deat_rb.models.spec import ModelSpec
from deat_rb.runs.config import RunConfig
from deat_rb.training.early_stopping import NOT_RISEN
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError, UnwritableError
from deat_rb.utils.files import atomic_write, read_json, sha256_file, write_json
from deat_rb.utils.locks import exclusive_lock
from deat_rb.utils.options import OPEN
from deat_rb.utils.records import describe_validation_error
from deat_rb.utils.safe_load import save_tensors, sha256_tensors
from deat_rb.utils.text import counted

CONFIG = "config.json"

METRICS = "metrics.jsonl"

CURVES = "curves.png"

LOCK = ".lock"

_ROW = TypeAdapter(EpochStats)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+%-]*")


def check_name(name: str) -> str:
    """Return a run's name after checking that it is a plain file name.

    Raises:
        DeatError: The name is invalid, for instance because it contains ``/`` or ``..``.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise DeatError(f"'{name}' is not a valid run name; use only letters, digits and . _ + % -")
    return name


def check_free(path: Path) -> None:
    """Check that a run directory can be created at a path.

    Raises:
        DeatError: The name is invalid or already taken.
    """
    check_name(path.name)
    if path.exists():
        raise DeatError(f"{path} already exists; choose another --name or --output")


class RunDirectory:
    """The files of a run.

    Attributes:
        path: The folder.
        config: The run's configuration.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Create the folder, which must not exist, with its ``config.json``.

        Raises:
            DeatError: The name is taken or the folder cannot be created.
        """
        check_free(path)
        # Created under a temporary name, so that the final name stays free if the process is killed.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir(parents=True)
            write_json(temporary / CONFIG, config.model_dump(mode="json"))
            temporary.rename(path)
        except OSError as error:
            raise DeatError(
                f"the run directory {path} cannot be created ({error.strerror}); choose another --output"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            DeatError: The folder is not a run directory, or its ``config.json`` is damaged.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise DeatError(f"{path} is not a run directory: it has no {CONFIG}")
        try:
            return cls(path, RunConfig.model_validate(read_json(path / CONFIG)))
        except ValidationError as error:
            raise DeatError(
                f"{path / CONFIG} is not a valid run configuration ({describe_validation_error(error)}); "
                "restore the file or start a new run"
            ) from None

    def refuse_links(self) -> None:
        """Check that the folder has no links or special files, which could make training access other files.

        Raises:
            DeatError: The folder contains a link or special file.
        """
        for folder in (self.path, self.checkpoints):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise DeatError(f"{path} is a link or special file, which runs never create; remove it")

    def reconfigure(self, config: RunConfig) -> RunDirectory:
        """Replace the configuration; if the epochs change, keep the old one as ``config-N-epochs.json``."""
        if config.optim.epochs != self.config.optim.epochs:
            write_json(
                self.path / f"config-{self.config.optim.epochs}-epochs.json", self.config.model_dump(mode="json")
            )
        write_json(self.path / CONFIG, config.model_dump(mode="json"))
        return RunDirectory(self.path, config)

    @property
    def is_extended(self) -> bool:
        """Whether ``--resume`` gave the run more epochs than it began with."""
        return any(self.path.glob("config-*-epochs.json"))

    @property
    def config_json(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return self.config.model_dump(mode="json")

    @property
    def model_spec(self) -> ModelSpec:
        """The network's specification."""
        return self.config.network

    @property
    def selected_weights_path(self) -> Path:
        """The path of the weights selected as the run's result.

        Raises:
            DeatError: The run has not written them yet.
        """
        path = self.path / f"{self.config.optim.select}.safetensors"
        if not path.is_file():
            done = "validated" if (self.path / "last.safetensors").is_file() else "finished"
            raise DeatError(f"{path} is missing, as the run has not {done} an epoch; continue it with --resume")
        return path

    @property
    def unfinished(self) -> str | None:
        """How many epochs a run has whose training has not ended, such as ``1 of 6 epochs``; None if it has ended.

        Open-ended runs have ended after every epoch; runs without valid metrics count as ended.
        """
        optim = self.config.optim
        try:
            rows = self.rows()
        except DeatError:
            return None
        if optim.epochs == OPEN or not rows or len(rows) >= optim.epochs:
            return None
        stopped = rows[-1].stopped  # with --no-early-stopping, a stopping rule's reason is only recorded
        if stopped is not None and (optim.early_stopping or stopped.startswith(NOT_RISEN)):
            return None
        return f"{len(rows)} of {counted(optim.epochs, 'epoch')}"

    @property
    def title(self) -> str:
        """The title of the run's plots: its name, method, dataset, architecture and seed."""
        config = self.config
        trained = f"{config.attack.method} on {config.data.dataset}, {config.model.arch}"
        return f"{self.path.name}: {trained}, seed {config.optim.seed}"

    @property
    def selected_epoch(self) -> int | None:
        """The epoch whose weights are the run's result so far; None before the first epoch has ended."""
        which = str(self.config.optim.select)
        if not (self.path / f"{which}.json").is_file():
            return None
        epoch = self.checkpoint(which).get("epoch")
        return epoch if isinstance(epoch, int) else None

    def command(self, name: str) -> str:
        """Return the command ``deat-rb NAME`` for this run, to be shown to the user."""
        return " ".join(["deat-rb", name, shlex.quote(str(self.path)), *trust_flag(self.config.model.arch)])

    def checkpoint(self, which: str) -> dict[str, Any]:
        """Return the epoch, metrics and SHA-256 of the ``best`` or ``last`` weights."""
        content = read_json(self.path / f"{which}.json")
        if not isinstance(content, dict):
            raise DeatError(f"{self.path / which}.json is not a JSON object; restore the file or start a new run")
        return content

    def check_evaluation(self, provenance: Mapping[str, str], advice: str) -> None:
        """Check that ``eval.json`` belongs to the run's selected weights and its data.

        Args:
            provenance: Provenance in ``eval.json``.
            advice: End of the error message: what to do.

        Raises:
            DeatError: It belongs to other weights or data, or the run has no weights.
        """
        for what, name, own in (
            ("weights", "weights_sha256", sha256_file(self.selected_weights_path)),
            ("data", "data_sha256", self.config.data_fingerprint),
        ):
            if (recorded := provenance.get(name)) != own:
                raise DeatError(f"{self.path / 'eval.json'} was computed for {what} other than the run's (SHA-256 "
                                f"{str(recorded)[:12]} instead of {own[:12]}): {advice}")  # fmt: skip

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def locked(self) -> AbstractContextManager[None]:
        """Lock the run, so that no other process can train in this folder.

        Raises:
            DeatError: Another process holds the lock.
        """
        return exclusive_lock(
            self.path / LOCK,
            busy=f"another process is training in {self.path}; wait until it finishes, or stop it",
            failed=f"cannot lock {self.path / LOCK} against other processes; check that it is writable",
        )

    def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None:
        """Write weights and their metrics, atomically."""
        tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
        save_tensors(self.path / f"{which}.safetensors", tensors)
        write_json(self.path / f"{which}.json", {**asdict(row), "sha256": sha256_tensors(tensors)})

    def discard_weights(self, which: str) -> None:
        """Remove weights and their metrics."""
        for suffix in (".safetensors", ".json"):
            (self.path / f"{which}{suffix}").unlink(missing_ok=True)

    def append(self, row: EpochStats) -> None:
        """Append an epoch to ``metrics.jsonl`` and sync it to the disk.

        Raises:
            UnwritableError: The file cannot be written; it is left unchanged.
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
            raise UnwritableError(f"{path} cannot be written ({error.strerror})") from None

    def discard_unfinished(self) -> None:
        """Remove incomplete files of a killed process."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def truncate(self, epochs: int) -> list[EpochStats]:
        """Keep only the metrics of the first ``epochs`` epochs, and return them.

        Raises:
            DeatError: There are fewer epochs.
        """
        path = self.path / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if len(lines) < epochs:
            raise DeatError(
                f"{path} has {counted(len(lines), 'epoch')} but the checkpoint has {epochs}; restore the file or start "
                "a new run"
            )
        if len(lines) > epochs:
            atomic_write(path, b"".join(lines[:epochs]))
        return self.rows()

    def rows(self) -> list[EpochStats]:
        """Return the metrics of the epochs so far.

        Raises:
            DeatError: A line does not contain an epoch's metrics.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                rows.append(_ROW.validate_json(line, strict=True))
            except ValidationError as error:
                raise DeatError(
                    f"{path}, line {number}, does not contain an epoch's metrics ({describe_validation_error(error)}); "
                    "restore the file or start a new run"
                ) from None
        return rows
