"""Leaderboard entries: the JSON record of one model. Entry files are untrusted input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deat_rb.evaluation.report import Check
from deat_rb.evaluation.statistics import wilson
from deat_rb.leaderboard.fields import (
    Amount,
    Day,
    Eps,
    Examples,
    LineText,
    Link,
    Matches,
    Percent,
    Row,
    Sha256,
    ShortText,
    Text,
    Versions,
    check_size,
    json_pattern,
)
from deat_rb.leaderboard.untrusted import MAX_JSON, parse_json_object, read_limited, visible
from deat_rb.models.names import PRETRAINED
from deat_rb.models.spec import ModelSpec
from deat_rb.robustbench.format import NAME
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted, printable
from deat_rb.utils.units import parse_fraction

AttackName = Literal["natural", "fgsm", "pgd-100", "cw-20", "autoattack"]

ATTACKS: tuple[AttackName, ...] = ("natural", "fgsm", "pgd-100", "cw-20", "autoattack")
"""Attacks that an entry may have accuracies for; ``natural`` means no attack."""

DATASET_NAME = "[a-z0-9]+(-[a-z0-9]+)*"

MAX_EPOCHS = 10**4

SCHEMA_VERSION = 1

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def check_model_name(name: str) -> str:
    """Return a model name of RobustBench's form, ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``.

    Raises:
        DeatError: The name does not have this form.
    """
    if len(name) > 80 or NAME.fullmatch(name) is None:
        raise DeatError(
            f"model name '{printable(name, 80)}' does not have the form <FirstAuthor><Year><Word>[_<suffix>], "
            "such as Wang2021Gradient_R18, with at most 80 characters"
        )
    return name


def check_dataset_name(name: str) -> str:
    """Return a valid dataset name on a board: lowercase letters, digits and hyphens.

    Raises:
        DeatError: The name is invalid.
    """
    if len(name) > 40 or re.fullmatch(DATASET_NAME, name) is None:
        raise DeatError(f"dataset name '{printable(name, 40)}' is not valid: use lowercase letters, digits and "
                        "hyphens, such as cifar10-jpeg")  # fmt: skip
    return name


class RobustBenchInfo(BaseModel):
    """RobustBench's ``model_info/<dataset>/<threat>/<name>.json``; accuracies are in percent, as strings."""

    model_config = _STRICT

    link: Link | None = None
    name: LineText | None = None
    authors: Text | None = None
    additional_data: bool | None = None
    number_forward_passes: Annotated[int, Field(ge=1, le=10**6)] | None = None
    dataset: Annotated[str, AfterValidator(check_dataset_name), Field(json_schema_extra=json_pattern(DATASET_NAME))]
    venue: LineText | None = None
    architecture: Annotated[LineText, Matches(r"[\D0-9]*", "has digits other than 0 to 9")] | None = None
    eps: Eps
    clean_acc: Percent | None = None
    reported: Percent | None = None
    autoattack_acc: Percent | None = None
    external: Percent | None = None
    unreliable: bool | None = None
    footnote: Text | None = None

    @classmethod
    def parse(cls, data: bytes, source: str) -> RobustBenchInfo:
        """Parse a ``model_info`` file; "nan" and empty strings are read as unknown.

        Raises:
            DeatError: The file is invalid.
        """
        content = parse_json_object(data, source)
        return _validated(cls, {name: None if value in ("", "nan") else value for name, value in content.items()},
                          source)  # fmt: skip


class Accuracy(BaseModel):
    """A measured accuracy, stored as counts.

    Attributes:
        n_correct: Number of correctly classified examples.
        n_examples: Number of examples.
    """

    model_config = _STRICT

    n_correct: Annotated[int, Field(ge=0, le=10**9)]
    n_examples: Examples

    @property
    def accuracy(self) -> float:
        """The accuracy in [0, 1]."""
        return self.n_correct / self.n_examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in [0, 1]."""
        return wilson(self.n_correct, self.n_examples)

    @property
    def percent(self) -> str:
        """The accuracy as RobustBench writes it, such as ``43.21``."""
        return f"{100 * self.accuracy:.2f}"

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, content: Any) -> Any:
        """Drop the computed fields that older entries contain."""
        computed = ("accuracy", "low", "high")
        return {k: v for k, v in content.items() if k not in computed} if isinstance(content, dict) else content

    @model_validator(mode="after")
    def _check_counts(self) -> Accuracy:
        if self.n_correct > self.n_examples:
            raise ValueError(f"n_correct {self.n_correct} is greater than n_examples {self.n_examples}")
        return self


class Entry(RobustBenchInfo):
    """A model on a board; unknown values are None.

    In a measured entry, ``clean_acc`` and ``autoattack_acc`` are computed from ``figures`` and not stored.

    Attributes:
        schema_version: Version of this record.
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``, as RobustBench names models.
        threat_model: ``Linf`` or ``L2``.
        kind: ``measured`` (accuracies measured or re-measured by this board) or ``published`` (claims).
        dataset: RobustBench's name of the dataset, or the board's own, such as ``cifar10-jpeg``.
        dataset_note: A description of the dataset, such as "CIFAR-10 (JPEG), not CIFAR-10".
        method: Training method.
        setting: ``fast``, ``standard`` or ``fastat``.
        steps: Attack steps in each epoch.
        epochs: Number of training epochs.
        backward_passes: Backward passes of training, in mini-batches.
        train_seconds: Wall-clock training time without validation.
        hardware: Training hardware, as declared by the submitter.
        peak_memory: Peak memory of training in bytes.
        figures: Accuracy by attack.
        remeasured: The board's own accuracies on a random sample, if ``figures`` are the submitter's.
        n_examples: Number of evaluated test images.
        n_test: Size of the test set. An entry with fewer evaluated images is not ranked.
        checks: Sanity checks of the evaluation.
        metrics: Training metrics, one row per epoch.
        command: The training command.
        seed: Random seed of training.
        model: The network's architecture and normalization.
        classes: Class names.
        weights_sha256: SHA-256 of the weights in the board's safetensors format.
        weights_file: Path of that file relative to the board; None if the board does not store it.
        data_sha256: SHA-256 of the dataset.
        versions: Versions of Python and packages used for training; empty if unknown.
        evaluated_on: Device of the evaluation, such as ``cpu``.
        evaluated_with: Versions of Python and packages used for the evaluation.
        submitted: Date of submission.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    model_name: Annotated[str, AfterValidator(check_model_name), Field(json_schema_extra=json_pattern(NAME.pattern))]
    threat_model: Literal["Linf", "L2"] = "Linf"
    kind: Literal["measured", "published"]
    dataset_note: LineText | None = None
    method: ShortText | None = None
    setting: Literal["fast", "standard", "fastat"] | None = None
    steps: Annotated[tuple[Annotated[int, Field(ge=0, le=10**4)], ...], Field(max_length=MAX_EPOCHS)] | None = None
    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] | None = None
    backward_passes: Amount | None = None
    train_seconds: Amount | None = None
    hardware: LineText | None = None
    peak_memory: Annotated[int, Field(ge=0, le=10**15)] | None = None
    figures: dict[AttackName, Accuracy] = {}
    remeasured: dict[AttackName, Accuracy] = {}
    n_examples: Examples | None = None
    n_test: Examples | None = None
    checks: Annotated[tuple[Annotated[Check, AfterValidator(check_size)], ...], Field(max_length=100)] = ()
    metrics: Annotated[tuple[Row, ...], Field(max_length=MAX_EPOCHS)] = ()
    command: Annotated[str, Field(max_length=2000), AfterValidator(visible)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    model: ModelSpec | None = None
    classes: Annotated[tuple[ShortText, ...], Field(max_length=1000)] | None = None
    weights_sha256: Sha256 | None = None
    weights_file: Annotated[str, Field(max_length=400)] | None = None
    data_sha256: Sha256 | None = None
    versions: Versions = {}
    evaluated_on: ShortText | None = None
    evaluated_with: Versions = {}
    submitted: Day | None = None

    @classmethod
    def create(cls, content: Mapping[str, Any], source: str) -> Entry:
        """Create an entry from its fields.

        Raises:
            DeatError: A field is invalid.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            raise DeatError(_first_error(error, source)) from None

    @property
    def key(self) -> str:
        """Identifier of the entry on the board, ``<dataset>/<threat>/<model_name>``."""
        return f"{self.dataset}/{self.threat_model}/{self.model_name}"

    @property
    def weights_place(self) -> str:
        """Path of the weights relative to the board, if they are stored."""
        return f"weights/{self.key}.safetensors"

    @property
    def is_subset(self) -> bool:
        """Whether only part of the test set was evaluated."""
        return self.n_examples is not None and self.n_test is not None and self.n_examples < self.n_test

    @property
    def robust(self) -> float | None:
        """Robust accuracy used for ranking, in percent: the best known, or else AutoAttack's."""
        if self.external is not None:
            return float(self.external)
        measured = self.percent("autoattack")
        return float(self.autoattack_acc) if measured is None and self.autoattack_acc is not None else measured

    def percent(self, attack: AttackName) -> float | None:
        """Return a measured accuracy in percent, or None."""
        return None if attack not in self.figures else 100 * self.figures[attack].accuracy

    def json_bytes(self) -> bytes:
        """Return the content of the entry's JSON file."""
        computed = {"clean_acc", "autoattack_acc"} if self.kind == "measured" else set()
        content = self.model_dump(mode="json", exclude=computed)
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @model_validator(mode="after")
    def _complete(self) -> Entry:
        if self.kind == "measured":
            attacks: dict[str, AttackName] = {"clean_acc": "natural", "autoattack_acc": "autoattack"}
            for field, attack in attacks.items():
                measured = self.figures.get(attack)
                object.__setattr__(self, field, None if measured is None else measured.percent)  # it is frozen
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterable[str]:
        needed = ("n_examples", "n_test", "model", "weights_sha256", "data_sha256", "submitted", "classes")
        missing = [field for field in needed if getattr(self, field) is None]
        if self.kind == "measured" and (missing or "natural" not in self.figures):
            yield f"a measured entry needs {(*missing, 'figures.natural')[0]}"
        if self.kind == "published" and (self.figures or self.remeasured or self.weights_file):
            yield "a published entry cannot have figures or weights"
        if self.threat_model == "Linf" and parse_fraction(self.eps) > 1:
            yield f"eps {self.eps} is outside (0, 1], the range of the images; only L2 radii may be larger"
        if (self.n_examples or 0) > (self.n_test or 10**9):
            yield f"n_examples {self.n_examples} is greater than n_test {self.n_test}"
        for attack, accuracy in self.figures.items():
            if accuracy.n_examples != self.n_examples:
                of_attack = counted(accuracy.n_examples, "example", "")
                yield f"figures.{attack} has {of_attack}, but the entry has {self.n_examples}"
            if accuracy.n_correct > self.figures.get("natural", accuracy).n_correct:
                yield f"figures.{attack} is above the natural accuracy"
        if self.kind == "measured" and self.external is not None and self.autoattack_acc is None:
            yield f"external {self.external} needs an accuracy under AutoAttack, which bounds it"
        for field, bound in (("reported", "clean_acc"), ("external", "clean_acc"), ("external", "autoattack_acc")):
            if float(getattr(self, field) or 0) > float(getattr(self, bound) or 100):
                yield f"{field} {getattr(self, field)} is above {bound} {getattr(self, bound)}"
        if self.weights_file not in (None, self.weights_place):
            yield f"weights_file is not {self.weights_place}"
        kind, colon, _ = self.model.arch.partition(":") if self.model is not None else ("", "", "")
        if colon and kind not in PRETRAINED:
            yield f"the network is built by '{printable(kind, 60)}', but submitted code is never run"


Record = TypeVar("Record", bound=BaseModel)


def parse_entry(data: bytes, source: str) -> Entry:
    """Parse an entry.

    Raises:
        DeatError: The entry is invalid; the message names the first invalid field.
    """
    content = parse_json_object(data, source)
    version = content.get("schema_version", SCHEMA_VERSION)
    if type(version) is int and version > SCHEMA_VERSION:
        raise DeatError(f"{source} has schema version {version}, but this version of deat-rb supports only "
                        f"{SCHEMA_VERSION}: update deat-rb")  # fmt: skip
    return _validated(Entry, content, source)


def read_entry(path: str | Path) -> Entry:
    """Read an entry's file; see `parse_entry`."""
    return parse_entry(read_limited(Path(path), MAX_JSON), str(path))


def entry_files(board: str | Path) -> tuple[Path, ...]:
    """Return all entry files, ``entries/<dataset>/<threat>/<model_name>.json``, sorted and excluding hidden ones."""
    files = Path(board).glob("entries/*/*/*.json")
    return tuple(sorted(path for path in files if not any(part.startswith(".") for part in path.parts[-3:])))


def check_board(board: str | Path) -> None:
    """Check that a folder is a board.

    Raises:
        DeatError: The folder has no ``entries``.
    """
    if not Path(board, "entries").is_dir():
        raise DeatError(f"there is no leaderboard at {board}: deat-rb submit RUN --board {board} creates one")


def check_place(path: Path, entry: Entry) -> None:
    """Check that the path of an entry's file, relative to the board, matches the entry's key.

    Raises:
        DeatError: The file is misplaced.
    """
    if path.absolute().parts[-4:] != ("entries", *f"{entry.key}.json".split("/")):
        raise DeatError(f"{path} is misplaced: it contains the entry {entry.key}; move it to entries/{entry.key}.json")


def read_entries(board: str | Path, *, left_out: list[str] | None = None) -> tuple[Entry, ...]:
    """Read all entries of a board.

    Args:
        board: Its folder.
        left_out: Collects the errors of invalid entries, which are then skipped.

    Raises:
        DeatError: There is no board or, without ``left_out``, an entry is invalid or misplaced.
    """
    check_board(board)
    entries = []
    for path in entry_files(board):
        try:
            entry = read_entry(path)
            check_place(path, entry)
        except DeatError as error:
            if left_out is None:
                raise
            left_out.append(printable(str(error), 1000))
        else:
            entries.append(entry)
    return tuple(entries)


def _validated(kind: type[Record], content: Mapping[str, Any], source: str) -> Record:
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise DeatError(_first_error(error, source)) from None


def _first_error(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{source} is not valid: {printable(f'{where}: {message}' if where else message)}"
