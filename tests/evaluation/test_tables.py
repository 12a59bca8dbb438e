"""Tables over several evaluations and of one report."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table
from small_reports import CW, FGSM, NATURAL, report_of

from deat_rb.evaluation.report import CurvePoint
from deat_rb.evaluation.tables import are_comparable, group, means, sweep_table
from deat_rb.utils.text import as_text


def printed(table: Table) -> list[list[str]]:
    """The words of each line of a table."""
    console = Console(width=100, file=io.StringIO())
    with console.capture() as lines:
        console.print(table)
    return [line.split() for line in lines.get().splitlines()]


def test_means_over_comparable_reports() -> None:
    one, other = report_of(natural=NATURAL, fgsm=FGSM), report_of(natural=NATURAL, fgsm=CW)
    third = report_of(natural=NATURAL, fgsm=NATURAL & FGSM & CW)
    lines = printed(means({"trades": [one, other, third], "mart": [one, third], "pgd-7": [one]}, width=100))
    # 60, 60 and 40 %: the mean is 53.33, and the deviations' squares 44.4, 44.4 and 177.8 sum to 2 * 11.55^2.
    assert ["group", "runs", "natural", "fgsm", "worst", "case"] in lines
    assert ["trades", "3", "80.00", "±", "0.00", "53.33", "±", "11.55", "53.33", "±", "11.55"] in lines
    # 60 and 40 %: the deviation is 20 / sqrt(2).
    assert ["mart", "2", "80.00", "±", "0.00", "50.00", "±", "14.14", "50.00", "±", "14.14"] in lines
    assert ["pgd-7", "1", "80.00", "60.00", "60.00"] in lines
    assert are_comparable([one, other, third])
    for different in ({"eps": 0.2}, {"norm": "L2"}, {"precision": "bf16"}, {"examples_sha256": "ab"}):
        assert not are_comparable([one, other.model_copy(update=different)])


def test_means_name_the_settings_that_differ_between_groups() -> None:
    one = report_of(natural=NATURAL, fgsm=FGSM).model_copy(update={"eps": 8 / 255})

    def names(**different: object) -> list[str]:
        table = means({"trades": [one, one], "mart": [one.model_copy(update=different)]})
        return list(map(str, table.columns[0].cells))

    assert names() == ["trades", "mart"]
    assert names(eps=0.5) == ["trades, evaluated at eps 8/255", "mart, evaluated at eps 0.5"]
    assert names(eps=0.5, norm="L2") == ["trades, evaluated in Linf at eps 8/255", "mart, evaluated in L2 at eps 0.5"]
    assert names(provenance={"dataset": "digits"}, examples_sha256="0123456789")[1] == (
        "mart, evaluated on digits (SHA-256 01234567)"
    )


def test_table_folds_long_names() -> None:
    long = "torchattacks." + "x" * 150
    report = report_of(**{"natural": NATURAL, long: FGSM})
    sweep = report.model_copy(update={"curve": (CurvePoint.of(0.1, report.verdicts),)})
    for table in (report.table(), sweep_table(sweep), means({"a": [report, report]})):
        assert long in "".join(word for line in printed(table) for word in line if set(word) <= set(long))


def test_table_escapes_markup() -> None:
    report = report_of(**{"natural": NATURAL, "a[/]": FGSM, "[red]b": CW})
    sweep = report.model_copy(update={"curve": (CurvePoint.of(0.1, report.verdicts),)})
    for table in (report.table(), sweep_table(sweep), means({"a": [report, report]})):
        words = [word for line in printed(table) for word in line]
        assert {"a[/]", "[red]b"} <= set(words)


def test_report_table() -> None:
    lines = printed(report_of(natural=NATURAL, fgsm=FGSM, cw=CW).table())
    fgsm = next(line for line in lines if "fgsm" in line)
    assert "60.00" in fgsm
    assert "2.0" in fgsm
    assert next(line for line in lines if "worst" in line)[1:3] == ["case", "40.00"]


def test_report_str_is_the_table() -> None:
    text = str(report_of(natural=NATURAL, fgsm=FGSM))
    assert "fgsm" in text
    assert "60.00 %" in text
    assert "\x1b" not in text
    assert "model_sha256" not in text


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    attacks = ("fgsm", "pgd-100", "cw-20", "autoattack", "torchattacks.PGD(alpha=0.01, steps=10)")
    report = report_of(natural=NATURAL, **dict.fromkeys(attacks, FGSM))
    for table in (report.table(), means({"trades, epochs 10": [report, report], "m+trades": [report]}, width=columns)):
        lines = as_text(table).splitlines()
        assert max(map(len, lines)) <= columns
        assert re.search(r"(?<!\S)(80\.00|± 0\.00)(?!\S)", "\n".join(lines)), "numbers are not split over lines"


@pytest.mark.parametrize("count", [2, 12])
def test_sweep_table_fits_the_terminal(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = report_of(natural=NATURAL, fgsm=FGSM)
    points = tuple(CurvePoint.of(number / 255, report.verdicts) for number in range(count))
    text = as_text(sweep_table(report.model_copy(update={"curve": points})))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("80.00") == text.count("60.00") / 2 == count


def test_group_separates_everything_but_what_is_left_out() -> None:
    trades, mart = {"method": "trades", "epochs": 10, "lr": 0.1}, {"method": "mart", "epochs": 10, "lr": 0.1}
    assert group([trades, mart, trades, mart, trades]) == {"trades": [0, 2, 4], "mart": [1, 3]}
    longer = {**trades, "epochs": 20}
    assert group([trades, longer, trades]) == {"trades, epochs 10": [0, 2], "trades, epochs 20": [1]}
    assert group([{}, {}]) == {"all": [0, 1]}
    assert group([trades, {"method": "m+trades", "gamma": 1.01}]) == {"trades": [0], "m+trades": [1]}
