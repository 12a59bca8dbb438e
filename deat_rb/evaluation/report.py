"""What an evaluation found: figures, intervals and costs as JSON, and the verdict on every example beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from torch import Tensor

from deat_rb.evaluation.statistics import wilson
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_all
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from rich.table import Table


SCHEMA_VERSION = 2

LEFT_OUT = "left out"
"""The name of the last check, which says which were not made."""

Norm = Literal["Linf", "L2"]


class AttackResult(BaseModel):
    """One attack's figures.

    Attributes:
        name: The attack, as `deat_rb.evaluation.evaluate.parse_attacks` spells it.
        n_correct: Examples that are still classified correctly.
        n_examples: Out of so many.
        accuracy: Their share, in [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end of it.
        seconds: Wall time.
        forwards: Images forwarded.
        backwards: Images for which a gradient was computed.
        inadmissible: Images that the attack made and that are not finite, in [0, 1] and within eps: they broke nothing.
        parameters: The attack's settings; sizes in [0, 1] pixel units.
        parts: Of an attack of several parts, how many examples each of them left correct, in their order.
        notes: What a reader of the figure should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n_correct: int
    n_examples: int
    accuracy: float
    low: float
    high: float
    seconds: float
    forwards: int
    backwards: int
    inadmissible: int = 0
    parameters: dict[str, bool | int | float | str] = {}
    parts: dict[str, int] = {}
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, correct: Tensor, **rest: Any) -> AttackResult:
        """Counts verdicts (N,) bool; ``rest`` are the other fields."""
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


class Check(BaseModel):
    """One reason to believe an evaluation, or to doubt it.

    Attributes:
        name: What was looked at, in a few words.
        status: ``pass``, ``warn`` or ``fail``.
        figure: What was measured, in the unit that the sentence names; None where it could not be.
        sentence: What the figure means.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Literal["pass", "warn", "fail"]
    figure: float | None
    sentence: str


class CurvePoint(BaseModel):
    """What one radius of a sweep left.

    Attributes:
        eps: The radius, in [0, 1] pixel units.
        n_correct: By attack, how many examples it left correctly classified.
        accuracy: Their share, in [0, 1].
        worst_case: The share that every attack left so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: float
    n_correct: dict[str, int]
    accuracy: dict[str, float]
    worst_case: float

    @classmethod
    def of(cls, eps: float, verdicts: Mapping[str, Tensor]) -> CurvePoint:
        """Counts verdicts, each (N,) bool."""
        return cls(
            eps=eps,
            n_correct={name: int(correct.sum()) for name, correct in verdicts.items()},
            accuracy={name: int(correct.sum()) / len(correct) for name, correct in verdicts.items()},
            worst_case=int(worst_of(verdicts).sum()) / len(next(iter(verdicts.values()))),
        )


def worst_of(verdicts: Mapping[str, Tensor]) -> Tensor:
    """Says which examples every attack left correct, (N,) bool."""
    return torch.stack(list(verdicts.values())).all(dim=0)


class Report(BaseModel):
    """An evaluation. What decides a figure is in it; `verdicts` are in a file of their own.

    Attributes:
        schema_version: Of this record.
        norm: In which eps is a radius.
        eps: The radius, in [0, 1] pixel units.
        n_examples: N; every attack saw the same ones.
        num_classes: K.
        seed: Of every random start.
        batch_size: On which AutoAttack's random parts depend.
        precision: ``fp32``, or ``bf16``: then the attacks crafted in it, and every figure but the natural one is an
            upper bound.
        layout: Of the convolutions' weights: the model's own, or channels_last, which is quicker on a CPU and rounds
            otherwise.
        device: Where it ran.
        versions: Of Python and of the packages that took part.
        results: One per attack, by name, ``natural`` first.
        worst_case: An example counts as correct if every attack of this report left it so.
        curve: Of a sweep, one point for each eps, from the smallest on.
        model_sha256: Of the names, types, shapes and values of the model's weights and buffers.
        examples_sha256: Of the images and the labels, as they were given.
        notes: What a reader of all figures should know.
        checks: What makes the figures believable or suspect.
        provenance: Where model and data came from, as far as the caller knows.
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
        """Puts results and their verdicts, each (N,) bool, together; ``rest`` are the other fields."""
        worst = worst_of(verdicts)
        worst_case = AttackResult.of(
            "worst case",
            worst,
            seconds=sum(result.seconds for result in results),
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
        """By attack, (N,) bool on the CPU: which examples it left correctly classified.

        Empty where a report was loaded without the file that holds them.
        """
        return dict(self._verdicts)

    @property
    def adversarial(self) -> dict[str, Tensor]:
        """By attack, float32 (N, C, H, W) on the CPU: what it made of the images.

        A verdict is the model's on these images, each of which is in [0, 1] and within eps: an example that was wrong
        before, or of which the attack made nothing admissible, is there as it was. Without ``natural``; empty in a
        report that was loaded, and where `evaluate` did not keep them.
        """
        return dict(self._adversarial)

    def save(self, path: str | Path, beside: Mapping[Path, bytes] | None = None) -> Path:
        """Writes the report, and the verdicts beside it as ``<stem>-verdicts.safetensors``: all of it or nothing.

        Args:
            path: A ``.json`` file, or a folder in which it will be ``eval.json``.
            beside: What else is to be written with it, by file.

        Returns:
            The JSON file.

        Raises:
            DeatError: If something cannot be written. Nothing has been then.
        """
        import safetensors.torch

        file = json_file(path)
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        contents = {**(beside or {}), file: text.encode() + b"\n"}
        if self._verdicts:
            apart = {name: correct.clone() for name, correct in self._verdicts.items()}
            contents[_verdict_file(file)] = safetensors.torch.save(apart)
        write_all(contents)
        return file

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            DeatError: If it is no report, or the verdicts beside it are another report's.
        """
        file = json_file(path)
        content = read_json(file)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise DeatError(
                f"{file} is not an evaluation report of schema version {SCHEMA_VERSION} "
                f"(it says {version!r}); evaluate again"
            )
        try:
            report = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DeatError(f"{file} is not an evaluation report: {where}: {first['msg']}") from None
        if wrong := report._contradiction():
            raise DeatError(f"{file} {wrong}; evaluate again")
        if _verdict_file(file).exists():
            verdicts = load_tensors(_verdict_file(file))
            expected = {name: (torch.bool, (each.n_examples,), each.n_correct) for name, each in report.results.items()}
            if {name: (each.dtype, each.shape, int(each.sum())) for name, each in verdicts.items()} != expected:
                raise DeatError(f"{_verdict_file(file)} holds another report's verdicts than {file}; evaluate again")
            report._verdicts.update({name: verdicts[name] for name in report.results})
            if int(worst_of(report._verdicts).sum()) != report.worst_case.n_correct:
                raise DeatError(f"{file} has another worst case than its verdicts; evaluate again")
        return report

    def _contradiction(self) -> str:
        """What in it cannot be; empty where nothing is wrong."""
        if "natural" not in self.results:
            return "has no accuracy without an attack"
        for name, each in (*self.results.items(), (self.worst_case.name, self.worst_case)):
            if name != each.name:
                return f"has the result of {each.name} under {name}"
            possible = 0 <= each.n_correct <= each.n_examples == self.n_examples > 0
            if not possible or abs(each.accuracy - each.n_correct / each.n_examples) > 1e-9:
                return (f"claims {100 * each.accuracy:.2f} % under {name} with {each.n_correct} of {each.n_examples} "
                        f"correct, on {self.n_examples} examples, which does not add up")  # fmt: skip
        return ""

    def table(self) -> Table:
        """Lays the figures out for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"accuracy on {self.n_examples} images, {self.norm}, eps {format_fraction(self.eps)}"
            + (", upper bounds" if self.precision != "fp32" else "")
        )
        table.add_column("attack", overflow="fold")
        for column in ("accuracy", "correct", "95 % interval", "seconds"):
            table.add_column(column, justify="right")
        rows = [*self.results.values(), *([self.worst_case] if len(self.results) > 2 else [])]
        for result in rows:
            table.add_row(
                escape(result.name),
                f"{100 * result.accuracy:.2f} %",
                f"{result.n_correct} / {result.n_examples}",
                f"{100 * result.low:.2f} - {100 * result.high:.2f}",
                f"{result.seconds:.1f}",
            )
        return table


def json_schema(record: type[BaseModel] = Report) -> str:
    """The JSON schema of ``eval.json`` or of another record, as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **record.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def json_file(path: str | Path) -> Path:
    """Where a report is that is in a folder, or is to be written there."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "eval.json"


def _verdict_file(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.stem}-verdicts.safetensors")
