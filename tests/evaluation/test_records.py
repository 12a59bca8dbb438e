"""Which evaluation of a run is its eval.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from check_reports import report_of

from deat_rb.evaluation.records import is_as_full, place, record_name
from deat_rb.evaluation.report import Check, CurvePoint, Report


def report(*attacks: str, n: int = 100, eps: Any = 0.1, **fields: Any) -> Report:
    return report_of({name: torch.ones(n, dtype=torch.bool) for name in ("natural", *attacks)}, eps=eps, **fields)


def curve(*radii: float) -> dict[str, Any]:
    return {"curve": tuple(CurvePoint(eps=eps, n_correct={}, accuracy={}, worst_case=1.0) for eps in radii)}


CHECKED: dict[str, Any] = {"checks": (Check(name="a", status="pass", figure=0.0, sentence="Good."),)}

QUICK, DEFAULT = report("fgsm"), report("fgsm", "pgd-100", "cw-20")


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (DEFAULT, DEFAULT, True),
        (DEFAULT, QUICK, True),
        (QUICK, DEFAULT, False),
        (report("autoattack"), DEFAULT, True),
        (DEFAULT, report("autoattack"), False),
        (report("autoattack", n=99), DEFAULT, False),
        (report("autoattack", n=99), report("autoattack"), False),
        (report("autoattack-plus"), report("autoattack"), True),
        (report("autoattack-rand"), report("autoattack"), False),
        (report("fgsm", "pgd-100", "cw-20", n=99), DEFAULT, False),
        (report("pgd-100", "cw-20"), DEFAULT, False),
        (report("pgd-50"), QUICK, True),
        (report("fgsm", "pgd-100", "cw-20", precision="bf16"), DEFAULT, False),
        (DEFAULT, report("fgsm", "pgd-100", "cw-20", precision="bf16"), True),
        (report("fgsm", norm="L2"), QUICK, False),
        (report("fgsm", eps=0.2), QUICK, False),
        (report("fgsm", **CHECKED), QUICK, True),
        (QUICK, report("fgsm", **CHECKED), False),
        (report("fgsm", **curve(0, 0.1)), QUICK, True),
        (QUICK, report("fgsm", **curve(0, 0.1)), False),
        (report("fgsm", **curve(0, 0.1)), report("fgsm", **curve(0, 0.05, 0.1)), False),
    ],
)
def test_is_as_full(new: Report, old: Report, expected: bool) -> None:
    assert is_as_full(new, old) == expected


@pytest.mark.parametrize(
    ("present", "new", "options", "replaces"),
    [
        (None, QUICK, {}, True),
        (QUICK, DEFAULT, {}, True),
        (DEFAULT, QUICK, {}, False),
        (DEFAULT, QUICK, {"overwrite": True}, True),
        (DEFAULT, report("fgsm", "pgd-100", "cw-20", "autoattack"), {"own_data": False}, False),
        (None, QUICK, {"own_data": False}, False),
        (report("fgsm", model_sha256="a"), report("natural", model_sha256="b"), {}, True),
        (report("pgd-100", provenance={"data_sha256": "a"}), report("fgsm", provenance={"data_sha256": "b"}), {}, True),
        (report("autoattack", eps=0.2), QUICK, {}, True),  # the run was trained for 0.1
        (QUICK, report("autoattack", eps=0.2), {}, False),
        (report("autoattack", norm="L2"), QUICK, {}, True),
        (QUICK, report("autoattack", norm="L2"), {"own_norm": "L2"}, True),
    ],
)
def test_place(present: Report | None, new: Report, options: dict[str, Any], replaces: bool, tmp_path: Path) -> None:
    if present is not None:
        present.save(tmp_path)
    placed = place(tmp_path, new, own_eps=0.1, **{"own_data": True, **options})
    assert (placed.file == tmp_path / "eval.json") == replaces
    if not replaces:
        assert placed.file == tmp_path / "evaluations" / f"{record_name(new)}.json"
    archived = {path.name for path in placed.archived}
    expected = {f"{record_name(present)}.json", f"{record_name(present)}-verdicts.safetensors"} if present else set()
    assert archived == (expected if replaces else set())
    new.save(placed.file, placed.archived)
    if present is not None and replaces:
        assert Report.load(tmp_path / "evaluations" / f"{record_name(present)}.json").results == present.results


def test_place_replaces_damaged_reports(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{")
    assert place(tmp_path, QUICK, own_data=True, own_eps=0.1).file == tmp_path / "eval.json"


def test_record_name_tells_evaluations_apart() -> None:
    reports = [QUICK, DEFAULT, report("fgsm", n=99), report("fgsm", eps=8 / 255), report("fgsm", **curve(0, 0.1)),
               report("torchattacks.PGD(steps=2, alpha=2/255)"), report("torchattacks.PGD(steps=3, alpha=2/255)"),
               report("fgsm", precision="bf16"), report("fgsm", norm="L2"), report()]  # fmt: skip
    names = [record_name(each) for each in reports]
    assert len(set(names)) == len(names)
    assert names[0] == record_name(report("fgsm"))
    assert names[3].startswith("fgsm-Linf-8_255-100-")
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_") for name in names)
    assert all(len(name) < 90 for name in names)
