"""Tables of results as text."""

from __future__ import annotations

import csv
from dataclasses import replace

from deat_rb.reproduction.results import RunResult
from deat_rb.reproduction.tables import (
    Published,
    ResultTable,
    Row,
    as_csv,
    as_json,
    as_latex,
    as_markdown,
    as_rich,
    images_text,
)
from deat_rb.utils.text import as_text


def run(seed: int, natural: float, status: str = "done", reason: str = "") -> RunResult:
    values = {"natural": natural, "backward passes": 1234.0, "minutes": 1.5} if status == "done" else {}
    return RunResult(f"m-deat-{seed}", "m_deat & co", seed, status, reason, values)


def table() -> ResultTable:
    runs = (run(0, 80.0), run(1, 82.0), run(2, 0.0, "failed", "training diverged"))
    row = Row("m_deat & co", runs, {"natural": Published(79.88, 0.5)})
    return ResultTable("t", "A title", ("natural", "backward passes", "minutes"), (row,), ("Not the paper's.",))


def test_markdown() -> None:
    text = as_markdown(table())
    # the mean of 80 and 82 is 81, their deviation is sqrt 2; 81 - 79.88 = 1.12
    assert "| m\\_deat & co | 2 of 3 | 81.00 ± 1.41<br>79.88 ± 0.5 (+1.12) | 1,234 ± 0 | 1.50 ± 0.00 |" in text
    assert "Not the paper's." in text
    assert "seed 2 failed: training diverged" in text


def test_latex_and_csv() -> None:
    latex = as_latex(table())
    assert r"\begin{tabular}{lrrrr}" in latex
    assert r" & seeds & natural, \% & " in latex
    assert r"m\_deat \& co & 2 of 3 & 81.00 $\pm$ 1.41 & 1,234 $\pm$ 0 & " in latex
    assert r"{\footnotesize paper} &  & {\footnotesize 79.88 $\pm$ 0.5 (+1.12)} & " in latex
    (cells,) = csv.DictReader(as_csv(table()).splitlines())
    assert cells["note"] == "Not the paper's. seed 2 failed: training diverged"
    assert (cells["natural"], cells["natural published"], cells["seeds"]) == ("81.0", "79.88", "2")


def test_tables_have_no_mean_over_some_of_the_runs_only() -> None:
    runs = [run(0, 80.0), run(1, 82.0), run(2, 84.0)]
    for number, accuracy in ((0, 40.0), (2, 42.0)):
        runs[number].values["autoattack"] = accuracy
    some = ResultTable.of(runs, name="t", title="A title")
    assert some.columns[:2] == ("natural", "autoattack")
    # the mean of 80, 82 and 84 is 82, their deviation 2
    assert "| 3 | 82.00 ± 2.00 | - |" in as_markdown(some)
    assert r"co & 3 & 82.00 $\pm$ 2.00 & - &" in as_latex(some)
    assert as_text(as_rich(some)).splitlines()[-1].split()[:7] == ["m_deat", "&", "co", "3", "82.00", "±2.00", "-"]
    (cells,) = csv.DictReader(as_csv(some).splitlines())
    assert (cells["natural"], cells["autoattack"], cells["autoattack deviation"]) == ("82.0", "", "")
    row = as_json(some)["rows"][0]
    assert row["means"]["autoattack"] is None
    assert [each["values"].get("autoattack") for each in row["runs"]] == [40.0, None, 42.0]


def test_json_has_every_run() -> None:
    row = as_json(table())["rows"][0]
    assert row["means"]["natural"]["count"] == 2
    assert [each["status"] for each in row["runs"]] == ["done", "done", "failed"]


def test_a_single_run_has_no_deviation() -> None:
    one = ResultTable.of([run(0, 80.0)], name="t", title="A title")
    assert "| 1 | 80.00 | 1,234 | 1.50 |" in as_markdown(one)


def test_images_text() -> None:
    """Of runs that are not done, none were measured; a row on another dataset may have other images."""
    done, failed = run(0, 80.0), run(2, 0.0, "failed")
    assert images_text([failed]) == ""
    first = replace(done, images={"natural": 1000, "pgd-100": 1000})
    assert images_text([first, failed]) == "Test images: 1,000."
    both = [replace(done, images={**first.images, "autoattack": 200}), replace(done, images={"natural": 500})]
    assert images_text(both) == "Test images: 500 to 1,000 (natural), 1,000 (PGD-100), 200 (AutoAttack)."
