"""An entry of the leaderboard: what it holds together, and how it is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from board_problems import INFO, SPEC
from click.testing import CliRunner

from deat_rb.cli import main
from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.entry import Accuracy, Entry, RobustBenchInfo, check_model_name, parse_entry, read_entries
from deat_rb.leaderboard.untrusted import parse_json, plain, read_limited
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import printable

DOCUMENTED = Path(__file__).parents[2] / "docs" / "schema" / "entry.schema.json"


def fields(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model_name": "Wang2021Gradient", "kind": "measured", "dataset": "digits", "eps": "0.1", "clean_acc": "50.00",
        "autoattack_acc": "25.00", "figures": {"natural": Accuracy.of(50, 100), "autoattack": Accuracy.of(25, 100)},
        "n_examples": 100, "n_test": 500, "model": SPEC, "classes": ("0", "1"), "weights_sha256": "a" * 64,
        "data_sha256": "b" * 64, "submitted": "2026-01-31", "steps": (1, 2, 2), "metrics": ({"epoch": 1, "lr": 0.1},),
        "checks": (Check(name="eval mode", status="pass", figure=None, sentence="AutoAttack <= others."),),
    }  # fmt: skip
    return {**made, **changes}


def entry(**changes: Any) -> Entry:
    return Entry.checked(fields(**changes), "the entry")


def test_it_is_read_as_it_was_written() -> None:
    assert parse_entry(entry().json_bytes(), "x") == entry()


def test_schema_is_the_documented_one() -> None:
    result = CliRunner().invoke(main, ["leaderboard", "--schema"])
    assert result.exit_code == 0
    assert result.stdout == DOCUMENTED.read_text(encoding="utf-8")
    assert json.loads(result.stdout)["properties"].keys() == entry().model_dump().keys()


def test_what_it_says_of_itself() -> None:
    assert entry().key == "digits/Linf/Wang2021Gradient"
    assert entry().robust == 25.0
    assert entry(external="20.5").robust == 20.5
    assert entry().is_subset
    assert not entry(n_test=100).is_subset
    assert entry().percent("autoattack") == 25.0
    assert entry().percent("fgsm") is None


def test_wilson_of_a_figure_by_hand() -> None:
    figure = Accuracy.of(5, 10)  # z = 1.95996: half = z * sqrt(.025 + z^2 / 400) / (1 + z^2 / 10)
    assert figure.low == pytest.approx(0.2366, abs=1e-4)
    assert figure.high == pytest.approx(0.7634, abs=1e-4)
    assert figure.percent == "50.00"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clean_acc": "51.00"}, "clean_acc 51.00 is not what figures.natural says"),
        ({"autoattack_acc": None}, "autoattack_acc None is not what"),
        ({"figures": {"autoattack": Accuracy.of(25, 100)}}, "needs figures.natural"),
        ({"figures": {"natural": Accuracy.of(50, 100), "autoattack": Accuracy.of(60, 100)}, "autoattack_acc": "60.00"},
         "figures.autoattack is above the natural accuracy"),
        ({"n_examples": 99}, "figures.natural is of 100 examples, and the entry of 99"),
        ({"n_test": 99}, "100 examples out of a test set of 99"),
        ({"reported": "50.01"}, "reported 50.01 is above clean_acc"),
        ({"architecture": "WideResNet-\u0661\u0660-1"}, "architecture: has digits that are not 0 to 9"),
        ({"external": "25.01"}, "external 25.01 is above autoattack_acc"),
        ({"weights_file": "weights/../secret"}, "weights_file is not weights/digits/Linf/Wang2021Gradient.safetensors"),
        ({"model": SPEC.model_copy(update={"arch": "os:system"})}, "built by 'os', and a board runs nobody's code"),
        ({"submitted": "31.1.2026"}, "submitted: "),
        ({"weights_sha256": "A" * 64}, "is no SHA-256"),
        ({"weights_sha256": None}, "a measured entry needs weights_sha256"),
        ({"kind": "published"}, "a published entry has no figures"),
        ({"eps": "16/510"}, "eps: is not spelled as sizes are"),
        ({"eps": "2"}, r"eps: eps = 2 is outside \(0, 1\]"),
        ({"surprise": 1}, "surprise: "),
        ({"steps": (1.5,)}, r"steps\.0: "),
        ({"metrics": ({"lr": "fast"},)}, r"metrics\.0\.lr"),
        ({"metrics": ({"<b>": 1},)}, r"metrics\.0"),
        ({"epochs": True}, "epochs: "),
        ({"schema_version": 2}, "schema_version: "),
    ],
)  # fmt: skip
def test_what_does_not_go_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DeatError, match=sentence):
        entry(**changes)


@pytest.mark.parametrize("share", [{"accuracy": 0.9}, {"low": 0.0}, {"high": 1.0}, {"n_correct": 101}])
def test_a_figure_that_does_not_add_up(share: dict[str, Any]) -> None:
    content = {**Accuracy.of(50, 100).model_dump(), **share}
    with pytest.raises(ValueError, match=r"cannot be|are not those of"):
        Accuracy.model_validate(content)


@pytest.mark.parametrize(
    "text",
    ["It uses 1M images (see Rebuffi et al.).", "Alexandre Ramé, Jérôme B.", "a < b, 5 > 4, R&D, 100 %, C_1 & D^2",
     "Uses \\(\\ell_{\\infty} \\) = 0.031 \u2248 7.9/255 instead of 8/255.", "王, 李"],
)  # fmt: skip
def test_texts_that_robustbench_has_are_plain(text: str) -> None:
    assert plain(text) == text


def test_robustbench_info_as_it_is_found() -> None:
    info = RobustBenchInfo.parse(json.dumps({**INFO, "eps": "0.031", "reported": "nan"}).encode(), "x")
    assert info.eps == "0.031"
    assert info.reported is None
    assert info.clean_acc == "80.00"


@pytest.mark.parametrize(
    ("written", "spelled"), [(8 / 255, "8/255"), (0.031, "0.031"), (" 8/255", "8/255"), (1, "255/255")]
)
def test_eps_as_robustbench_writes_it(written: object, spelled: str) -> None:
    assert RobustBenchInfo.parse(json.dumps({**INFO, "eps": written}).encode(), "x").eps == spelled


@pytest.mark.parametrize(
    "eps",
    ["nan/255", "8/nan", "inf", "1/0", "", "9" * 4_000_000, "\uff18/255", "8_0/2550", 0, -1, 10**400, True, None, [8]],
    ids=lambda eps: repr(eps)[:12],
)
def test_eps_that_is_none(eps: object) -> None:
    with pytest.raises(DeatError, match=r"^x is not as a board has it: eps"):
        RobustBenchInfo.parse(json.dumps({**INFO, "eps": eps}).encode(), "x")


@pytest.mark.parametrize(
    "link",
    ["https://:x@evil.org/", "https://@evil.org/", "https://arxiv.org:@evil.org", "https://a.org:99999999/",
     "https://a.org:0/", "https://a.org:x/", "https://\u0430rxiv.org/abs/1", "https:///abs", "https:a.org"],
)  # fmt: skip
def test_addresses_that_mislead(link: str) -> None:
    with pytest.raises(DeatError, match="link: is no address"):
        entry(link=link)
    assert entry(link="https://arxiv.org:443/abs/1@x").link == "https://arxiv.org:443/abs/1@x"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a\u3164b", r"U\+3164"), ("\u115f", r"U\+115F"), ("\u2800", r"U\+2800"), ("\ufe0f", r"U\+FE0F"),
     ("a\ufe0f", r"U\+FE0F"), ("e\u0301\u0316\u0334", "more than 2 marks"), ("x;=HYPERLINK(1)", "has = after ;"),
     ("x; @SUM(1)", "has @ after ;"), ("\uff1d1+1", "begins with \uff1d"), ("\uff201", "begins with \uff20")],
)  # fmt: skip
def test_texts_that_are_more_or_less_than_they_look(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plain(text)


@pytest.mark.parametrize("text", ["\u2764\ufe0f", "Nguye\u0302\u0303n", "a; b = c", "x; 1"])
def test_texts_that_only_look_like_it(text: str) -> None:
    assert plain(text) == text


def test_names() -> None:
    assert check_model_name("RodriguezMunoz2024Characterizing_Swin-B") == "RodriguezMunoz2024Characterizing_Swin-B"
    with pytest.raises(DeatError, match="at most 80 characters"):
        check_model_name("Wang2021" + "G" * 90)


def test_entries_of_a_board(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r"there is no leaderboard at .*: deat-rb submit RUN --board"):
        read_entries(tmp_path)
    file = tmp_path / "entries/digits/Linf/Wang2021Gradient.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(entry().json_bytes())
    assert read_entries(tmp_path) == (entry(),)
    file.rename(file.with_name("Wang2022Gradient.json"))
    with pytest.raises(DeatError, match="it lies in the wrong place"):
        read_entries(tmp_path)


def test_json_that_is_read_is_the_json_that_is_there() -> None:
    text = '{"a": [1, 2.5, "}]{[", "\\"["], "b": {"c": null}}'
    assert parse_json(text.encode(), "x") == json.loads(text)


@pytest.mark.parametrize("text", ['"' + '\\\\"' * 500_000, "[" + '"\\\\' * 500_000, '{"a": "' + "\\\\" * 500_001])
def test_a_string_that_does_not_end_costs_one_pass(text: str) -> None:
    """It took 22 s for 32,000 characters, and four times that for twice as many."""
    started = time.perf_counter()
    with pytest.raises(DeatError, match="is not valid JSON"):
        parse_json(text.encode(), "x")
    assert time.perf_counter() - started < 5


def test_objects_have_a_bounded_number_of_keys() -> None:
    keys = {f"k{number}": 1 for number in range(1000)}
    assert parse_json(json.dumps(keys).encode(), "x") == keys
    with pytest.raises(DeatError, match="x has an object with 1001 keys, and 1000 are allowed"):
        parse_json(json.dumps({**keys, "more": 1}).encode(), "x")


def test_limits_are_exact(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    with pytest.raises(DeatError, match="has 5 bytes, and 4 are allowed"):
        read_limited(file, 4)
    assert parse_json(b"[" * 3 + b"]" * 3, "x", depth=3) == [[[]]]
    with pytest.raises(DeatError, match="nested deeper than 2 levels"):
        parse_json(b"[" * 3 + b"]" * 3, "x", depth=2)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux, where page 0 of one's memory is none")
def test_a_file_that_cannot_be_read_after_all() -> None:
    with pytest.raises(DeatError, match="cannot read /proc/self/mem: "):
        read_limited(Path("/proc/self/mem"), 5)


def test_printable_leaves_nothing_unseen() -> None:
    assert printable("a\x1b[31mb\n\u202e\ud800") == "a\\x1b[31mb\\n\\u202e\\ud800"
    assert printable("a" * 500) == "a" * 400 + "..."
