"""What a killed evaluation is continued from: a file for every batch that an attack has done.

evaluation.json      of what the evaluation is: every field has to be the same for another to continue it
00001.safetensors    the first batch: what was found, and a digest of that and of which attack, part and batch it is

A file is written whole or not at all, and none is ever changed, so that there is nothing to lose at any moment.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json
from deat_rb.utils.locks import exclusive_lock
from deat_rb.utils.safe_load import load_tensors, save_tensors, sha256_tensors

FINGERPRINT = "evaluation.json"

LOCK = ".lock"

DIGEST = "digest"

_OWN = re.compile(r"evaluation\.json|[0-9]{5,}\.safetensors|\.lock|\..*\.tmp")


class ResumeStore:
    """The folder, or with no folder nothing: then nothing is kept and nothing found.

    Attributes:
        folder: Where the batches are.
        continued: How many batches were there already.
        said: What became of a journal that was found, for the user; empty where there was none.
        begun: Whether it was begun now, and nothing in it is of earlier.
        attacked: Whether it holds more than the pass without an attack, and so something worth keeping.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.continued = 0
        self.said = ""
        self.begun = False
        self.attacked = False
        self._number = 0

    def find(self, key: str) -> dict[str, Tensor] | None:
        """Gives the next batch where it is there already, and moves on to the one after it.

        Args:
            key: Of which eps, attack, part and batch it has to be.

        Raises:
            DeatError: The file there is damaged or another's.
        """
        self._number += 1
        if self.folder is None or not self._file.exists():
            return None
        try:
            tensors = load_tensors(self._file)
        except DeatError as error:
            raise DeatError(f"{error}: the kept evaluation is damaged; start anew by --no-resume") from None
        found = tensors.pop(DIGEST, torch.zeros(0))
        if found.tolist() != _digest(key, tensors):
            raise DeatError(f"{self._file} is damaged, or not of {key}; start anew by --no-resume")
        self.continued += 1
        return tensors

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the batch that `find` did not find.

        Raises:
            DeatError: It cannot be written; what was kept before is still there.
        """
        if self.folder is None:
            return
        digest = torch.tensor(_digest(key, tensors), dtype=torch.uint8)
        try:
            save_tensors(self._file, {**tensors, DIGEST: digest})
        except DeatError as error:
            raise DeatError(f"{error}; {self.kept}" if self.kept else str(error)) from error

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._number:05}.safetensors"

    @property
    def kept(self) -> str:
        """What to say where an evaluation is interrupted; empty where nothing is kept."""
        done = 0 if self.folder is None else len(list(self.folder.glob("*.safetensors")))
        are = "batch is" if done == 1 else "batches are"
        return f"{done} {are} in {self.folder}; the same command with --resume continues" if done else ""


def _digest(key: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """The SHA-256 of a batch and of what it is, as bytes: a flipped bit would change a verdict without a word."""
    return list(sha256(f"{key}\0{sha256_tensors(tensors)}".encode()).digest())


@contextmanager
def opened(folder: str | Path | None, fingerprint: Mapping[str, str], resume: bool | None) -> Iterator[ResumeStore]:
    """Opens the journal of an evaluation, and removes it where the evaluation ends well, or fails before any attack.

    Args:
        folder: Where it is kept; None for nowhere.
        fingerprint: Of what the evaluation is.
        resume: True to continue and nothing else, False to start anew; None to continue what is there, if anything is.

    Raises:
        DeatError: There is nothing to continue, it is of another evaluation, another process is at it, or the folder
            cannot be used.
    """
    if folder is None:
        if resume:
            raise DeatError("there is nowhere to continue from: an evaluation is kept where its report is written")
        yield ResumeStore(None)
        return
    journal = ResumeStore(Path(folder))
    with _locked(Path(folder), fingerprint, resume):
        _prepare(journal, fingerprint, resume)
        try:
            yield journal
        except DeatError:
            if journal.begun and not journal.attacked:
                _clear(Path(folder), all_of_it=True)
            raise
        _clear(Path(folder), all_of_it=True)


@contextmanager
def _locked(folder: Path, fingerprint: Mapping[str, str], resume: bool | None) -> Iterator[None]:
    """Keeps another process from the folder; the lock dies with its owner."""
    if resume and not (folder / FINGERPRINT).is_file():
        raise DeatError(f"there is no unfinished evaluation in {folder}: leave out --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = [name for name in os.listdir(folder) if not _OWN.fullmatch(name)]
        if strange:
            raise DeatError(f"an unfinished evaluation cannot be kept in {folder}, which holds {strange[0]}: give "
                            "a folder of its own")  # fmt: skip
    except OSError as error:
        raise DeatError(f"an unfinished evaluation cannot be kept in {folder} ({error.strerror}): make room for it "
                        "there, or copy the run to where you may write") from None  # fmt: skip
    busy = f"another process is evaluating in {folder}; wait for it or end it"
    with exclusive_lock(folder / LOCK, busy=busy, failed=f"an unfinished evaluation cannot be kept in {folder}"):
        yield


def _prepare(journal: ResumeStore, fingerprint: Mapping[str, str], resume: bool | None) -> None:
    folder = journal.folder
    assert folder is not None
    there = (folder / FINGERPRINT).is_file()
    batches = len(list(folder.glob("*.safetensors")))
    differing = _differing(folder, fingerprint) if there and (batches or resume) else ""
    if differing and resume is not False:
        raise DeatError(f"the unfinished evaluation in {folder}, of {batches} batches, is another's ({differing}): "
                        "end that one first, or start anew by --no-resume")  # fmt: skip
    if there and resume is not False:
        journal.said = f"continued from {batches} batches in {folder}" if batches else ""
    elif there:
        journal.said = f"an unfinished evaluation of {batches} batches was discarded, as asked"
    if not batches or not there or resume is False:
        _clear(folder, all_of_it=False)
        write_json(folder / FINGERPRINT, dict(fingerprint))
        journal.begun = True


def _clear(folder: Path, *, all_of_it: bool) -> None:
    """Removes the journal's own files, the description first, and with ``all_of_it`` the lock and the folder."""
    (folder / FINGERPRINT).unlink(missing_ok=True)
    for name in os.listdir(folder):
        if _OWN.fullmatch(name) and (all_of_it or name != LOCK):
            (folder / name).unlink(missing_ok=True)
    if all_of_it:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _differing(folder: Path, fingerprint: Mapping[str, str]) -> str:
    """Names what differs between what is kept and what is asked for; empty where nothing does."""
    try:
        kept = read_json(folder / FINGERPRINT)
    except DeatError:
        kept = None
    if not isinstance(kept, dict):
        return "its description is damaged"
    names = [name for name in {**kept, **fingerprint} if kept.get(name) != fingerprint.get(name)]
    return "; ".join(f"{name}: {kept.get(name)}, now {fingerprint.get(name)}" for name in names)
