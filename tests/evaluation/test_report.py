"""Reports: worst case per example, JSON on disk, refusals and the schema."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from small_reports import CW, FGSM, NATURAL, report_of

from deat_rb.evaluation.report import Check, CurvePoint, Report, json_schema
from deat_rb.evaluation.statistics import wilson
from deat_rb.evaluation.tables import sweep_table
from deat_rb.utils.errors import DeatError


def test_report_worst_case_is_per_example() -> None:
    worst = report_of(natural=NATURAL, fgsm=FGSM, cw=CW).worst_case
    assert (worst.n_correct, worst.n_examples, worst.accuracy) == (2, 5, 0.4)
    assert (worst.seconds, worst.forwards, worst.backwards) == (6.0, 30, 15)
    assert (worst.low, worst.high) == wilson(2, 5)
    assert NATURAL.tolist() == [True, True, True, True, False], "the verdicts given are not written to"


def test_report_save_and_load(tmp_path: Path) -> None:
    report = report_of(natural=NATURAL, fgsm=FGSM, cw=CW).model_copy(update={"provenance": {"model": "runs/a"}})
    file = report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval-verdicts.safetensors", "eval.json"]
    content = json.loads(file.read_text())
    assert content["results"]["fgsm"]["n_correct"] == 3
    assert content["provenance"] == {"model": "runs/a"}
    assert "verdicts" not in content
    assert "_verdicts" not in content
    for where in (tmp_path, file):
        again = Report.load(where)
        assert again.model_dump() == report.model_dump()
        assert list(again.verdicts) == ["natural", "fgsm", "cw"]
        assert torch.equal(again.verdicts["natural"], NATURAL)
        assert torch.equal(again.verdicts["cw"], CW)
        assert again.verdicts["cw"].dtype == torch.bool
    report.save(tmp_path / "other.json")
    assert (tmp_path / "other-verdicts.safetensors").exists()
    (tmp_path / "eval-verdicts.safetensors").unlink()
    assert Report.load(tmp_path).verdicts == {}


def test_report_load_refuses(tmp_path: Path) -> None:
    file = report_of(natural=NATURAL, fgsm=FGSM).save(tmp_path)
    report_of(natural=NATURAL, fgsm=NATURAL).save(tmp_path / "other.json")
    (tmp_path / "other-verdicts.safetensors").replace(tmp_path / "eval-verdicts.safetensors")
    with pytest.raises(DeatError, match=r"verdicts\.safetensors does not belong to"):
        Report.load(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"eps": "far"}))
    with pytest.raises(DeatError, match=r"not a valid evaluation report \(eps"):
        Report.load(file)
    natural = content["results"]["natural"]
    for wrong, sentence in (
        ({"results": {"fgsm": content["results"]["fgsm"]}}, "has no natural accuracy"),
        ({"results": {"natural": content["results"]["fgsm"]}}, "stores the result of fgsm under the name natural"),
        (
            {"results": {"natural": natural | {"n_correct": 6}}},
            "claims 80.00 % under natural with 6 of 5 correct on 5",
        ),
        (
            {"results": {"natural": natural | {"accuracy": 0.9}}},
            "claims 90.00 % under natural with 4 of 5 correct on 5",
        ),
        ({"n_examples": 4}, "claims 80.00 % under natural with 4 of 5 correct on 4"),
        # Wilson's interval with z = 1.96: (4 + z^2 / 2) / (5 + z^2) = 0.6697, and z / (5 + z^2) sqrt(4 / 5 + z^2 / 4)
        # = 0.2941 on both sides of it.
        (
            {"results": {"natural": natural | {"low": 0.7}}},
            "claims the interval 70.00 to 96.38 % under natural instead of 37.55 to 96.38 %",
        ),
        ({"worst_case": content["worst_case"] | {"high": 1.0}}, "claims the interval .* to 100.00 % under worst case"),
    ):
        file.write_text(json.dumps(content | wrong))
        with pytest.raises(DeatError, match=f"eval.json {sentence}.*; evaluate again$"):
            Report.load(file)
    file.write_text(json.dumps(content | {"schema_version": 1}))
    with pytest.raises(DeatError, match=r"of schema version 2 \(found 1\); evaluate again"):
        Report.load(file)
    file.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(DeatError, match="found 99"):
        Report.load(file)
    file.write_text("[1]")
    with pytest.raises(DeatError, match="found None"):
        Report.load(file)
    with pytest.raises(DeatError, match="does not exist"):
        Report.load(tmp_path / "nowhere")


def test_report_load_checks_the_worst_case_against_the_verdicts(tmp_path: Path) -> None:
    file = report_of(natural=NATURAL, fgsm=FGSM, cw=CW).save(tmp_path)
    content = json.loads(file.read_text())
    content["worst_case"] |= {
        name: content["results"]["fgsm"][name] for name in ("n_correct", "accuracy", "low", "high")
    }
    file.write_text(json.dumps(content))
    with pytest.raises(DeatError, match=r"the worst case of .* does not match its verdicts; evaluate again$"):
        Report.load(file)


def test_report_is_frozen_and_has_a_schema() -> None:
    report: Any = report_of(natural=NATURAL)
    with pytest.raises(ValueError, match="frozen"):
        report.eps = 0.2
    assert "worst_case" in Report.model_json_schema()["properties"]


def test_curve_point_of_counts_verdicts() -> None:
    point = CurvePoint.of(0.1, {"natural": NATURAL, "fgsm": FGSM, "cw": CW})
    assert point.n_correct == {"natural": 4, "fgsm": 3, "cw": 3}
    assert point.accuracy == {"natural": 0.8, "fgsm": 0.6, "cw": 0.6}
    assert point.worst_case == 0.4
    points = (CurvePoint.of(0.0, {"natural": NATURAL, "cw": NATURAL}), point)
    lines = printed(sweep_table(report_of(natural=NATURAL).model_copy(update={"curve": points})))
    assert ["cw", "80.00", "60.00"] in lines
    assert ["worst", "case", "80.00", "40.00"] in lines


def test_report_saves_curve_checks_and_notes(tmp_path: Path) -> None:
    added = {
        "curve": tuple(CurvePoint.of(eps, {"natural": NATURAL, "fgsm": FGSM}) for eps in (0.0, 0.1)),
        "checks": (Check(name="a", status="warn", figure=None, sentence="b"),),
        "notes": ("a note on all",),
        "norm": "L2",
        "precision": "bf16",
    }
    report = report_of(natural=NATURAL, fgsm=FGSM).model_copy(update=added)
    again = Report.load(report.save(tmp_path))
    assert again.model_dump() == report.model_dump()
    assert again.curve[1].eps == 0.1


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (0, {"n_correct": {"natural": 4, "fgsm": 4}}),
        (0, {"accuracy": {"natural": 0.8, "fgsm": 0.8}}),
        (0, {"n_correct": {"natural": 4, "fgsm": -1}, "accuracy": {"natural": 0.8, "fgsm": -0.2}}),
        (0, {"worst_case": 0.8}),
        (0, {"accuracy": {"natural": 0.8}}),
        (1, {"n_correct": {"natural": 4, "fgsm": 4}, "accuracy": {"natural": 0.8, "fgsm": 0.8}}),
        (1, {"worst_case": 0.4}),
    ],
)
def test_report_load_checks_the_curve(place: int, changed: dict[str, Any], tmp_path: Path) -> None:
    verdicts = {"natural": NATURAL, "fgsm": FGSM}
    points = tuple(CurvePoint.of(eps, verdicts) for eps in (0.05, 0.1))
    file = report_of(**verdicts).model_copy(update={"curve": points}).save(tmp_path)
    assert Report.load(file).curve == points
    content = json.loads(file.read_text())
    content["curve"][place] |= changed
    file.write_text(json.dumps(content))
    with pytest.raises(DeatError, match=r"eval.json has accuracies at eps .* that contradict its counts or results; "):
        Report.load(file)


def test_json_schema_accepts_a_saved_report(tmp_path: Path) -> None:
    schema = json.loads(json_schema())
    content = json.loads(report_of(natural=NATURAL, fgsm=FGSM).save(tmp_path).read_text())
    assert set(content) == set(schema["properties"])
    assert set(content["worst_case"]) == set(schema["$defs"]["AttackResult"]["properties"])
    assert schema["properties"]["norm"]["enum"] == ["Linf", "L2"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def printed(table: Table) -> list[list[str]]:
    """The words of each line of a table."""
    console = Console(width=100, file=io.StringIO())
    with console.capture() as lines:
        console.print(table)
    return [line.split() for line in lines.get().splitlines()]


def test_report_load_translates_old_names_of_checks(tmp_path: Path) -> None:
    file = report_of(natural=NATURAL).save(tmp_path)
    content = json.loads(file.read_text())
    names = ("eval mode", "normalisation inside", "larger balls find no more", "left out")
    content["checks"] = [{"name": name, "status": "pass", "figure": 1.0, "sentence": "As it was."} for name in names]
    file.write_text(json.dumps(content))
    assert [check.name for check in Report.load(file).checks] == [
        "eval mode", "normalization inside", "larger eps finds no more", "skipped",
    ]  # fmt: skip
