"""What the leaderboard knows of a model: its entry, a JSON file that anyone may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deat_rb.evaluation.report import Check
from deat_rb.evaluation.statistics import wilson
from deat_rb.leaderboard.pages.format import web_link
from deat_rb.leaderboard.untrusted import MAX_JSON, parse_json, plain, read_limited, seen
from deat_rb.models.names import PRETRAINED
from deat_rb.models.spec import ModelSpec
from deat_rb.robustbench.format import NAME
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import printable
from deat_rb.utils.units import check_eps, format_fraction, parse_fraction

__all__ = [
    "ATTACKS",
    "Accuracy",
    "Entry",
    "RobustBenchInfo",
    "parse_entry",
    "read_entries",
    "read_entry",
    "weights_file",
]

ATTACKS = ("natural", "fgsm", "pgd-100", "cw-20", "autoattack")
"""What an entry may have figures for."""

MAX_EPOCHS = 10**4

MAX_IMAGE = 1024
"""Height and width that a network on a board takes: larger images would take more memory than a file says."""

SCHEMA_VERSION: Literal[1] = 1

DATASET = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def check_model_name(name: str) -> str:
    """Gives back a name of RobustBench's form, ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``.

    Raises:
        DeatError: It has another form.
    """
    if len(name) > 80 or NAME.fullmatch(name) is None:
        raise DeatError(
            f"model name '{printable(name, 80)}' does not have the form <FirstAuthor><Year><Word>, with a suffix "
            "after _ for variants and at most 80 characters: Wang2021Gradient_R18"
        )
    return name


def check_dataset_name(name: str) -> str:
    """Gives back a data set's name on a board: small letters, digits and hyphens.

    Raises:
        DeatError: It is not of that form.
    """
    if len(name) > 40 or DATASET.fullmatch(name) is None:
        raise DeatError(f"data set name '{printable(name, 40)}' is no name for a board: give one of small letters, "
                        "digits and hyphens, such as cifar10-jpeg")  # fmt: skip
    return name


def _percent(text: str) -> str:
    if re.fullmatch(r"\d{1,3}(\.\d{1,4})?", text, re.ASCII) is None or float(text) > 100:
        raise ValueError("is no accuracy in percent, from 0 to 100, such as '43.21'")
    return text


def _link(text: str) -> str:
    if web_link(plain(text)) is None or re.search(r"[\"'<>]", text):
        raise ValueError("is no address that begins with https:// and the name of a host in ASCII")
    return text


def _architecture(text: str) -> str:
    if any(char.isdecimal() and not char.isascii() for char in plain(text)):
        raise ValueError("has digits that are not 0 to 9")
    return text


def _spelled_eps(value: object) -> object:
    """As sizes are spelled, of a text or of the number that RobustBench's ``update_json`` writes.

    What is no size is given back as it is, to be refused where the field is looked at.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9.eE +/-]{1,20}", value, re.ASCII) is None:
        return value
    try:
        return format_fraction(check_eps(parse_fraction(value)))
    except (ValueError, OverflowError):
        return str(value)


def _eps(text: str) -> str:
    if format_fraction(check_eps(parse_fraction(text))) != text:
        raise ValueError("is not spelled as sizes are: 8/255, or a decimal such as 0.1")
    return text


def _sha256(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII) is None:
        raise ValueError("is no SHA-256: 64 hexadecimal digits")
    return text


def _day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("is no date such as 2026-01-31")
    return text


ShortText = Annotated[str, Field(max_length=80), AfterValidator(plain)]

LineText = Annotated[str, Field(max_length=400), AfterValidator(plain)]

Text = Annotated[str, Field(max_length=2000), AfterValidator(plain)]

Percent = Annotated[str, AfterValidator(_percent)]

Link = Annotated[str, Field(max_length=400), AfterValidator(_link)]

Eps = Annotated[str, Field(max_length=20), AfterValidator(_eps)]

Sha256 = Annotated[str, AfterValidator(_sha256)]

Name = Annotated[str, AfterValidator(check_model_name)]

DatasetName = Annotated[str, AfterValidator(check_dataset_name)]

Day = Annotated[str, AfterValidator(_day)]

Count = Annotated[int, Field(ge=0, le=10**15)]

Amount = Annotated[float, Field(ge=0, le=1e15)]


def _check_said(check: Check) -> Check:
    if len(check.name) > 80 or len(check.sentence) > 2000 or not abs(check.figure or 0) <= 1e300:
        raise ValueError("is too long, or its figure is too large or none")
    seen(check.name)
    seen(check.sentence)
    return check


Versions = Annotated[dict[ShortText, ShortText], Field(max_length=64)]

CheckRecord = Annotated[Check, AfterValidator(_check_said)]

Record = TypeVar("Record", bound=BaseModel)

Number = Annotated[int, Field(ge=-(10**15), le=10**15)] | Annotated[float, Field(ge=-1e300, le=1e300)]

Row = Annotated[dict[Annotated[str, Field(pattern=r"^[a-z_0-9]{1,40}$")], Number | None], Field(max_length=64)]


class RobustBenchInfo(BaseModel):
    """RobustBench's ``model_info/<dataset>/<threat>/<name>.json``; accuracies are in percent, as text."""

    model_config = _STRICT

    link: Link | None = None
    name: LineText | None = None
    authors: Text | None = None
    additional_data: bool | None = None
    number_forward_passes: Annotated[int, Field(ge=1, le=10**6)] | None = None
    dataset: DatasetName
    venue: LineText | None = None
    architecture: Annotated[LineText, AfterValidator(_architecture)] | None = None
    eps: Eps
    clean_acc: Percent | None = None
    reported: Percent | None = None
    autoattack_acc: Percent | None = None
    external: Percent | None = None
    unreliable: bool | None = None
    footnote: Text | None = None

    @classmethod
    def parse(cls, data: bytes, source: str) -> RobustBenchInfo:
        """Reads such a file; an accuracy "nan" is one that was not measured, and an empty text one that is not known.

        Raises:
            DeatError: It is not one.
        """
        content = parse_json(data, source)
        if not isinstance(content, dict):
            raise DeatError(f"{source} is no JSON object of RobustBench's fields")
        content = {field: None if value in ("", "nan") else value for field, value in content.items()}
        content["eps"] = _spelled_eps(content.get("eps"))
        return _validated(cls, content, source)


class Accuracy(BaseModel):
    """An accuracy that was measured.

    Attributes:
        accuracy: In [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end of it.
        n_correct: Examples that are still classified correctly.
        n_examples: Out of so many.
    """

    model_config = _STRICT

    accuracy: float
    low: float
    high: float
    n_correct: Annotated[int, Field(ge=0, le=10**9)]
    n_examples: Annotated[int, Field(ge=1, le=10**9)]

    @classmethod
    def of(cls, n_correct: int, n_examples: int) -> Accuracy:
        """Makes one of a count."""
        low, high = wilson(n_correct, n_examples)
        return cls(accuracy=n_correct / n_examples, low=low, high=high, n_correct=n_correct, n_examples=n_examples)

    @property
    def percent(self) -> str:
        """As RobustBench writes it."""
        return f"{100 * self.accuracy:.2f}"

    @model_validator(mode="after")
    def _adds_up(self) -> Accuracy:
        if self.n_correct > self.n_examples:
            raise ValueError(f"{self.n_correct} correct out of {self.n_examples} cannot be")
        expected = (self.n_correct / self.n_examples, *wilson(self.n_correct, self.n_examples))
        given = (self.accuracy, self.low, self.high)
        if any(abs(one - other) > 1e-6 for one, other in zip(expected, given, strict=True)):
            raise ValueError(f"accuracy and interval are not those of {self.n_correct} correct out of "
                             f"{self.n_examples}")  # fmt: skip
        return self


class Entry(RobustBenchInfo):
    """A model on a board. What is not known is None.

    Attributes:
        schema_version: Of this record.
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``, as RobustBench names models.
        threat_model: ``Linf``.
        kind: ``measured``: the figures were measured or re-measured by this board. ``published``: they are claims.
        dataset: As RobustBench names it, or a name of the board's own such as ``cifar10-jpeg``.
        dataset_note: What a reader should know of it, such as "CIFAR-10 (JPEG), not CIFAR-10".
        method: What it was trained by.
        setting: ``fast`` or ``standard``.
        steps: The attack's steps in each epoch.
        epochs: How many.
        backward_passes: Over mini-batches, of the training.
        train_seconds: Wall time, without validation.
        hardware: Where it was trained, in the submitter's words.
        peak_memory: In bytes, of the training.
        figures: By attack, of `ATTACKS`; ``natural`` is without an attack.
        remeasured: What the board found itself on examples it drew, where ``figures`` are the submitter's; else empty.
        n_examples: On how many test images the figures are.
        n_test: How many the test set has. An entry with fewer examples is listed apart.
        checks: Reasons to believe the figures, or to doubt them.
        metrics: A row of numbers per epoch.
        command: What trained it.
        seed: Of the training.
        model: How to build the network.
        classes: Their names.
        weights_sha256: Of the weights as a safetensors file of this board.
        weights_file: Where that is, below the board; None where the board does not hold it.
        data_sha256: Of the data set.
        versions: Of Python and of the packages that trained it; empty where that is not known.
        evaluated_on: The device that ``figures`` are of, such as ``cpu``.
        evaluated_with: Versions of Python and of the packages that ``figures`` are of.
        submitted: The day.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model_name: Name
    threat_model: Literal["Linf"] = "Linf"
    kind: Literal["measured", "published"]
    dataset_note: LineText | None = None
    method: ShortText | None = None
    setting: Literal["fast", "standard"] | None = None
    steps: Annotated[tuple[Annotated[int, Field(ge=0, le=10**4)], ...], Field(max_length=MAX_EPOCHS)] | None = None
    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] | None = None
    backward_passes: Amount | None = None
    train_seconds: Amount | None = None
    hardware: LineText | None = None
    peak_memory: Count | None = None
    figures: dict[Literal["natural", "fgsm", "pgd-100", "cw-20", "autoattack"], Accuracy] = {}
    remeasured: dict[Literal["natural", "fgsm", "pgd-100", "cw-20", "autoattack"], Accuracy] = {}
    n_examples: Annotated[int, Field(ge=1, le=10**9)] | None = None
    n_test: Annotated[int, Field(ge=1, le=10**9)] | None = None
    checks: Annotated[tuple[CheckRecord, ...], Field(max_length=100)] = ()
    metrics: Annotated[tuple[Row, ...], Field(max_length=MAX_EPOCHS)] = ()
    command: Text | None = None
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
    def checked(cls, content: Mapping[str, Any], source: str) -> Entry:
        """Makes an entry.

        Raises:
            DeatError: A field is not what it has to be.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            raise DeatError(_complaint(error, source)) from None

    @property
    def key(self) -> str:
        """``<dataset>/<threat>/<model_name>``: its place on the board."""
        return f"{self.dataset}/{self.threat_model}/{self.model_name}"

    @property
    def is_subset(self) -> bool:
        """Whether the figures are of a part of the test set only."""
        return self.n_examples is not None and self.n_test is not None and self.n_examples < self.n_test

    @property
    def robust(self) -> float | None:
        """The robust accuracy that decides the rank, in percent: the best known, else AutoAttack's."""
        text = self.external if self.external is not None else self.autoattack_acc
        return None if text is None else float(text)

    def percent(self, attack: str) -> float | None:
        """A measured accuracy in percent, or None."""
        found = [100 * float(figure.accuracy) for name, figure in self.figures.items() if name == attack]
        return found[0] if found else None

    def json_bytes(self) -> bytes:
        """What its file holds."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @model_validator(mode="after")
    def _is_consistent(self) -> Entry:
        for sentence in (*self._of_its_kind(), *self._of_its_figures(), *self._of_its_files()):
            raise ValueError(sentence)
        return self

    def _of_its_kind(self) -> Iterable[str]:
        wanted = ("n_examples", "n_test", "model", "weights_sha256", "data_sha256", "submitted", "classes")
        missing = [field for field in wanted if getattr(self, field) is None]
        if self.kind == "measured" and (missing or "natural" not in self.figures):
            yield f"a measured entry needs {(*missing, 'figures.natural')[0]}"
        if self.kind == "published" and (self.figures or self.remeasured or self.weights_file):
            yield "a published entry has no figures or weights of this board's"

    def _of_its_figures(self) -> Iterable[str]:
        if self.n_examples is not None and self.n_test is not None and self.n_examples > self.n_test:
            yield f"{self.n_examples} examples out of a test set of {self.n_test} cannot be"
        natural = self.figures.get("natural")
        for attack, figure in self.figures.items():
            if figure.n_examples != self.n_examples:
                yield f"figures.{attack} is of {figure.n_examples} examples, and the entry of {self.n_examples}"
            if natural is not None and figure.n_correct > natural.n_correct:
                yield f"figures.{attack} is above the natural accuracy"
        for field, attack in (("clean_acc", "natural"), ("autoattack_acc", "autoattack")):
            stated, measured = getattr(self, field), self.figures.get(attack)
            if self.kind == "measured" and stated != (None if measured is None else measured.percent):
                yield f"{field} {stated} is not what figures.{attack} says"
        if self.reported is not None and float(self.reported) > float(self.clean_acc or 100):
            yield f"reported {self.reported} is above clean_acc, and no attack makes a network better"
        if self.external is not None and float(self.external) > float(self.autoattack_acc or 100):
            yield f"external {self.external} is above autoattack_acc, and the best known attack leaves no more"

    def _of_its_files(self) -> Iterable[str]:
        if self.weights_file not in (None, weights_file(self.dataset, self.threat_model, self.model_name)):
            yield f"weights_file is not {weights_file(self.dataset, self.threat_model, self.model_name)}"
        kind, colon, _ = self.model.arch.partition(":") if self.model is not None else ("", "", "")
        if self.model is not None and self.model.image_size > MAX_IMAGE:
            yield f"its network takes images of {self.model.image_size} pixels, and a board at most of {MAX_IMAGE}"
        if colon and kind not in PRETRAINED:
            yield f"its network is built by '{printable(kind, 60)}', and a board runs nobody's code"


def weights_file(dataset: str, threat_model: str, model_name: str) -> str:
    """Where a board holds weights, below its folder."""
    return f"weights/{dataset}/{threat_model}/{model_name}.safetensors"


def parse_entry(data: bytes, source: str) -> Entry:
    """Reads an entry.

    Raises:
        DeatError: It is none, naming the first thing that is wrong.
    """
    content = parse_json(data, source)
    if not isinstance(content, dict):
        raise DeatError(f"{source} is no JSON object")
    version = content.get("schema_version", SCHEMA_VERSION)
    if type(version) is int and version > SCHEMA_VERSION:
        raise DeatError(f"{source} is of schema version {version}, and this deat-rb reads {SCHEMA_VERSION}: update it")
    return _validated(Entry, content, source)


def read_entry(path: str | Path) -> Entry:
    """Reads an entry's file; see `parse_entry`."""
    return parse_entry(read_limited(Path(path), MAX_JSON), str(path))


def entry_files(board: str | Path) -> tuple[Path, ...]:
    """All files of entries: ``entries/<dataset>/<threat>/<model_name>.json``, sorted, without hidden ones."""
    found = Path(board).glob("entries/*/*/*.json")
    return tuple(sorted(path for path in found if not any(part.startswith(".") for part in path.parts[-3:])))


def check_board(board: str | Path) -> None:
    """Refuses a folder that is no board.

    Raises:
        DeatError: It has no entries.
    """
    if not Path(board, "entries").is_dir():
        raise DeatError(f"there is no leaderboard at {board}: deat-rb submit RUN --board {board} begins one")


def read_entries(board: str | Path, *, left_out: list[str] | None = None) -> tuple[Entry, ...]:
    """Reads all entries of a board.

    Args:
        board: Its folder.
        left_out: Told what is wrong with each entry that cannot be read, which is then passed over.

    Raises:
        DeatError: There is no board, or, without ``left_out``, an entry is not valid or not where it belongs.
    """
    check_board(board)
    found = []
    for path in entry_files(board):
        try:
            entry = read_entry(path)
            if path != Path(board, "entries", f"{entry.key}.json"):
                raise DeatError(f"{path} is the entry of {entry.key}: it lies in the wrong place")
        except DeatError as error:
            if left_out is None:
                raise
            left_out.append(printable(str(error), 1000))
        else:
            found.append(entry)
    return tuple(found)


def _validated(kind: type[Record], content: Mapping[str, Any], source: str) -> Record:
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise DeatError(_complaint(error, source)) from None


def _complaint(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    problem = f"{where}: {message}" if where else message
    return f"{source} is not as a board has it: {printable(problem)}"
