"""A leaderboard in a folder, which several people may write to at once.

entries/<dataset>/<threat>/<model_name>.json          what is known of a model; a model is on the board if this exists
weights/<dataset>/<threat>/<model_name>.safetensors   its weights, where the board holds them
history/<dataset>/<threat>/<model_name>/<number>/     what was replaced
.lock                                                 held while files are put in their places
.staging/                                             what a submission that is being put there consists of
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deat_rb.board.entries import Entry, parse_entry, read_entries, read_entry, weights_file
from deat_rb.board.foreign import MAX_WEIGHTS, as_safetensors
from deat_rb.board.intake import MAX_JSON, printable, read_limited
from deat_rb.board.measuring import SAMPLE, Measure
from deat_rb.board.submissions import Submission, Terms, dataset_note, open_submission
from deat_rb.errors import DeatError
from deat_rb.evaluation.attacking import Progress
from deat_rb.files import write_together

COMPLETE = "complete"


class Board:
    """A leaderboard.

    Attributes:
        path: Its folder, which need not exist before the first submission.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def entries(self) -> tuple[Entry, ...]:
        """All entries; see `deat_rb.board.entries.read_entries`."""
        return read_entries(self.path)

    def submit(
        self,
        target: str | Path,
        terms: Terms,
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
            terms: What the submitter says of it.
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
            with tempfile.TemporaryDirectory(prefix="deat-rb-") as scratch:
                submission = open_submission(Path(target), terms, Path(scratch))
                place = f"{submission.dataset_name}/Linf/{terms.model_name}"
                self._check_free(place, replace)
                self._check_data(submission.dataset_name, submission.data.fingerprint)
                measure = Measure(submission, n_examples, sample, batch_size, device, progress)
                anew = evaluate_anew or submission.claim is None
                fields = measure.all_of_it() if anew else measure.of_the_claim()
                weights = as_safetensors(submission.model)
                entry = _entry(submission, terms, fields, weights, keep_weights)
                self.commit(entry, weights if keep_weights else None, replace=replace)
        except DeatError as error:
            raise DeatError(printable(str(error), 1000)) from error
        return entry

    def _check_free(self, place: str, replace: bool) -> None:
        path = self.path / "entries" / f"{place}.json"
        if path.exists() and not replace:
            raise DeatError(f"the board has {place} already: choose another model name, or replace it by --replace")
        near = [other for other in path.parent.glob("*.json") if other.name.casefold() == path.name.casefold()]
        if near and near[0] != path:
            raise DeatError(f"the board has {near[0].stem}, which differs from {path.stem} by small and capital "
                            "letters only: choose another model name")  # fmt: skip

    def _check_data(self, dataset: str, fingerprint: str) -> None:
        for path in sorted(self.path.glob(f"entries/{dataset}/*/*.json")):
            known = read_entry(path).data_sha256
            if known not in (None, fingerprint):
                raise DeatError(f"{dataset} on this board is other data (SHA-256 {known[:12]}..., submitted are "
                                f"{fingerprint[:12]}...): choose another --dataset-name")  # fmt: skip

    def commit(self, entry: Entry, weights: bytes | None, *, replace: bool = False) -> None:
        """Puts an entry and its weights in their places: both or none, after whoever is at it has finished.

        A process that is killed meanwhile leaves the board as it was, or a submission that is complete in ``.staging``
        and that the next one to lock the board puts in its place.

        Raises:
            DeatError: The name is taken, or the folder cannot be written.
        """
        record = entry.json_bytes()
        parse_entry(record, entry.key)
        with self.locked():
            self._check_free(entry.key, replace)
            contents = {**self._replaced(entry), f"entries/{entry.key}.json": record}
            if weights is not None:
                contents[weights_file(entry.dataset, entry.threat_model, entry.model_name)] = weights
            try:
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

        Raises:
            DeatError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DeatError(f"the board {self.path} cannot be written ({error.strerror})") from None
        with open(descriptor, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._recover()
            yield

    def recover(self) -> None:
        """Finishes what a killed process has left, if there is anything."""
        if self.staging.exists():
            with self.locked():
                pass

    def _recover(self) -> None:
        if (self.staging / COMPLETE).exists():
            self._install()
        elif self.staging.exists():
            shutil.rmtree(self.staging)

    def _stage(self, contents: Mapping[str, bytes]) -> None:
        for place in contents:
            self._check_inside(place)
            (self.staging / place).parent.mkdir(parents=True, exist_ok=True)
        write_together({self.staging / place: data for place, data in contents.items()})
        write_together({self.staging / COMPLETE: b""})

    def _check_inside(self, place: str) -> None:
        """Sees to it that nothing on the way to a place in the board leads out of it."""
        path = self.path
        for part in Path(place).parts:
            path = path / part
            if path.is_symlink() or part == "..":
                raise DeatError(f"{path} is a link, and would lead out of the board: remove it")

    def _install(self) -> None:
        """Moves what is complete to its places, the entry last; may be begun again wherever it was cut off."""
        staged = [path for path in self.staging.rglob("*") if path.is_file() and path.name != COMPLETE]
        order = ("history", "weights", "entries")
        entry = next((parse_entry(read_limited(path, MAX_JSON), str(path)) for path in staged
                      if path.relative_to(self.staging).parts[0] == "entries"), None)  # fmt: skip
        for path in sorted(staged, key=lambda each: order.index(each.relative_to(self.staging).parts[0])):
            place = str(path.relative_to(self.staging))
            self._check_inside(place)
            if place.startswith("entries") and entry is not None and entry.weights_file is None:
                weights = weights_file(entry.dataset, entry.threat_model, entry.model_name)
                (self.path / weights).unlink(missing_ok=True)
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


def _entry(
    submission: Submission, terms: Terms, fields: Mapping[str, Any], weights: bytes, keep_weights: bool
) -> Entry:
    dataset = submission.dataset_name
    content = {
        "dataset_note": dataset_note(submission),
        **fields,
        **submission.facts,
        "model_name": terms.model_name,
        "kind": "measured",
        "dataset": dataset,
        "n_test": len(submission.data.test),
        "versions": fields["versions"],
        "model": submission.spec,
        "classes": submission.data.classes,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_file": weights_file(dataset, "Linf", terms.model_name) if keep_weights else None,
        "data_sha256": submission.data.fingerprint,
        "submitted": datetime.now(UTC).date().isoformat(),
    }
    return Entry.checked(content, f"the entry of {submission.source}")
