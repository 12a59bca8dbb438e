"""On-disk store of per-batch attack results, from which an interrupted evaluation can be resumed.

    evaluation.json              the settings of the evaluation, all of which must match to resume it
    <16 hex digits>.safetensors  the result of one batch, named by a hash of its radius, attack, stage and batch number

Each file is written atomically and never changed. The folder is removed when the evaluation has finished.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from deat_rb.evaluation.report import Report
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json
from deat_rb.utils.locks import HELD, exclusive_lock
from deat_rb.utils.safe_load import load_tensors, save_tensors
from deat_rb.utils.text import counted

SETTINGS = "evaluation.json"

LOCK = ".lock"

LOCK_FILES = (LOCK, LOCK + HELD)

FORMAT = "2"
"""Format version; part of the settings, so that folders in another format are not resumed."""

_BATCH = re.compile(r"[0-9a-f]{5,16}\.safetensors")
_OWN = re.compile(rf"{re.escape(SETTINGS)}|{_BATCH.pattern}|{'|'.join(map(re.escape, LOCK_FILES))}|\..*\.tmp")


class UnusableStoreError(DeatError):
    """The stored results are damaged or of a different evaluation; ``resume=False`` discards them."""


class ResumeStore:
    """Per-batch results in a folder; without a folder, nothing is stored.

    Attributes:
        folder: The folder, or None.
        message: Message to the user about what was resumed or discarded; empty if nothing was.
        is_new: Whether the store started empty.
        has_attacks: Whether it has results other than those on clean images.
        advice: What the user does to continue.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.message = ""
        self.is_new = False
        self.has_attacks = False
        self.advice = "repeat the command"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the stored result of the batch ``key``, or None.

        Raises:
            UnusableStoreError: The file is damaged.
        """
        if self.folder is None or not (file := self._file(key)).exists():
            return None
        try:
            return load_tensors(file)
        except DeatError as error:
            raise UnusableStoreError(
                f"{error}: the stored results of the evaluation are damaged; start over with --no-resume"
            ) from None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the result of the batch ``key``.

        Raises:
            DeatError: The result cannot be written; earlier batches are not affected.
        """
        if self.folder is None:
            return
        try:
            save_tensors(self._file(key), tensors)
        except DeatError as error:
            raise DeatError(f"{error}; {self.status}" if self.status else str(error)) from error

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{sha256(key.encode()).hexdigest()[:16]}.safetensors"

    @property
    def status(self) -> str:
        """Message to the user on an interruption; empty if nothing is stored."""
        count = 0 if self.folder is None else _count_batches(self.folder)
        are = "batch is" if count == 1 else "batches are"
        return f"{count} {are} stored in {self.folder}; {self.advice} to continue" if count else ""


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds an unfinished evaluation."""
    return (folder / SETTINGS).is_file()


def resume_or_restart(measure: Callable[..., Report]) -> Report:
    """Return the report of ``measure``; where what it has stored cannot be resumed, discard that and start over."""
    try:
        return measure()
    except UnusableStoreError:
        return measure(resume=False)


@contextmanager
def open_store(folder: str | Path | None, settings: Mapping[str, str], resume: bool | None) -> Iterator[ResumeStore]:
    """Open the store of an evaluation; remove it if the evaluation succeeds, or fails before any attack.

    Args:
        folder: Folder of the store; None to store nothing.
        settings: Settings of the evaluation, which must match those of the stored batches.
        resume: True to require stored batches, False to discard them; None to resume if there are any.

    Raises:
        UnusableStoreError: The stored batches belong to another evaluation.
        DeatError: There is nothing to resume, another process is using the folder, or the folder is not writable or
            contains other files.
    """
    if folder is None:
        if resume:
            raise DeatError("--resume needs a run directory or --json: unfinished evaluations are stored next to these")
        yield ResumeStore(None)
        return
    folder = Path(folder)
    with _locked(folder, resume):
        store = _prepare(folder, {**settings, "format": FORMAT}, resume)
        try:
            yield store
        except DeatError:
            if store.is_new and not store.has_attacks:
                _clear(folder, lock=True)
            raise
        _clear(folder, lock=True)


@contextmanager
def _locked(folder: Path, resume: bool | None) -> Iterator[None]:
    """Lock the folder against other processes until the context is left; then remove it if it is empty."""
    if resume and not is_unfinished(folder):
        raise DeatError(f"there is no unfinished evaluation in {folder}: omit --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := [name for name in os.listdir(folder) if not _OWN.fullmatch(name)]:
            raise DeatError(f"{folder} cannot store an unfinished evaluation, because it contains {others[0]}: give "
                            "another folder")  # fmt: skip
    except OSError as error:
        raise DeatError(f"{folder} cannot store an unfinished evaluation ({error.strerror}): free some space, or copy "
                        "the run to a writable folder") from None  # fmt: skip
    busy = f"another process is evaluating in {folder}; wait for it or stop it"
    try:
        with exclusive_lock(folder / LOCK, busy=busy, failed=f"{folder} cannot store an unfinished evaluation"):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def _prepare(folder: Path, settings: Mapping[str, str], resume: bool | None) -> ResumeStore:
    store, count = ResumeStore(folder), _count_batches(folder)
    if resume is False:
        store.advice += " without --no-resume"
    exists = is_unfinished(folder)
    if exists and resume is not False and (count or resume):
        if differing := _differing(folder, settings):
            raise UnusableStoreError(
                f"{folder} holds {counted(count, 'batch')} of a different evaluation ({differing}): finish that one "
                "first, or start over with --no-resume"
            )
        store.message = f"resuming from {counted(count, 'batch')} in {folder}" if count else ""
        return store
    if exists and resume is False:
        store.message = f"discarded an unfinished evaluation of {counted(count, 'batch')}"
    _clear(folder)
    write_json(folder / SETTINGS, dict(settings))
    store.is_new = True
    return store


def _count_batches(folder: Path) -> int:
    return sum(_BATCH.fullmatch(name) is not None for name in os.listdir(folder)) if folder.is_dir() else 0


def _clear(folder: Path, *, lock: bool = False) -> None:
    """Remove the store's files, the settings first, and with ``lock`` the lock file as well."""
    (folder / SETTINGS).unlink(missing_ok=True)
    for name in os.listdir(folder):
        if _OWN.fullmatch(name) and name not in LOCK_FILES:
            (folder / name).unlink(missing_ok=True)
    for name in LOCK_FILES if lock else ():
        with contextlib.suppress(PermissionError):  # Windows keeps a held lock file; there, its release removes it
            (folder / name).unlink(missing_ok=True)


def _differing(folder: Path, settings: Mapping[str, str]) -> str:
    """Describe the settings that differ from the stored ones; empty if none does."""
    try:
        stored = read_json(folder / SETTINGS)
    except DeatError:
        stored = None
    if not isinstance(stored, dict):
        return "its settings are damaged"
    names = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    return "; ".join(f"{name}: {stored.get(name)}, now {settings.get(name)}" for name in names)
