"""What malicious, broken or dishonest submissions meet: one sentence, and a board that is byte for byte as before.

Of each kind it is shown, too, that it works against a loader or a printer that does not expect it.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from board_problems import make_run, network, snapshot, without_evaluating
from hostile import (
    ADDRESS,
    CLAIMS,
    CODE,
    ESCAPES,
    FACTORY,
    FORMULA,
    HANG,
    HOSTILE,
    HTML,
    JSON,
    LARGER,
    LIES,
    LINKS,
    MARKDOWN,
    MEMBERS,
    MEMORY,
    NAME,
    NAMES,
    NONE,
    NUMBERS,
    SCRIPT,
    SHA,
    SHAPES,
    TEX,
    TWICE,
    TWO,
    TYPES,
    UNICODE,
    ZIP,
    Attempt,
    Expanded,
    Runs,
    Setup,
    changed,
    claimed,
    doubled,
    doubling,
    linked,
    raw_info,
    repacked,
    saved,
    written,
)
from naive_board import NAME as NAIVE_NAME
from naive_board import NaiveBoard
from rich.console import Console

from deat_rb.evaluation.report import Report
from deat_rb.leaderboard import untrusted_weights
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, parse_entry
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.leaderboard.tables import as_csv, as_json, as_latex, as_markdown, as_tables
from deat_rb.models.spec import model_spec
from deat_rb.utils import safe_load
from deat_rb.utils.errors import DeatError


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A board with an entry, and room for a submission."""
    fake = without_evaluating(monkeypatch)
    Board(tmp_path / "board").submit(make_run(tmp_path / "first"), SubmissionMetadata(model_name="Wang2021Gradient"))
    (tmp_path / "work").mkdir()
    return Attempt(tmp_path / "work", tmp_path / "board", fake)


@pytest.mark.parametrize(("kind", "name", "setup", "sentence"), HOSTILE, ids=[f"{row[0]}: {row[1]}" for row in HOSTILE])
def test_it_is_refused_and_the_board_untouched(
    attempt: Attempt, kind: str, name: str, setup: Setup, sentence: str
) -> None:
    setup(attempt)
    before = snapshot(attempt.board)
    with pytest.raises(DeatError) as refusal:
        attempt.submit()
    message = str(refusal.value)
    assert re.search(sentence, message), message
    assert len(message) <= 1010
    assert not [char for char in message if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert snapshot(attempt.board) == before
    assert not (attempt.board / ".staging").exists()


def test_there_are_as_many_as_there_should_be() -> None:
    kinds = Counter(kind for kind, *_ in HOSTILE)
    assert len(kinds) >= 15
    assert kinds.total() >= 60
    assert set(NAIVE) == set(kinds), "every kind is shown to work against somebody"
    assert len({(kind, name) for kind, name, *_ in HOSTILE}) == len(HOSTILE)
    documented = (Path(__file__).parents[2] / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert [row for row in documented.splitlines() if re.match(r"\| [A-Za-z].* \| \d+ \|", row)] == [
        f"| {kind} | {count} |" for kind, count in kinds.items()
    ]


# The same against those who do not expect it


def naive_code(it: Attempt) -> bool:
    mark = it.folder / "mark"
    saved(it, Runs(os.mkdir, str(mark)))
    torch.load(it.target, weights_only=False)
    return mark.is_dir()


def naive_memory(it: Attempt) -> bool:
    saved(it, Runs(bytearray, 10**7))
    loaded = torch.load(it.target, weights_only=True)
    return len(loaded["extra"]) == 10**7 and it.target.stat().st_size < 10**6


def naive_hang(it: Attempt) -> bool:
    """It is not read within a second of a processor's time, by a process of its own."""
    written(it, repacked(it, pkl=doubling(60)))

    def load() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2, -1))
        torch.load(it.target, weights_only=True)

    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGXCPU


def naive_zip(it: Attempt) -> bool:
    written(it, repacked(it, compression=zipfile.ZIP_DEFLATED))
    loaded = torch.load(it.target, weights_only=True)
    return bool(sum(value.nbytes for value in loaded.values()) > 5 * it.target.stat().st_size)


def naive_larger(it: Attempt) -> bool:
    it.checkpoint({"w": Expanded(10**5, 10**5)})
    return bool(torch.load(it.target, weights_only=True)["w"].numel() == 10**10)


def naive_members(it: Attempt) -> bool:
    written(it, repacked(it, more={"../../evil.txt": b"x"}))
    NaiveBoard(it.folder / "board").unpack(it.target)
    return (it.folder / "evil.txt").read_bytes() == b"x"


def naive_two(it: Attempt) -> bool:
    written(it, doubled(it))
    with zipfile.ZipFile(it.target) as archive:
        looked_at = next(member for member in archive.infolist() if member.filename == "archive/data.pkl")
        return archive.read(looked_at) != archive.read("archive/data.pkl")


def taken(it: Attempt, info: dict[str, Any] | None = None, **where: str) -> tuple[NaiveBoard, Path]:
    """A naive board that takes what is handed in, its words too."""
    board = NaiveBoard(it.folder / "naive" / "board")
    if info is None:
        info = {"link": "https://a.org", "clean_acc": "80.00", "venue": it.metadata.get("venue")}
    place = board.submit(it.target, info, **{"name": NAME, **where})
    return board, place


def naive_names(it: Attempt) -> bool:
    it.checkpoint()
    board, place = taken(it, name="../../../Evil2026Model")
    return place.is_file() and not place.resolve().is_relative_to(board.path)


def naive_unicode(it: Attempt) -> bool:
    """A second Wang2021Gradient, to the eye."""
    it.checkpoint()
    shown = set()
    for name in ("Wang2021Gradient", "Wang2021\uff27radient"):
        assert NAIVE_NAME.fullmatch(name)
        shown.add(unicodedata.normalize("NFKC", taken(it, name=name)[1].stem))
    return shown == {"Wang2021Gradient"} and len(list((it.folder / "naive/board/cifar10").glob("*.json"))) == 2


def naive_links(it: Attempt) -> bool:
    """What only the board's keeper can read is then on the board for everybody."""
    linked(it, "last.safetensors")
    secret = (it.folder / "secret").read_bytes()
    it.target = it.target / "last.safetensors"
    return taken(it)[1].with_suffix(".pt").read_bytes() == secret


def naive_html(it: Attempt) -> bool:
    it.checkpoint()
    it.metadata["venue"] = f"x {SCRIPT}"
    return "script" in [tag for tag, _ in taken(it)[0].html()]


def naive_address(it: Attempt) -> bool:
    it.checkpoint(link="javascript:alert(1)")
    board, _ = taken(it, json.loads(it.info.read_text()))
    return ("a", {"href": "javascript:alert(1)"}) in board.html()


def naive_numbers(it: Attempt) -> bool:
    """101 % is the best, and of NaN nobody is better."""
    it.checkpoint()
    board, _ = taken(it, {"clean_acc": "99.99"}, name="Sound2021Net")
    for bad, number in (("Evil2026More", "101"), ("Evil2026None", "nan")):
        board.rows = [{"name": bad, "clean_acc": number}, *board.rows]
        if board.ranked()[0] != bad:
            return False
    return True


def naive_json(it: Attempt) -> bool:
    raw_info(it, b"[" * 10**6)
    with pytest.raises(RecursionError):
        NaiveBoard(it.folder / "naive").submit(it.target, it.info, name=NAME)
    return True


def naive_twice(it: Attempt) -> bool:
    """Who reads the text finds another eps than who parses it."""
    raw_info(it, b'{"eps": "8/255", "eps": "1/255"}')
    place = NaiveBoard(it.folder / "naive").submit(it.target, it.info, name=NAME)
    first = re.search(r'"eps": "(.*?)"', it.info.read_text())
    return first is not None and (first[1], json.loads(place.read_text())["eps"]) == ("8/255", "1/255")


def naive_shapes(it: Attempt) -> bool:
    """The network is then not the one that was handed in: a part of it is as it was drawn."""
    it.checkpoint(changed("fc.bias", lambda bias: None))
    drawn = network(7).net
    before = drawn.get_parameter("fc.bias").clone()
    return torch.equal(NaiveBoard(it.folder).load(drawn, it.target).get_parameter("fc.bias"), before)


def naive_types(it: Attempt) -> bool:
    it.checkpoint(changed("conv1.weight", lambda weight: weight.half() * torch.nan))
    loaded = NaiveBoard(it.folder).load(network(7).net, it.target)
    return bool(loaded.get_parameter("conv1.weight").isnan().all())


def naive_none(it: Attempt) -> bool:
    """It stands on the board, and nobody can load it."""
    written(it, b"<!DOCTYPE html><html>quota exceeded</html>")
    _, place = taken(it)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(place.with_suffix(".pt"), weights_only=True)
    return place.is_file()


def naive_lies(it: Attempt) -> bool:
    it.checkpoint(autoattack_acc="79.00")
    _, place = taken(it, json.loads(it.info.read_text()))
    return bool(json.loads(place.read_text())["autoattack_acc"] == "79.00" and it.fake.shares["autoattack"] == 0.4)


def naive_factory(it: Attempt) -> bool:
    mark = it.folder / "ran"
    module = it.folder / "evil_module.py"
    module.write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    sys.path.insert(0, str(it.folder))
    try:
        with pytest.raises(DeatError, match="cannot be imported"):
            model_spec("evil_module:make", num_classes=2).build()
    finally:
        sys.path.remove(str(it.folder))
        sys.modules.pop("evil_module", None)
    return mark.is_dir()


def naive_claims(it: Attempt) -> bool:
    claimed(it, autoattack=0.7)
    return Report.load(it.target).results["autoattack"].accuracy == 0.7


def naive_sha(it: Attempt) -> bool:
    """The figures of one network, beside the weights of another."""
    run = it.run()
    measured = Report.load(run).model_sha256
    safe_load.save_tensors(run / "last.safetensors", network(1).state_dict())
    return Report.load(run).model_sha256 == measured != safe_load.sha256_tensors(network(1).state_dict())


def naive_escapes(it: Attempt) -> bool:
    written = io.StringIO()
    Console(file=written, force_terminal=True).print("x\x9b2J\u202e")
    return "\x9b2J" in written.getvalue()


def naive_formula(it: Attempt) -> bool:
    it.checkpoint()
    it.metadata["venue"] = '=HYPERLINK("http://evil.org";"paper")'
    return taken(it)[0].csv()[0].startswith("=HYPERLINK(")


def naive_markdown(it: Attempt) -> bool:
    """A figure stands in a column of which nothing was measured."""
    it.checkpoint()
    it.metadata["venue"] = "x | 99.99 |"
    return "99.99" in taken(it)[0].markdown()[0]


def naive_tex(it: Attempt) -> bool:
    it.checkpoint()
    it.metadata["venue"] = r"\input{/etc/passwd}"
    return r"\input" in taken(it)[0].latex()


NAIVE: dict[str, Callable[[Attempt], bool]] = {
    CODE: naive_code, HANG: naive_hang, MEMORY: naive_memory, ZIP: naive_zip, LARGER: naive_larger,
    MEMBERS: naive_members, TWO: naive_two, NAMES: naive_names, UNICODE: naive_unicode, LINKS: naive_links,
    HTML: naive_html, ADDRESS: naive_address, NUMBERS: naive_numbers, JSON: naive_json, TWICE: naive_twice,
    SHAPES: naive_shapes, TYPES: naive_types, NONE: naive_none, LIES: naive_lies, FACTORY: naive_factory,
    SHA: naive_sha, CLAIMS: naive_claims, ESCAPES: naive_escapes, FORMULA: naive_formula, MARKDOWN: naive_markdown,
    TEX: naive_tex,
}  # fmt: skip


@pytest.mark.parametrize("kind", NAIVE)
def test_it_works_against_those_who_do_not_expect_it(attempt: Attempt, kind: str) -> None:
    assert NAIVE[kind](attempt)


def test_what_is_sound_lands(attempt: Attempt) -> None:
    """So that the refusals above are not of everything."""
    attempt.run()
    assert attempt.submit().model_name == NAME
    attempt.checkpoint()
    assert attempt.submit().dataset == "cifar10"


# What got onto the board by hand


ALL_AT_ONCE = '=1+1 <script>x</script> | [a](b) \\input{x} & _ % $ "'


@pytest.fixture
def forced(attempt: Attempt) -> Entry:
    """An entry whose texts no check has seen."""
    return (
        Board(attempt.board).entries()[0].model_copy(update={"venue": ALL_AT_ONCE + "\x1b[2J", "method": "=2\x1b[1m"})
    )


def test_every_format_escapes_by_itself(forced: Entry) -> None:
    standings = rank([forced])
    rows = list(csv.DictReader(io.StringIO(as_csv(standings))))
    assert rows[0]["venue"].startswith("'=1+1")
    assert rows[0]["method"].startswith("'=2")
    markdown = as_markdown(standings)
    assert "<script>" not in markdown
    assert r"\| \[a\]\(b\)" in markdown
    assert r"\input" not in as_latex(standings).replace(r"\textbackslash{}input", "")
    written = io.StringIO()
    console = Console(file=written, width=400, force_terminal=True)
    for table in as_tables(standings, 400):
        console.print(table)
    shown = written.getvalue()
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J" in shown
    for text in (as_csv(standings), markdown, as_latex(standings), as_json(standings)):
        assert "\x1b" not in text


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace('"venue": "arXiv, Mar 2021"', '"venue": "<b onmouseover=alert(1)>"'),
     lambda text: text.replace('"venue": "arXiv, Mar 2021"', '"venue": "\\u001b[2J"'),
     lambda text: text.replace('"sentence": "Fine."', '"sentence": "<script>alert(1)</script>"'),
     lambda text: text.replace('"figure": 0.0', '"figure": 1e999'),
     lambda text: text.replace('"figure": 0.0', '"figure": "nan"'),
     lambda text: text.replace('"wrn-10-1"', '"os:system"'),
     lambda text: text.replace('"weights/digits', '"weights/../../digits')],
)  # fmt: skip
def test_an_entry_that_was_edited_by_hand_is_not_read(attempt: Attempt, change: Callable[[str], str]) -> None:
    text = (attempt.board / "entries/digits/Linf/Wang2021Gradient.json").read_text()
    assert change(text) != text
    assert parse_entry(text.encode(), "x")
    with pytest.raises(DeatError):
        parse_entry(change(text).encode(), "x")


def test_nothing_is_unpickled_or_allocated_before_it_is_looked_at(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(untrusted_weights, "load_tensors", never)
    monkeypatch.setattr(safe_load, "load_tensors", never)
    monkeypatch.setattr(torch, "load", never)
    saved(attempt, Runs(bytearray, 10**6))
    with pytest.raises(DeatError, match="bytearray"):
        attempt.submit()
