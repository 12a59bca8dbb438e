"""Leaderboard entries: validation, reading and writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from board_problems import INFO, SPEC

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.entry import Accuracy, Entry, RobustBenchInfo, check_model_name, parse_entry, read_entries
from deat_rb.utils.errors import DeatError

HALF, QUARTER = Accuracy(n_correct=50, n_examples=100), Accuracy(n_correct=25, n_examples=100)


def fields(**changes: Any) -> dict[str, Any]:
    valid: dict[str, Any] = {
        "model_name": "Wang2021Gradient", "kind": "measured", "dataset": "digits", "eps": "0.1",
        "figures": {"natural": HALF, "autoattack": QUARTER}, "n_examples": 100, "n_test": 500, "model": SPEC,
        "classes": ("0", "1"), "weights_sha256": "a" * 64, "data_sha256": "b" * 64, "submitted": "2026-01-31",
        "steps": (1, 2, 2), "metrics": ({"epoch": 1, "lr": 0.1},),
        "checks": (Check(name="eval mode", status="pass", figure=None, sentence="AutoAttack <= others."),),
    }  # fmt: skip
    return {**valid, **changes}


def entry(**changes: Any) -> Entry:
    return Entry.create(fields(**changes), "the entry")


def test_parse_entry_reads_what_json_bytes_writes() -> None:
    assert parse_entry(entry().json_bytes(), "x") == entry()


def test_json_bytes_stores_counts_only() -> None:
    content = json.loads(entry().json_bytes())
    assert content["figures"]["natural"] == {"n_correct": 50, "n_examples": 100}
    assert not {"clean_acc", "autoattack_acc"} & content.keys()


def test_parse_entry_reads_entries_that_store_percents_too() -> None:
    content = json.loads(entry().json_bytes()) | {"clean_acc": "99.00", "autoattack_acc": "99.00"}
    content["figures"]["natural"] |= {"accuracy": 0.99, "low": 0.9, "high": 1.0}
    assert parse_entry(json.dumps(content).encode(), "x") == entry(), "the counts decide"


def test_parse_entry_reads_an_entry_of_the_first_format() -> None:
    """A whole one, as commit 64c0c76 had it: with percents and intervals, and names of checks that are others now."""
    old = Path(__file__).parents[1] / "fixtures/entry_of_the_first_format.json"
    measured = parse_entry(old.read_bytes(), "old")
    assert b'"accuracy"' in old.read_bytes()
    assert (measured.clean_acc, measured.autoattack_acc) == ("40.00", "20.33")


def test_entry_computes_its_accuracies_and_key() -> None:
    measured = entry()
    assert (measured.key, measured.clean_acc, measured.autoattack_acc) == (
        "digits/Linf/Wang2021Gradient",
        "50.00",
        "25.00",
    )
    assert (measured.robust, entry(external="20.5").robust) == (25.0, 20.5)
    assert (measured.percent("autoattack"), measured.percent("fgsm")) == (25.0, None)
    assert measured.is_subset
    assert not entry(n_test=100).is_subset


def test_accuracy_has_a_wilson_interval() -> None:
    accuracy = Accuracy(n_correct=5, n_examples=10)  # z = 1.95996: half = z * sqrt(.025 + z^2 / 400) / (1 + z^2 / 10)
    assert accuracy.interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert accuracy.percent == "50.00"


@pytest.mark.parametrize("n_correct", [-1, 101, 10**10, 50.0])
def test_accuracy_refuses_impossible_counts(n_correct: float) -> None:
    with pytest.raises(ValueError, match="n_correct"):
        Accuracy.model_validate({"n_correct": n_correct, "n_examples": 100})


@pytest.mark.parametrize(("changes", "message"), [
    ({"figures": {"autoattack": QUARTER}},                   "needs figures.natural"),
    ({"figures": {"natural": QUARTER, "fgsm": HALF}},        "figures.fgsm is above the natural accuracy"),
    ({"n_examples": 99},                                     "figures.natural has 100 examples, but the entry has 99"),
    ({"n_test": 99},                                         "n_examples 100 is greater than n_test 99"),
    ({"reported": "50.01"},                                  "reported 50.01 is above clean_acc"),
    ({"external": "25.01"},                                  "external 25.01 is above autoattack_acc"),
    ({"external": "99.99", "figures": {"natural": HALF}},    "external 99.99 needs an accuracy under AutoAttack"),
    ({"kind": "published", "figures": {}, "clean_acc": "50.00", "external": "50.01"},
     "external 50.01 is above clean_acc 50.00"),
    ({"kind": "published", "figures": {}, "clean_acc": "100.99"},  "clean_acc: is not an accuracy in percent"),
    ({"submitted": "2026-13-01"},                            "submitted: is not a date"),
    ({"schema_version": True},                               "schema_version: "),
    ({"schema_version": 1.0},                                "schema_version: "),
    ({"external": "nan"},                                    "external: is not an accuracy in percent"),
    ({"architecture": "WideResNet-\u0661\u0660-1"},          "architecture: has digits other than 0 to 9"),
    ({"weights_file": "weights/../secret"},                  "weights_file is not weights/digits/Linf/Wang2021Gra"),
    ({"model": SPEC.model_copy(update={"arch": "os:x"})},     "built by 'os', but submitted code is never run"),
    ({"submitted": "31.1.2026"},                             "submitted: is not a date"),
    ({"submitted": "2026-02-31"},                            "submitted: is not a date"),
    ({"weights_sha256": "A" * 64},                           "is not a SHA-256"),
    ({"weights_sha256": None},                               "a measured entry needs weights_sha256"),
    ({"kind": "published"},                                  "a published entry cannot have figures"),
    ({"eps": "2"},                                           r"eps 2 is outside \(0, 1\]"),
    ({"surprise": 1},                                        "surprise: "),
    ({"steps": (1.5,)},                                      r"steps\.0: "),
    ({"metrics": ({"lr": "fast"},)},                         r"metrics\.0\.lr"),
    ({"metrics": ({"<b>": 1},)},                             r"metrics\.0"),
    ({"epochs": True},                                       "epochs: "),
    ({"schema_version": 2},                                  "schema_version: "),
])  # fmt: skip
def test_entry_refuses_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        entry(**changes)


def test_entry_in_l2_takes_an_eps_above_1() -> None:
    assert entry(eps="2", threat_model="L2").eps == "2"


def test_parse_entry_names_a_newer_schema_version() -> None:
    content = json.loads(entry().json_bytes()) | {"schema_version": 2, "new_field": 1}
    with pytest.raises(
        DeatError, match="x has schema version 2, but this version of deat-rb supports only 1: update deat-rb"
    ):
        parse_entry(json.dumps(content).encode(), "x")


def info(**changes: Any) -> RobustBenchInfo:
    return RobustBenchInfo.parse(json.dumps({**INFO, **changes}).encode(), "x")


def test_robustbench_info_reads_nan_and_empty_text_as_unknown() -> None:
    parsed = info(reported="nan", venue="")
    assert (parsed.reported, parsed.venue, parsed.clean_acc) == (None, None, "80.00")


@pytest.mark.parametrize(
    ("eps", "spelled"),
    [(8 / 255, "8/255"), (0.031, "0.031"), (" 8/255", "8/255"), ("16/510", "8/255"), (1, "1"), (3.0, "3")],
)
def test_robustbench_info_spells_eps_in_one_way(eps: object, spelled: str) -> None:
    assert info(eps=eps).eps == spelled


@pytest.mark.parametrize(
    "eps",
    ["nan/255", "8/nan", "inf", "1/0", "", "9" * 4_000_000, "\uff18/255", "8_0/2550", 0, -1, 10**400, True, None, [8]],
    ids=lambda eps: repr(eps)[:12],
)
def test_robustbench_info_refuses_impossible_eps(eps: object) -> None:
    with pytest.raises(DeatError, match=r"^x is not valid: eps"):
        info(eps=eps)


@pytest.mark.parametrize(
    "link",
    ["https://:x@evil.org/", "https://@evil.org/", "https://arxiv.org:@evil.org", "https://a.org:99999999/",
     "https://a.org:0/", "https://a.org:x/", "https://\u0430rxiv.org/abs/1", "https:///abs", "https:a.org"],
)  # fmt: skip
def test_entry_refuses_misleading_links(link: str) -> None:
    with pytest.raises(DeatError, match="link: is not an https"):
        entry(link=link)
    assert entry(link="https://arxiv.org:443/abs/1@x").link == "https://arxiv.org:443/abs/1@x"


def test_check_model_name_takes_robustbenchs_names() -> None:
    assert check_model_name("RodriguezMunoz2024Characterizing_Swin-B") == "RodriguezMunoz2024Characterizing_Swin-B"
    with pytest.raises(DeatError, match="at most 80 characters"):
        check_model_name("Wang2021" + "G" * 90)


def test_read_entries_refuses_misplaced_entries(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r"there is no leaderboard at .*: deat-rb submit RUN --board"):
        read_entries(tmp_path)
    file = tmp_path / "entries/digits/Linf/Wang2021Gradient.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(entry().json_bytes())
    assert read_entries(tmp_path) == (entry(),)
    file.rename(file.with_name("Wang2022Gradient.json"))
    with pytest.raises(DeatError, match="is misplaced"):
        read_entries(tmp_path)
    left_out: list[str] = []
    assert read_entries(tmp_path, left_out=left_out) == ()
    assert "is misplaced" in left_out[0]
