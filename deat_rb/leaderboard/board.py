"""A leaderboard stored in a folder; concurrent writers are supported.

entries/<dataset>/<threat>/<model_name>.json          the record of a model; a model is on the board if this exists
weights/<dataset>/<threat>/<model_name>.safetensors   its weights, if the board stores them
history/<dataset>/<threat>/<model_name>/<number>/     replaced entries
.lock                                                 held while files are written
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deat_rb.evaluation.runner import Progress
from deat_rb.leaderboard.entry import Entry, parse_entry, read_entries
from deat_rb.leaderboard.measure import SAMPLE, check_sample, evaluate_fully, verify_claim
from deat_rb.leaderboard.ranking import Images, images_of
from deat_rb.leaderboard.submission import Submission, SubmissionMetadata, open_submission
from deat_rb.leaderboard.untrusted import MAX_JSON, read_limited, symlink_in_path
from deat_rb.leaderboard.untrusted_weights import MAX_WEIGHTS, as_safetensors
from deat_rb.robustbench.format import SPELLED
from deat_rb.runs.hub_run import HubModel, open_hub
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import write_all
from deat_rb.utils.hub import is_hub
from deat_rb.utils.locks import exclusive_lock
from deat_rb.utils.text import printable
from deat_rb.utils.units import format_fraction


class Board:
    """A leaderboard.

    Attributes:
        path: Folder of the board, created by the first submission.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def entries(self, *, left_out: list[str] | None = None) -> tuple[Entry, ...]:
        """Return all entries; see `deat_rb.leaderboard.entry.read_entries`."""
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
        batch_size: int | None = None,
        device: str | None = None,
        progress: Progress | None = None,
        notify: Callable[[str], None] = lambda sentence: None,
    ) -> Entry:
        """Evaluate a model and add it to the board; a refused submission leaves the board unchanged.

        Args:
            target: A run directory, an export, a checkpoint file, or a run or checkpoint on the Hugging Face Hub
                (``hf:owner/name``).
            metadata: Metadata declared by the submitter.
            n_examples: Number of test images to evaluate on; by default all.
            sample: Number of examples on which an existing ``eval.json`` is re-measured.
            evaluate_anew: Run the full evaluation even if there is an ``eval.json``.
            replace: Replace an existing entry of the same name, moving it to ``history/``.
            keep_weights: Store the weights on the board.
            batch_size: Number of images attacked at a time.
            device: Device of the evaluation.
            progress: See `deat_rb.evaluation.evaluate.evaluate`.
            notify: Called with each sentence for the user, such as that a cached model of the Hub is used.

        Returns:
            The entry.

        Raises:
            DeatError: The submission is refused; the message says why.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
        hub: HubModel | None = None
        given = Path(target)
        try:
            metadata.check()
            check_sample(sample)
            self._check_writable()
            with tempfile.TemporaryDirectory(prefix="deat-rb-") as scratch:
                if is_hub(target):
                    hub = open_hub(str(target))
                    for sentence in hub.notes:
                        notify(sentence)
                    given = hub.copy(Path(scratch) / "hub")
                submission = open_submission(given, metadata, Path(scratch))
                facts = self._facts(submission, metadata)
                source = f"the entry of {submission.source}"
                draft = Entry.create({**facts, "kind": "published"}, source)
                self._check_free(draft.key, replace)
                weights = as_safetensors(submission.model)
                accepted: list[Entry] = []

                def accept(measured: dict[str, Any]) -> None:
                    entry = Entry.create(
                        {**measured, **_without_beaten_external(facts, measured), "eps": measured["eps"],
                         "kind": "measured", "weights_file": draft.weights_place if keep_weights else None,
                         "weights_sha256": hashlib.sha256(weights).hexdigest()},
                        source,
                    )  # fmt: skip
                    self.commit(entry, weights if keep_weights else None, replace=replace)
                    accepted.append(entry)

                if evaluate_anew or submission.claim is None:
                    evaluate_fully(submission, n_examples, accept, **options)
                else:
                    accept(verify_claim(submission, n_examples, sample, **options))
        except DeatError as error:
            message = str(error) if hub is None else str(error).replace(str(given), hub.address)
            raise DeatError(printable(message, 1000)) from error
        return accepted[0]

    def _facts(self, submission: Submission, metadata: SubmissionMetadata) -> dict[str, Any]:
        """Return all fields of the entry except the measured ones."""
        dataset, fingerprint = submission.dataset_name, submission.data.fingerprint
        return {
            **submission.facts,
            "model_name": metadata.model_name,
            "dataset": dataset,
            "dataset_note": self._dataset_note(
                dataset, Images(fingerprint, len(submission.data.test), metadata.dataset_note)
            ),
            "eps": format_fraction(submission.eps),
            "threat_model": submission.norm,
            "n_test": len(submission.data.test),
            "model": submission.spec,
            "classes": submission.classes,
            "data_sha256": fingerprint,
            "submitted": datetime.now(UTC).date().isoformat(),
        }

    def _check_writable(self) -> None:
        """Raise if the board is not writable, before the evaluation is run."""
        here = self.path
        while not here.exists() and here != here.parent:
            here = here.parent
        if not here.is_dir():
            raise DeatError(f"the board {self.path} cannot be written: {here} is not a folder")
        paths = (here, *(self.path / kind for kind in (".lock", "history", "weights", "entries")))
        readonly = next((path for path in paths if path.exists() and not os.access(path, os.W_OK)), None)
        if readonly is not None:
            raise DeatError(f"the board {self.path} cannot be written: no permission to write {readonly}")

    def _check_free(self, key: str, replace: bool) -> None:
        path = self.path / "entries" / f"{key}.json"
        if path.exists() and not replace:
            raise DeatError(f"the board already has {key}: choose another --model-name, or replace it with --replace")
        for other in path.parent.glob("*.json"):
            if other.name.casefold() == path.name.casefold() and other != path:
                raise DeatError(f"the board has {other.stem}, which differs from {path.stem} only in letter case: "
                                "choose another --model-name")  # fmt: skip

    def _dataset_note(self, dataset: str, images: Images) -> str | None:
        """Return the note of a dataset's images, which all of their entries should share.

        Raises:
            DeatError: The board has different data or a different note under this name.
        """
        entries = self.entries(left_out=[]) if (self.path / "entries").is_dir() else ()
        own = [entry for entry in entries if entry.kind == "measured" and entry.dataset == dataset]
        notes = [entry.dataset_note for entry in own if images_of(entry)[:2] == images[:2]]
        if own and not notes:
            raise DeatError(f"{dataset} has different data on this board (SHA-256 {str(own[0].data_sha256)[:12]}, "
                            f"{own[0].n_test} images; submitted {str(images.data_sha256)[:12]}, {images.n_test} "
                            "images): choose another --dataset-name")  # fmt: skip
        note = images.note
        if notes and note not in (None, *notes):
            raise DeatError(f"--dataset-note differs from the board's note for {dataset}, '{notes[0]}': omit it")
        if notes:
            return note or notes[0]
        known = dataset in compat.DATASETS or dataset in SPELLED
        return note if note is not None or known else f"images of the folder {dataset}"

    def commit(self, entry: Entry, weights: bytes | None, *, replace: bool = False) -> None:
        """Write an entry and its weights under the board's lock, each file atomically and the entry last.

        If the process is killed between two renames, the old entry may be left with its successor's weights; these are
        rejected, since their SHA-256 does not match, until the model is submitted again.

        Raises:
            DeatError: The name is taken, a symlink leads out of the board, or the folder is not writable.
        """
        record = entry.json_bytes()
        parse_entry(record, entry.key)
        if len(record) > MAX_JSON:
            raise DeatError(f"the entry {entry.key} is too large: {len(record)} bytes (at most {MAX_JSON}), "
                            "because its metrics.jsonl is too long")  # fmt: skip
        with self.locked():
            self._check_free(entry.key, replace)
            if entry.kind == "measured":
                self._dataset_note(entry.dataset, images_of(entry))
            contents = self._replaced(entry)
            if weights is not None:
                contents[entry.weights_place] = weights
            contents[f"entries/{entry.key}.json"] = record
            for place in (*contents, entry.weights_place):
                if (link := symlink_in_path(self.path, place)) is not None:
                    raise DeatError(f"{link} is a symlink and may lead out of the board: remove it")
            for place in contents:
                (self.path / place).parent.mkdir(parents=True, exist_ok=True)
            write_all({self.path / place: data for place, data in contents.items()})
            if weights is None:
                (self.path / entry.weights_place).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the board's lock, after removing temporary files left by killed processes.

        Files written while it is held get the permissions of the board's folder, so that a group can share the board.

        Raises:
            DeatError: The folder is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            umask = os.umask(0o777 & ~self.path.stat().st_mode)
            try:
                with exclusive_lock(self.path / ".lock", failed=f"the board {self.path} cannot be written"):
                    self._remove_unfinished()
                    yield
            finally:
                os.umask(umask)
        except OSError as error:
            raise DeatError(f"the board {self.path} cannot be written ({error.strerror or error})") from None

    def _remove_unfinished(self) -> None:
        """Remove temporary files of `write_all` left by killed processes."""
        for folder, folders, names in os.walk(self.path):  # follows no symlinks
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", name):
                    Path(folder, name).unlink(missing_ok=True)

    @contextmanager
    def read_locked(self) -> Iterator[None]:
        """Hold the lock while reading, if this user can write to the board."""
        with self.locked() if os.access(self.path, os.W_OK) else contextlib.nullcontext():
            yield

    def _replaced(self, entry: Entry) -> dict[str, bytes]:
        """Return the files that an entry replaces, by their new paths in ``history/``."""
        old = self.path / "entries" / f"{entry.key}.json"
        if not old.exists():
            return {}
        history = self.path / "history" / entry.key
        number = 1 + max((int(path.name) for path in history.glob("[0-9]*") if path.name.isdecimal()), default=0)
        weights = self.path / entry.weights_place
        files = {old: MAX_JSON} | ({weights: MAX_WEIGHTS} if weights.exists() else {})
        return {f"history/{entry.key}/{number:04}/{path.name}": read_limited(path, limit)
                for path, limit in files.items()}  # fmt: skip


def _without_beaten_external(facts: dict[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts whose external accuracy, if AutoAttack found a lower one, is mentioned in the footnote only."""
    external, found = facts.get("external"), measured["figures"].get("autoattack")
    if external is None or found is None or float(external) <= float(found.percent):
        return facts
    said = f"The external accuracy of {external} % is left out, because AutoAttack found {found.percent} %."
    footnote = " ".join(text for text in (facts.get("footnote"), said) if text)
    return {**facts, "external": None, "footnote": footnote}
