"""Report of an evaluation: accuracies, intervals and costs as JSON, and per-example verdicts in a second file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator
from torch import Tensor

from deat_rb.evaluation.statistics import wilson
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_all
from deat_rb.utils.records import describe_validation_error
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.text import as_text, counted, new_table
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from rich.table import Table


SCHEMA_VERSION = 2

TOLERANCE = 1e-9
"""Rounding that is tolerated in the accuracies of a file."""

CHECK_LEVELS = ("none", "quick", "full")

SKIPPED = "skipped"
"""Name of the last check, which lists the skipped checks."""

RENAMED = {
    "normalisation inside": "normalization inside",
    "no blind pixels": "gradients reach all pixels",
    "gradients true": "gradients match finite differences",
    "adversarial images admissible": "adversarial images within eps",
    "verdicts verified": "verdicts reproduced",
    "eps 0 is clean": "no change at eps 0",
    "more steps change little": "PGD converged",
    "accuracy falls with eps": "accuracy decreases with eps",
    "larger balls find no more": "larger eps finds no more",
    "left out": SKIPPED,
}
"""Current names of checks, by their names in older reports and leaderboard entries."""

Norm = Literal["Linf", "L2"]


class AttackResult(BaseModel):
    """Result of one attack.

    Attributes:
        name: Name of the attack, as spelled by `deat_rb.attacks.names.parse_attacks`.
        n_correct: Number of examples still classified correctly.
        n_examples: Number of examples.
        accuracy: ``n_correct / n_examples``.
        low: Lower bound of the 95 % Wilson interval of the accuracy.
        high: Upper bound of this interval.
        seconds: Wall time in seconds; with several ranks, the sum of theirs.
        energy_kwh: Energy of the GPU in kWh, measured by NVML; None if it was not measured.
        peak_memory: Peak of the GPU memory that torch allocated, in bytes; None on a CPU.
        forwards: Single-image forward passes.
        backwards: Single-image backward passes.
        inadmissible: Number of adversarial images that are not finite, not in [0, 1] or not within eps; they do not
            count as adversarial.
        parameters: Parameters of the attack; distances in [0, 1] pixel units.
        parts: For an attack with several stages, the number of correct examples after each, in order.
        notes: Notes for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n_correct: int
    n_examples: int
    accuracy: float
    low: float
    high: float
    seconds: float
    energy_kwh: float | None = None
    peak_memory: int | None = None
    forwards: int
    backwards: int
    inadmissible: int = 0
    parameters: dict[str, bool | int | float | str] = {}
    parts: dict[str, int] = {}
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, correct: Tensor, **rest: Any) -> AttackResult:
        """Create a result from verdicts, (N,) bool; ``rest`` holds the remaining fields."""
        n_correct, n_examples = int(correct.sum()), len(correct)
        low, high = wilson(n_correct, n_examples)
        return cls(
            name=name,
            n_correct=n_correct,
            n_examples=n_examples,
            accuracy=n_correct / n_examples,
            low=low,
            high=high,
            **rest,
        )


_USAGE: dict[str, Callable[[AttackResult], str]] = {
    "kWh": lambda result: "" if result.energy_kwh is None else f"{result.energy_kwh:.4f}",
    "peak memory": lambda result: "" if result.peak_memory is None else f"{result.peak_memory / 2**20:,.0f} MiB",
}
"""Columns that are shown if they were measured."""


class Check(BaseModel):
    """Result of one sanity check.

    Attributes:
        name: Name of the check.
        status: ``pass``, ``warn`` or ``fail``.
        figure: Measured value, in the unit given in the sentence; None if it could not be measured.
        sentence: Explanation of the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Literal["pass", "warn", "fail"]
    figure: float | None
    sentence: str

    @field_validator("name")
    @classmethod
    def _current_name(cls, name: str) -> str:
        return RENAMED.get(name, name)


class CurvePoint(BaseModel):
    """Accuracies at one radius of a sweep.

    Attributes:
        eps: Radius, in [0, 1] pixel units.
        n_correct: Number of correctly classified examples, by attack.
        accuracy: Accuracy in [0, 1], by attack.
        worst_case: Fraction of examples that are classified correctly under every attack.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: float
    n_correct: dict[str, int]
    accuracy: dict[str, float]
    worst_case: float

    @classmethod
    def of(cls, eps: float, verdicts: Mapping[str, Tensor]) -> CurvePoint:
        """Create a point from verdicts by attack, each (N,) bool."""
        return cls(
            eps=eps,
            n_correct={name: int(correct.sum()) for name, correct in verdicts.items()},
            accuracy={name: int(correct.sum()) / len(correct) for name, correct in verdicts.items()},
            worst_case=int(worst_of(verdicts).sum()) / len(next(iter(verdicts.values()))),
        )


def worst_of(verdicts: Mapping[str, Tensor]) -> Tensor:
    """Return which examples are classified correctly under every attack, (N,) bool."""
    return torch.stack(list(verdicts.values())).all(dim=0)


class Report(BaseModel):
    """Report of an evaluation: settings and accuracies; `verdicts` are stored in a separate file.

    Attributes:
        schema_version: Version of the JSON schema.
        norm: Norm of the threat model.
        eps: Radius, in [0, 1] pixel units.
        n_examples: Number of examples, N; the same for every attack.
        num_classes: Number of classes, K.
        seed: Seed of all random numbers.
        batch_size: Number of examples attacked together; AutoAttack's random stages depend on it.
        precision: Precision of the attacks; with ``bf16`` all accuracies except the natural one are upper bounds.
        tf32: Whether the attacks' convolutions in ``fp32`` were computed in TF32, as torch does on NVIDIA's GPUs. The
            verdicts are in float32.
        layout: Memory format of the convolutions: the model's own, or channels_last, which is faster and rounds
            differently.
        device: Device on which the evaluation ran.
        versions: Versions of Python and of the packages involved.
        results: Results by attack, ``natural`` first.
        worst_case: Result over all attacks: an example counts as correct only if it is correct under every attack.
        curve: For a sweep, one point per eps, in increasing order.
        model_sha256: SHA-256 of the names, types, shapes and values of the model's weights and buffers.
        examples_sha256: SHA-256 of the images and labels.
        notes: Notes on all results.
        checks: Results of the sanity checks.
        provenance: Source of the model and the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    norm: Norm = "Linf"
    eps: float
    n_examples: int
    num_classes: int
    seed: int
    batch_size: int
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = False
    layout: Literal["own", "channels_last"] = "own"
    device: str
    versions: dict[str, str]
    results: dict[str, AttackResult]
    worst_case: AttackResult
    curve: tuple[CurvePoint, ...] = ()
    model_sha256: str = ""
    examples_sha256: str = ""
    notes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    provenance: dict[str, str] = {}
    _verdicts: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _adversarial: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[AttackResult], verdicts: dict[str, Tensor], **rest: Any) -> Report:
        """Create a report from results and their verdicts, each (N,) bool; ``rest`` holds the remaining fields."""
        worst = worst_of(verdicts)
        worst_case = AttackResult.of(
            "worst case",
            worst,
            seconds=sum(result.seconds for result in results),
            energy_kwh=_total([result.energy_kwh for result in results]),
            peak_memory=max((result.peak_memory for result in results if result.peak_memory is not None), default=None),
            forwards=sum(result.forwards for result in results),
            backwards=sum(result.backwards for result in results),
            inadmissible=sum(result.inadmissible for result in results),
        )
        report = cls(
            n_examples=len(worst), results={result.name: result for result in results}, worst_case=worst_case, **rest
        )
        report._verdicts.update(verdicts)
        return report

    @property
    def verdicts(self) -> dict[str, Tensor]:
        """Which examples are classified correctly, by attack: (N,) bool on the CPU.

        Empty if the report was loaded without its verdicts file.
        """
        return dict(self._verdicts)

    @property
    def adversarial(self) -> dict[str, Tensor]:
        """Adversarial images by attack: float32 (N, C, H, W) on the CPU.

        Each is in [0, 1] and within eps; the verdicts are the model's predictions on them. For an example that is
        misclassified without an attack, or whose adversarial image is inadmissible, this is the clean image. Empty if
        the report was loaded from a file or `evaluate` did not keep them.
        """
        return dict(self._adversarial)

    def save(self, path: str | Path, beside: Mapping[Path, bytes] | None = None) -> Path:
        """Write the report and its verdicts, in ``<stem>-verdicts.safetensors``: either all files or none.

        Args:
            path: A ``.json`` file, or a folder for ``eval.json``.
            beside: Contents of additional files to write with the report.

        Returns:
            The JSON file.

        Raises:
            DeatError: A file cannot be written; in that case none is.
        """
        import safetensors.torch

        file = json_file(path)
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        contents = {**(beside or {}), file: text.encode() + b"\n"}
        if self._verdicts:
            apart = {name: correct.clone() for name, correct in self._verdicts.items()}
            contents[verdict_file(file)] = safetensors.torch.save(apart)
        write_all(contents)
        return file

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Load a report that `save` wrote.

        Raises:
            DeatError: The file is not a report, or the verdicts next to it belong to a different report.
        """
        file = json_file(path)
        content = read_json(file)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise DeatError(
                f"{file} is not an evaluation report of schema version {SCHEMA_VERSION} "
                f"(found {version!r}); evaluate again"
            )
        try:
            report = cls.model_validate(content)
        except ValidationError as error:
            raise DeatError(
                f"{file} is not a valid evaluation report ({describe_validation_error(error)}); evaluate again"
            ) from None
        if wrong := report._contradiction():
            raise DeatError(f"{file} {wrong}; evaluate again")
        if verdict_file(file).exists():
            verdicts = load_tensors(verdict_file(file))
            expected = {name: (torch.bool, (each.n_examples,), each.n_correct) for name, each in report.results.items()}
            if {name: (each.dtype, each.shape, int(each.sum())) for name, each in verdicts.items()} != expected:
                raise DeatError(f"{verdict_file(file)} does not belong to {file}; evaluate again")
            report._verdicts.update({name: verdicts[name] for name in report.results})
            if int(worst_of(report._verdicts).sum()) != report.worst_case.n_correct:
                raise DeatError(f"the worst case of {file} does not match its verdicts; evaluate again")
        return report

    def _contradiction(self) -> str:
        """Describe an inconsistency between fields; empty if there is none."""
        if "natural" not in self.results:
            return "has no natural accuracy"
        for name, each in (*self.results.items(), (self.worst_case.name, self.worst_case)):
            if name != each.name:
                return f"stores the result of {each.name} under the name {name}"
            possible = 0 <= each.n_correct <= each.n_examples == self.n_examples > 0
            if not possible or not _close(each.accuracy, each.n_correct / each.n_examples):
                return (f"claims {100 * each.accuracy:.2f} % under {name} with {each.n_correct} of {each.n_examples} "
                        f"correct on {counted(self.n_examples, 'example', '')}, which is inconsistent")  # fmt: skip
            low, high = wilson(each.n_correct, each.n_examples)
            if not (_close(each.low, low) and _close(each.high, high)):
                return (f"claims the interval {100 * each.low:.2f} to {100 * each.high:.2f} % under {name} instead of "
                        f"{100 * low:.2f} to {100 * high:.2f} %")  # fmt: skip
        for point in self.curve:
            if not self._agrees_with(point):
                return f"has accuracies at eps {format_fraction(point.eps)} that contradict its counts or results"
        return ""

    def _agrees_with(self, point: CurvePoint) -> bool:
        """Return whether a point's accuracies follow from its counts, and at the main radius from the results."""
        correct = {name: each.n_correct for name, each in self.results.items()}
        if not point.n_correct.keys() == point.accuracy.keys() == correct.keys():
            return False
        if point.eps == self.eps and not (
            point.n_correct == correct and _close(point.worst_case, self.worst_case.accuracy)
        ):
            return False
        shares = {name: count / self.n_examples for name, count in point.n_correct.items()}
        return (
            all(0 <= share <= 1 and _close(point.accuracy[name], share) for name, share in shares.items())
            and 0 <= point.worst_case <= min(shares.values()) + TOLERANCE
        )

    def __str__(self) -> str:
        """Return the table as text."""
        return as_text(self.table())

    def table(self) -> Table:
        """Return the accuracies as a rich table."""
        from rich.markup import escape

        table = new_table(
            f"accuracy on {counted(self.n_examples, 'image', '')}, {self.norm}, eps {format_fraction(self.eps)}"
            + (", upper bounds" if self.precision != "fp32" else "")
        )
        table.add_column("attack", overflow="fold")
        rows = [*self.results.values(), *([self.worst_case] if len(self.results) > 2 else [])]
        usage = {title: text for title, text in _USAGE.items() if any(map(text, rows))}
        for column in ("accuracy", "correct", "95 % interval", "seconds", *usage):
            table.add_column(column, justify="right")
        for result in rows:
            table.add_row(
                escape(result.name),
                f"{100 * result.accuracy:.2f} %",
                f"{result.n_correct} / {result.n_examples}",
                f"{100 * result.low:.2f} - {100 * result.high:.2f}",
                f"{result.seconds:.1f}",
                *(text(result) for text in usage.values()),
            )
        return table


def _close(value: float, expected: float) -> bool:
    """Return whether two values in [0, 1] are equal up to rounding."""
    return abs(value - expected) <= TOLERANCE


def _total(values: Sequence[float | None]) -> float | None:
    """Return the sum of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def json_schema(record: type[BaseModel] = Report) -> str:
    """Return the JSON schema of ``eval.json``, or of another model, as a string."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **record.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def json_file(path: str | Path) -> Path:
    """Return the path of a report: ``path`` if it is a ``.json`` file, or else ``eval.json`` in that folder."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "eval.json"


def verdict_file(json_file: Path) -> Path:
    """Return the path of the verdicts file of a report."""
    return json_file.with_name(f"{json_file.stem}-verdicts.safetensors")


def page_file(json_file: Path) -> Path:
    """Return the path of a report's HTML page."""
    return json_file.with_name("report.html" if json_file.name == "eval.json" else f"{json_file.stem}.html")
