"""A leaderboard in a folder, which several people may write to at once.

entries/<dataset>/<threat>/<model_name>.json          what is known of a model; a model is on the board if this exists
weights/<dataset>/<threat>/<model_name>.safetensors   its weights, where the board holds them
history/<dataset>/<threat>/<model_name>/<number>/     what was replaced
.lock                                                 held while files are put in their places
.staging/                                             what a submission that is being put there consists of
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deat_rb.evaluation.runner import Progress
from deat_rb.leaderboard.entry import Entry, parse_entry, read_entries, weights_file
from deat_rb.leaderboard.measure import SAMPLE, Measure, check_sample
from deat_rb.leaderboard.submission import Submission, SubmissionMetadata, open_submission
from deat_rb.leaderboard.untrusted import MAX_JSON, read_limited, symlink_in_path
from deat_rb.leaderboard.untrusted_weights import MAX_WEIGHTS, as_safetensors
from deat_rb.robustbench.format import SPELLED
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import write_all
from deat_rb.utils.locks import exclusive_lock
from deat_rb.utils.text import printable
from deat_rb.utils.units import format_fraction

COMPLETE = "complete"

IN_TURN = ("history", "weights", "entries")
"""In this order files are moved to their places: an entry after what it speaks of."""


class Board:
    """A leaderboard.

    Attributes:
        path: Its folder, which need not exist before the first submission.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def entries(self, *, left_out: list[str] | None = None) -> tuple[Entry, ...]:
        """All entries; see `deat_rb.leaderboard.entry.read_entries`."""
        return read_entries(self.path, left_out=left_out)

    def submit(
        self,
        target: str | Path,
        metadata: SubmissionMetadata,
        *,
        n_examples: int | None = None,
        sample: int = SAMPLE,
        evaluate_anew: bool = False,
        replace: bool = False,
        keep_weights: bool = True,
        batch_size: int = 128,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> Entry:
        """Puts a model on the board, or leaves the board as it is.

        Args:
            target: A run directory, an export, or a checkpoint's file.
            metadata: What the submitter declares about the model.
            n_examples: On how many test images it is evaluated; by default all.
            sample: On how many examples the board measures again what an ``eval.json`` claims.
            evaluate_anew: Evaluates although there is an ``eval.json``.
            replace: Whether an entry of that name may be replaced; it is kept under ``history/``.
            keep_weights: Whether the board holds the weights.
            batch_size: How many images are attacked together.
            device: Where to evaluate.
            progress: See `deat_rb.evaluation.evaluate.evaluate`.

        Returns:
            The entry.

        Raises:
            DeatError: It is refused; the message says what for.
        """
        try:
            metadata.check()
            check_sample(sample)
            self._check_writable()
            with tempfile.TemporaryDirectory(prefix="deat-rb-") as scratch:
                submission = open_submission(Path(target), metadata, Path(scratch))
                known = self._facts(submission, metadata)
                draft = Entry.checked({**known, "kind": "published"}, f"the entry of {submission.source}")
                self._check_free(draft.key, replace)
                measure = Measure(submission, n_examples, sample, batch_size, device, progress)
                anew = evaluate_anew or submission.claim is None
                fields = measure.measure_all() if anew else measure.verify_claim()
                weights = as_safetensors(submission.model)
                kept = weights_file(draft.dataset, draft.threat_model, draft.model_name) if keep_weights else None
                entry = Entry.checked(
                    {**fields, **known, "eps": fields["eps"], "kind": "measured", "weights_file": kept,
                     "weights_sha256": hashlib.sha256(weights).hexdigest()},
                    f"the entry of {submission.source}",
                )  # fmt: skip
                self.commit(entry, weights if keep_weights else None, replace=replace)
        except DeatError as error:
            raise DeatError(printable(str(error), 1000)) from error
        return entry

    def _facts(self, submission: Submission, metadata: SubmissionMetadata) -> dict[str, Any]:
        """All of an entry but what has to be measured."""
        dataset, fingerprint = submission.dataset_name, submission.data.fingerprint
        return {
            **submission.facts,
            "model_name": metadata.model_name,
            "dataset": dataset,
            "dataset_note": self._note(dataset, fingerprint, metadata.dataset_note),
            "eps": format_fraction(submission.eps),
            "n_test": len(submission.data.test),
            "model": submission.spec,
            "classes": submission.data.classes,
            "data_sha256": fingerprint,
            "submitted": datetime.now(UTC).date().isoformat(),
        }

    def _check_writable(self) -> None:
        """Refuses a board that cannot be written before it is waited for an evaluation."""
        here = self.path
        while not here.exists() and here != here.parent:
            here = here.parent
        folders = (here, *(self.path / kind for kind in (".lock", *IN_TURN) if (self.path / kind).exists()))
        shut = next((folder for folder in folders if not os.access(folder, os.W_OK)), None)
        if shut is not None or not here.is_dir():
            raise DeatError(f"the board {self.path} cannot be written: {shut or here} is "
                            f"{'no folder' if shut is None else 'read-only, or not yours to write'}")  # fmt: skip

    def _check_free(self, place: str, replace: bool) -> None:
        path = self.path / "entries" / f"{place}.json"
        if path.exists() and not replace:
            raise DeatError(f"the board has {place} already: choose another model name, or replace it by --replace")
        near = [other for other in path.parent.glob("*.json") if other.name.casefold() == path.name.casefold()]
        if near and near[0] != path:
            raise DeatError(f"the board has {near[0].stem}, which differs from {path.stem} by small and capital "
                            "letters only: choose another model name")  # fmt: skip

    def _note(self, dataset: str, fingerprint: str | None, note: str | None) -> str | None:
        """What the board says of a data set: once said, it stands.

        Raises:
            DeatError: On the board that name is of other data, or something else is said of them.
        """
        own = [entry for entry in (self.entries(left_out=[]) if (self.path / "entries").is_dir() else ())
               if entry.kind == "measured" and entry.dataset == dataset]  # fmt: skip
        for entry in own:
            if entry.data_sha256 != fingerprint:
                raise DeatError(f"{dataset} on this board is other data (SHA-256 {str(entry.data_sha256)[:12]}..., "
                                f"submitted are {str(fingerprint)[:12]}...): choose another --dataset-name"
                                )  # fmt: skip
            if note not in (None, entry.dataset_note):
                raise DeatError(f"the board says of {dataset}: {entry.dataset_note}; leave --dataset-note out, or say "
                                "the same")  # fmt: skip
        if own:
            return own[0].dataset_note
        spelled = dataset in compat.DATASETS or dataset in SPELLED
        return note if note is not None or spelled else f"images of the folder {dataset}"

    def commit(self, entry: Entry, weights: bytes | None, *, replace: bool = False) -> None:
        """Puts an entry and its weights in their places: both or none, after whoever is at it has finished.

        A process that is killed meanwhile leaves the board as it was, or a submission that is complete in ``.staging``
        and that the next one to lock the board puts in its place.

        Raises:
            DeatError: The name is taken, or the folder cannot be written.
        """
        record = entry.json_bytes()
        parse_entry(record, entry.key)
        if len(record) > MAX_JSON:
            raise DeatError(f"the entry {entry.key} takes {len(record)} bytes, and {MAX_JSON} are allowed: its "
                            "metrics.jsonl is too long")  # fmt: skip
        with self.locked():
            self._check_free(entry.key, replace)
            if entry.kind == "measured":
                self._note(entry.dataset, entry.data_sha256, entry.dataset_note)
            try:
                contents = {**self._replaced(entry), f"entries/{entry.key}.json": record}
                if weights is not None:
                    contents[weights_file(entry.dataset, entry.threat_model, entry.model_name)] = weights
                self._stage(contents)
            except BaseException:
                shutil.rmtree(self.staging, ignore_errors=True)
                raise
            self._install()

    @property
    def staging(self) -> Path:
        """Where a submission is put together."""
        return self.path / ".staging"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until nobody else writes to the board, and finishes what a killed process has left.

        What is written meanwhile is as accessible to others as the board's folder: where that is a group's, every
        member can replace it.

        Raises:
            DeatError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = os.umask(0o777 & ~self.path.stat().st_mode)
            try:
                with exclusive_lock(self.path / ".lock", failed=f"the board {self.path} cannot be written"):
                    self._recover()
                    yield
            finally:
                os.umask(before)
        except OSError as error:
            raise DeatError(f"the board {self.path} cannot be written ({error.strerror or error})") from None

    @contextmanager
    def read_locked(self) -> Iterator[None]:
        """Holds the board as it is while it is read, where this user could change it."""
        with self.locked() if os.access(self.path, os.W_OK) else contextlib.nullcontext():
            yield

    def recover(self) -> None:
        """Finishes what a killed process has left, if there is anything."""
        if self.staging.exists():
            with self.locked():
                pass

    def _recover(self) -> None:
        if self.staging.is_symlink() or (self.staging.exists() and not self.staging.is_dir()):
            raise DeatError(f"{self.staging} is no folder, and submissions are put together there: remove it")
        if (self.staging / COMPLETE).exists():
            self._install()
        elif self.staging.exists():
            shutil.rmtree(self.staging)

    def _stage(self, contents: Mapping[str, bytes]) -> None:
        """Writes all files, and sees to it that each can be moved to its place."""
        for place in contents:
            self._check_inside(place)
            for folder in ((self.staging / place).parent, (self.path / place).parent):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.access((self.path / place).parent, os.W_OK):
                raise PermissionError(errno.EACCES, f"{(self.path / place).parent} is not yours to write")
        write_all({self.staging / place: data for place, data in contents.items()})
        write_all({self.staging / COMPLETE: b""})

    def _check_inside(self, place: str) -> None:
        """Sees to it that nothing on the way to a place in the board leads out of it."""
        link = symlink_in_path(self.path, place)
        if link is not None:
            raise DeatError(f"{link} is a link, and would lead out of the board: remove it")

    def _install(self) -> None:
        """Moves what is complete to its places, the entry last; may be begun again wherever it was cut off."""
        staged = [path for kind in IN_TURN for path in sorted((self.staging / kind).rglob("*")) if path.is_file()]
        for path in staged:
            place = path.relative_to(self.staging)
            self._check_inside(str(place))
            if place.parts[0] == "entries":
                entry = parse_entry(read_limited(path, MAX_JSON), str(path))
                if entry.weights_file is None:
                    _, dataset, threat_model, _ = place.parts
                    (self.path / weights_file(dataset, threat_model, place.stem)).unlink(missing_ok=True)
            (self.path / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.path / place)
            _sync(self.path / place)
        shutil.rmtree(self.staging)

    def _replaced(self, entry: Entry) -> dict[str, bytes]:
        """The files that an entry replaces, at their places in the history."""
        old = self.path / "entries" / f"{entry.key}.json"
        if not old.exists():
            return {}
        history = self.path / "history" / entry.key
        number = 1 + max((int(path.name) for path in history.glob("[0-9]*") if path.name.isdecimal()), default=0)
        weights = self.path / weights_file(entry.dataset, entry.threat_model, entry.model_name)
        kept = {old: MAX_JSON} | ({weights: MAX_WEIGHTS} if weights.exists() else {})
        return {f"history/{entry.key}/{number:04}/{path.name}": read_limited(path, limit)
                for path, limit in kept.items()}  # fmt: skip


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
