"""Paired comparisons of evaluations, and refusals of evaluations that are not comparable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from board_problems import make_run
from click.testing import CliRunner, Result
from small_problems import small_network

from deat_rb.cli import main
from deat_rb.evaluation.compare import compare, load_reports
from deat_rb.evaluation.report import AttackResult, Report
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors


def report_of(fields: dict[str, Any] | None = None, /, **correct: str) -> Report:
    """A report whose verdicts are written as 1s and 0s."""
    verdicts = {name: torch.tensor([digit == "1" for digit in digits]) for name, digits in correct.items()}
    results = [AttackResult.of(name, each, seconds=1.0, forwards=1, backwards=1) for name, each in verdicts.items()]
    known: dict[str, Any] = {"eps": 8 / 255, "num_classes": 10, "seed": 0, "batch_size": 4, "device": "cpu",
                             "versions": {}, "provenance": {"data_sha256": "abc"}}  # fmt: skip
    return Report.of(results, verdicts, **{**known, **(fields or {})})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two evaluations of eight images."""
    for name, report in {
        "one": report_of(natural="11111110", fgsm="11111000", pgd="11110000"),
        "two": report_of(natural="11111111", fgsm="11000001", cw="11000000"),
    }.items():
        (tmp_path / name).mkdir()
        report.save(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def test_compare_counts_paired_differences() -> None:
    one = report_of(natural="11111111", fgsm="11111000", pgd="11110000")
    two = report_of(natural="11111111", fgsm="10000111", pgd="00001111")
    found = compare([("one", one), ("two", two)])
    by_attack = {each.attack: each for each in found.differences}
    assert list(by_attack) == ["natural", "fgsm", "pgd", "worst case"]
    fgsm = by_attack["fgsm"]
    assert (fgsm.first, fgsm.second, fgsm.n_examples) == ("one", "two", 8)
    assert (fgsm.only_first, fgsm.only_second, fgsm.points) == (4, 3, -12.5)
    assert fgsm.p_value == 1.0
    worst = by_attack["worst case"]
    # one: 1111 0000; two: 0000 0111.
    assert (worst.only_first, worst.only_second, worst.points) == (4, 3, -12.5)
    assert by_attack["natural"].p_value == 1.0


def test_compare_worst_case_is_over_common_attacks() -> None:
    one = report_of(natural="1111", fgsm="1110", pgd="1100", cw="0000")
    two = report_of(natural="1111", fgsm="1111", pgd="1111")
    three = report_of(natural="1111", fgsm="1111", pgd="0111")
    found = compare([("one", one), ("two", two), ("three", three)])
    assert found.accuracy["one"] == {"natural": 1, "fgsm": 0.75, "pgd": 0.5, "cw": 0, "worst case": 0.5}
    assert [each.second for each in found.differences if each.attack == "pgd"] == ["two", "three"]
    assert {each.first for each in found.differences} == {"one"}


def test_compare_makes_names_unique() -> None:
    report = report_of(natural="11")
    assert list(compare([("a", report), ("a", report), ("b", report), ("a", report)]).accuracy) == [
        "a", "a (2)", "b", "a (3)",
    ]  # fmt: skip
    other = report_of(natural="10")
    found = compare([("a", report), ("a", report), ("a (2)", other)])
    assert {name: each["natural"] for name, each in found.accuracy.items()} == {"a": 1.0, "a (3)": 1.0, "a (2)": 0.5}
    assert [(each.second, each.points) for each in found.differences] == [("a (3)", 0.0), ("a (2)", -50.0)]


@pytest.mark.parametrize(
    ("changed", "correct", "message"),
    [
        ({"eps": 4 / 255}, "1111", "their eps is 0.0313.* and 0.0156.*; re-evaluate with identical settings$"),
        ({"norm": "L2"}, "1111", "their norm is Linf and L2"),
        ({"num_classes": 100}, "1111", "their number of classes is 10 and 100"),
        ({}, "111", "their number of examples is 4 and 3"),
        (
            {"provenance": {"data_sha256": "def"}},
            "1111",
            "different images, or their classes have different orders; evaluate both on the same images and classes$",
        ),
        ({"provenance": {}}, "1111", "a and b do not both record a hash of their test images"),
    ],
)
def test_compare_refuses_other_settings_or_examples(changed: dict[str, Any], correct: str, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        compare([("a", report_of(natural="1111")), ("b", report_of(changed, natural=correct))])


def test_compare_prefers_the_digest_of_the_examples() -> None:
    """Runs on the same data can have been evaluated on other examples of it, and the other way round."""
    same, other = ({"examples_sha256": digest, "provenance": {"data_sha256": digest}} for digest in ("12", "34"))
    are_comparable = {**other, "examples_sha256": "12"}
    assert compare([("a", report_of(same, natural="11")), ("b", report_of(are_comparable, natural="11"))])
    with pytest.raises(DeatError, match="different images"):
        compare([("a", report_of(same, natural="11")), ("b", report_of(other, natural="11"))])


def test_compare_notes_bf16_upper_bounds(tmp_path: Path) -> None:
    for name, precision in (("[a]", "fp32"), ("[b]", "bf16")):
        (tmp_path / name).mkdir()
        report_of({"precision": precision}, natural="11", fgsm="10").save(tmp_path / name)
    assert compare(load_reports([tmp_path / "[a]"] * 2)).notes == ()
    result = run(tmp_path / "[a]", tmp_path / "[b]")
    assert "note: [b] was attacked in bf16: its robust accuracies are upper bounds" in result.stdout


def test_compare_notes_that_methods_are_not_tested() -> None:
    made = [report_of({"provenance": {"data_sha256": "abc", "method": name}}, natural="1111", pgd="1100")
            for name in ("trades", "trades", "mart")]  # fmt: skip
    named = list(zip("abc", made, strict=True))
    assert compare(named[:2]).notes == ()
    (note,) = compare(named).notes
    assert note.startswith("the test compares these networks, not their methods, which takes several seeds of each")


def test_compare_notes_attacks_with_other_settings() -> None:
    reports = []
    for alpha in (2 / 255, 0.025):
        report = report_of(natural="1111", pgd="1100")
        result = report.results["pgd"].model_copy(update={"parameters": {"eps": 0.1, "alpha": alpha}})
        reports.append(report.model_copy(update={"results": {**report.results, "pgd": result}}))
    one, two = reports
    assert compare([("one", one), ("other", one)]).notes == ()
    assert compare([("one", one), ("two", two)]).notes == (
        "pgd has other settings in two than in one (alpha 0.025, not 0.00784313725490196): evaluate one of them again",
    )


def test_compare_needs_two_reports() -> None:
    with pytest.raises(DeatError, match=r"^a comparison needs two or more evaluations, not 1$"):
        compare([("a", report_of(natural="11"))])


def test_compare_needs_verdicts(runs: list[Path]) -> None:
    (runs[1] / "eval-verdicts.safetensors").unlink()
    with pytest.raises(DeatError, match=r"^the verdicts file of two is missing next to its eval\.json"):
        compare(load_reports(runs))


def test_compare_command_prints_both_tables(runs: list[Path]) -> None:
    result = run(*runs)
    assert result.exit_code == 0, result.output
    rows = [line.replace("│", " ").split() for line in result.output.splitlines()]
    assert ["fgsm", "62.50", "%", "37.50", "%"] in rows
    assert ["pgd", "50.00", "%", "-"] in rows
    assert ["cw", "-", "25.00", "%"] in rows
    assert ["two", "fgsm", "-25.00", "points", "1", "3", "0.62"] in rows


def test_compare_command_prints_json(runs: list[Path]) -> None:
    content = json.loads(run(*runs, "--json").output)
    assert content["accuracy"]["two"]["cw"] == 0.25
    assert content["differences"][1] == {
        "attack": "fgsm", "first": "one", "second": "two", "n_examples": 8, "points": -25.0, "only_first": 3,
        "only_second": 1, "p_value": 0.625,
    }  # fmt: skip


def test_compare_accuracies_are_counts_over_examples() -> None:
    """Of float32 a fraction such as 4 / 25 would be 0.15999999642."""
    report = report_of(natural="1" * 25, fgsm="1" * 4 + "0" * 21, pgd="1" * 4 + "0" * 21)
    accuracy = compare([("a", report), ("b", report)]).accuracy["b"]
    assert accuracy == {"natural": 1.0, "fgsm": 0.16, "pgd": 0.16, "worst case": 0.16}


def test_load_reports_accepts_files(runs: list[Path]) -> None:
    assert [name for name, _ in load_reports([runs[0] / "eval.json", runs[1]])] == [str(runs[0] / "eval.json"), "two"]


def test_compare_command_accepts_names_that_are_not_utf8(tmp_path: Path) -> None:
    run_path = tmp_path / "a\udcff"
    run_path.mkdir()
    report_of(natural="11").save(run_path)
    content = json.loads(run(run_path, run_path, "--json").output)
    assert list(content["accuracy"]) == ["a\ufffd", "a\ufffd (2)"]


def test_compare_command_refuses_in_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "three").mkdir()
    for arguments, message in (
        ([runs[0]], "a comparison needs two or more evaluations, not 1"),
        ([runs[0], tmp_path / "three"], f"{tmp_path / 'three'} has no evaluation"),
        ([runs[0], tmp_path / "four.json"], f"{tmp_path / 'four.json'} does not exist"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("options", [[], ["--group-by", "method"]])
def test_compare_command_refuses_evaluations_of_other_weights(options: list[str], tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert run(first, second).exit_code == 0
    save_tensors(second / "last.safetensors", small_network().state_dict())
    result = run(first, second, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{second / 'eval.json'} was computed for weights other than the run's (SHA-256 " in result.stderr
    assert f"): run deat-rb eval {second} first" in result.stderr
    assert run(first / "eval.json", second / "eval.json").exit_code == 0, "a file is compared as it is"


def test_compare_command_prints_no_control_characters(tmp_path: Path) -> None:
    attack = "\x1b]0;owned\x07\x9b2J\u202egnp"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        report_of(natural="1110", fgsm="1100", **{attack: "1000"}).save(tmp_path / name)
    for options in ([], ["--json"]):
        result = run(tmp_path / "one", tmp_path / "two", *options)
        assert result.exit_code == 0, result.output
        assert not re.search("[\x1b\x07\x9b\u202e]", result.output)
        assert "owned" in result.output


def test_compare_tables_escape_markup(tmp_path: Path) -> None:
    for name in ("[red]a", "[/b]"):
        report_of(natural="11").save(tmp_path / f"{len(name)}.json")
    found = compare([("[red]a", report_of(natural="11")), ("[/b]", report_of(natural="11"))])
    header = [column.header for column in found.table().columns]
    assert [str(each) for each in header] == ["attack", r"\[red]a", r"\[/b]"]


@pytest.mark.parametrize("count", [2, 6])
def test_comparison_names_long_runs_in_a_legend(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"m+trades-cifar10-timm-convnextv2_atto-with-ema-and-label-smoothing-s{number}" for number in range(count)]
    lines = str(compare([(name, report_of(natural="1110", fgsm="1100")) for name in names])).splitlines()
    assert lines[:count] == [f"run {number}: {name}" for number, name in enumerate(names, start=1)]
    assert max(map(len, lines[count:])) <= 80
    assert not any("convnext" in line for line in lines[count:])
    assert any(line.split()[:3] == ["run", "2", "natural"] for line in lines)


@pytest.mark.parametrize("count", [2, 6])
def test_comparison_tables_fit_the_terminal(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    attacks = dict.fromkeys(("natural", "fgsm", "pgd", "cw", "autoattack"), "1110")
    names = [f"m+trades-seed{number}" for number in range(count)]
    text = str(compare([(name, report_of(**attacks)) for name in names]))
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in names)
    assert text.count("75.00 %") == 6 * count
