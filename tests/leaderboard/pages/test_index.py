"""The board's pages: content, order, and untrusted text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, get_args

import made_up_board
import pytest
from html_documents import Document, read

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.pages.index import build, write_pages
from deat_rb.leaderboard.pages.published import PAPER_TABLES
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import replace_invisible

NASTY = "\"'></title></style></script><script>alert(1)</script><img src=x onerror=alert(1)><!--{{ 7*7 }}&amp;"
DASH = "\N{EN DASH}"


def index_of(folder: Path, entries: list[Entry]) -> Document:
    return read(write_pages(folder, entries))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_board.write(tmp_path_factory.mktemp("board"), made_up_board.board())


@pytest.fixture(scope="module")
def index(board: Path) -> Document:
    return read(build(board))


CIFAR, DIGITS, PART = 0, 1, 2


def test_build_ranks_by_robust_accuracy(index: Document) -> None:
    names = [name.split()[0] for name in index.column(DIGITS, 1)]
    # m-deat has 78.20 under AutoAttack and 77.90 under the best known attack, which is what counts.
    assert list(zip(index.column(DIGITS, 0), names, index.column(DIGITS, 4), strict=True)) == [
        ("1", "Doe2021Made_TRADES", "81.40"),
        ("2", "Doe2021Made_MTRADES", "80.80"),
        ("3", "Doe2021Made_MDEAT", "77.90 external"),
        ("4", "Doe2021Made_FreeEight", "75.40"),
        ("5", "Doe2021Made_UFGSM", "73.60"),
        (DASH, "Doe2021Made_Plain", "0.00"),
        (DASH, "Doe2021Made_NoAA", DASH),
    ]


def test_build_marks_baselines(index: Document) -> None:
    assert [name.split()[0] for name in index.column(DIGITS, 1) if "baseline" in name] == ["Doe2021Made_Plain"]


def test_build_ranks_by_the_best_known_attack(tmp_path: Path) -> None:
    weaker = made_up_board.entry("Doe2021Made_A", correct=(490, 433, 416, 405, 404))
    stronger = made_up_board.entry("Doe2021Made_B", correct=(490, 433, 416, 405, 405), external="60.00")
    page = index_of(tmp_path, [stronger, weaker])
    assert [name.split()[0] for name in page.column(0, 1)] == ["Doe2021Made_A", "Doe2021Made_B"]


def test_build_gives_equal_accuracies_one_rank(tmp_path: Path) -> None:
    entries = [
        made_up_board.entry("Doe2021Made_D", correct=(480, 400, 400, 400, 399)),
        made_up_board.entry("Doe2021Made_C", correct=(480, 400, 400, 400, 400)),
        made_up_board.entry("Doe2021Made_B", correct=(480, 400, 400, 400, 400)),
        made_up_board.entry("Doe2021Made_A", correct=(470, 400, 400, 400, 400)),
    ]
    page = index_of(tmp_path, entries)
    assert [name.split()[0][-1] for name in page.column(0, 1)] == ["B", "C", "A", "D"]
    assert page.column(0, 0) == ["1", "1", "1", "4"]


def test_build_lists_subset_evaluations_apart(index: Document) -> None:
    assert index.column(PART, 1)[0].startswith("Doe2021Made_Part")
    assert "Digits, Linf, eps 0.1, 200 test images" in index.text
    assert not any("Part" in name for name in index.column(DIGITS, 1))
    assert index.column(PART, 0) == [DASH]


def test_build_gives_published_rows_no_rank(index: Document) -> None:
    rows = dict(zip([name.split()[0] for name in index.column(CIFAR, 1)], index.column(CIFAR, 0), strict=True))
    assert {name: rank for name, rank in rows.items() if rank.isdigit()} == {
        "Roe2022Made_MDEAT": "1",
        "Roe2022Made_FREE": "2",
        "Roe2022Made_PGD": "3",
    }
    assert {"Wong2020Fast", "Poe2020Claimed_R18"} <= set(rows)
    marked = [row for row in index.column(CIFAR, 1) if "published" in row]
    assert len(marked) == len(rows) - 3


def test_build_fills_all_cells_of_a_row(index: Document) -> None:
    row = [" ".join(cell.split()) for cell in index.tables[DIGITS][2]]
    assert row[2:] == ["98.00", "80.80 77.1 to 84.0", "80.80", "86.60", "83.20", "81.00",
                       "m+trades standard, 10 epochs", "1,121", "99 s", "no", "WideResNet-10-1",
                       "arXiv, Mar 2021", "1 of 2 1 warn"]  # fmt: skip


def test_build_omits_empty_columns(tmp_path: Path) -> None:
    plain, broken = made_up_board.entry("Doe2021Made_A"), made_up_board.entry("Doe2021Made_B", external="60.00")
    doubted = made_up_board.entry("Doe2021Made_C", unreliable=True)
    heads = [
        set(index_of(tmp_path / str(number), entries).tables[0][0])
        for number, entries in enumerate(([plain], [plain, broken], [plain, doubted]))
    ]
    assert [{"best known", "potentially unreliable"} & found for found in heads] == [
        set(), {"best known"}, {"potentially unreliable"}
    ]  # fmt: skip


def test_build_does_not_count_skipped_checks(tmp_path: Path) -> None:
    entry = made_up_board.entry()
    for name in ("skipped", "left out"):  # in old entries
        skipped = Check(name=name, status="pass", figure=None, sentence="Two checks were skipped.")
        page = index_of(tmp_path, [entry.model_copy(update={"checks": (*entry.checks, skipped)})])
        assert page.column(0, -1)[0].startswith("1 of 2")


def test_build_lists_measured_models_in_the_papers_tables(index: Document) -> None:
    tables = index.tables[-len(PAPER_TABLES) :]
    first = [[" ".join(cell.split()) for cell in row] for row in tables[0]]
    assert first[0] == ["method", "natural", "FGSM", "PGD-100", "CW-20", "minutes"]
    assert first[3] == ["M-DEAT", "79.88", "49.84", "43.38", "43.36", "6.0"]
    assert first[4][0].startswith("Roe2022Made_MDEAT measured")
    assert first[4][1:] == ["79.90", "49.81", "43.40", "43.31", "66.7"]
    assert first[5][0] == "FREE-4"
    fifth = [[" ".join(cell.split()) for cell in row] for row in tables[4]]
    assert fifth[1:3] == [
        ["M-DEAT", "79.88", "43.38", "43.36", "6.0"],
        [fifth[2][0], "79.90", "43.40", "43.31", "66.7"],
    ]


def beside_the_paper(folder: Path, **other: Any) -> list[int]:
    """In which of the paper's tables, counted from 0, a model stands."""
    fields = {"method": "m-deat", "correct": (7990, 4981, 4340, 4331, 4120), "backward_passes": 12903.0, **other}
    page = index_of(folder, [made_up_board.cifar("Roe2022Made_A", **fields)])
    tables = page.tables[-len(PAPER_TABLES) :]
    return [number for number, table in enumerate(tables) if any("Roe2022Made_A" in row[0] for row in table)]


def test_build_matches_the_papers_setting_and_architecture(tmp_path: Path) -> None:
    assert beside_the_paper(tmp_path) == [0, 4]
    assert beside_the_paper(tmp_path, setting="standard") == [3, 6]
    assert beside_the_paper(tmp_path, model=made_up_board.model_spec("wrn-34-10")) == [1, 5]


@pytest.mark.parametrize(
    "other",
    [{"eps": "0.01"}, {"setting": None}, {"additional_data": True}, {"additional_data": None},
     {"dataset": "cifar10-jpeg", "weights_file": None},
     {"model": made_up_board.model_spec("wrn-10-1")}, {"method": "m+mart"}],
)  # fmt: skip
def test_build_matches_only_the_papers_problem(tmp_path: Path, other: dict[str, Any]) -> None:
    assert beside_the_paper(tmp_path, **other) == []


AS_IN_TABLE_1 = (
    "deat-rb train --method m-deat --dataset cifar10 --train-size 49000 --val-size 1000 --arch preactresnet18 "
    "--epochs 11 --lr 0.1 --lr-schedule cyclic --batch-size 128 --augment crop-flip --eps 8/255 --gamma 1.0 "
    "--precision bf16 --seed 3 --select last --data-dir cifar10"
)


@pytest.mark.parametrize(
    ("fields", "note"),
    [({}, ""), ({"command": None}, ""), ({"command": "deat-rb train '"}, ", '"),
     ({"epochs": 200, "command": f"{AS_IN_TABLE_1} --ema 0.999 --no-early-stopping"},
      ", 200 epochs, --ema 0.999, --no-early-stopping"),
     ({"command": AS_IN_TABLE_1.replace("49000", "10000")}, ", --train-size 10000"),
     ({"unreliable": True, "footnote": "Stopped by hand."}, ", potentially unreliable, Stopped by hand")],
)  # fmt: skip
def test_build_says_how_a_model_beside_the_paper_differs(tmp_path: Path, fields: dict[str, Any], note: str) -> None:
    """M-DEAT has 11 epochs in the fast setting."""
    known = {"epochs": 11, "command": AS_IN_TABLE_1, "hardware": None, "dataset_note": "Made up.", **fields}
    page = index_of(tmp_path, [made_up_board.cifar("Roe2022Made_A", "m-deat", (7990,) * 5, 12903.0, **known)])
    row = next(row for row in page.tables[-len(PAPER_TABLES)] if "Roe2022Made_A" in row[0])
    assert " ".join(row[0].split()) == f"Roe2022Made_A measured Made up{note}"


# Untrusted text


def untrusted(text: str, link: str) -> Entry:
    """An entry that was not validated, with the text in every text field."""
    benign = made_up_board.entry("Doe2021Made_A")
    fields = dict(benign)
    words = ("name", "authors", "venue", "architecture", "dataset_note", "method", "setting", "hardware", "command",
             "footnote", "weights_sha256", "data_sha256", "submitted", "evaluated_on")  # fmt: skip
    fields.update(dict.fromkeys(words, text))
    check = Check.model_construct(name=text, status="pass", figure=0.0, sentence=text)
    fields |= {"link": link, "classes": (text, text), "versions": {text: text}, "evaluated_with": {text: text},
               "checks": (check, check), "model": None, "figures": {text: benign.figures["natural"]}}  # fmt: skip
    return Entry.model_construct(**fields)


def test_untrusted_covers_every_text_field() -> None:
    """A new text field of `Entry` has to be added to `untrusted`."""
    texts = {
        name
        for name, field in Entry.model_fields.items()
        if "str" in str(get_args(field.annotation) or field.annotation)
    }
    tried = {name for name, value in dict(untrusted("¤", "¤")).items() if "¤" in str(value)}
    assert texts - tried <= {"dataset", "model_name", "threat_model", "kind", "eps", "weights_file", "clean_acc",
                             "reported", "autoattack_acc", "external", "remeasured", "metrics"}  # fmt: skip


@pytest.mark.parametrize("link", ["javascript:alert(1)", '"><script>alert(1)</script>'])
def test_write_pages_escapes_text(tmp_path: Path, link: str) -> None:
    """The pages have the same elements and attributes as those of an entry with harmless text."""
    documents = []
    for number, (text, address) in enumerate((("x" * len(NASTY), ""), (NASTY, link))):
        folder = tmp_path / str(number)
        top = index_of(folder, [untrusted(text, address), untrusted(text, address)])
        documents.append((top, read(folder / "models/digits/Linf/Doe2021Made_A.html")))
    for harmless, nasty in zip(*documents, strict=True):
        assert nasty.structure == harmless.structure
        assert NASTY in "".join(nasty.words)
        assert not any((attributes["href"] or "").lower().startswith("java") for attributes in nasty.all("a"))


@pytest.mark.parametrize("text", ["\x00", "\x1b[31m", "\ud800", "\u202egnp.exe", "\u2067x", "\x85", "a\u2028b"])
def test_write_pages_replaces_invisible_characters(tmp_path: Path, text: str) -> None:
    index_of(tmp_path, [untrusted(f"a{text}b", "")])
    written = (tmp_path / "models/digits/Linf/Doe2021Made_A.html").read_bytes().decode()
    assert "\ufffd" in written
    assert replace_invisible(written).replace("\r", "") == written
    assert "\ufffd" not in replace_invisible("é 数 ≤ \n\t-")


def test_write_pages_refuses_names_outside_the_board(tmp_path: Path) -> None:
    outside = made_up_board.entry("Doe2021Made_A").model_copy(update={"dataset": "../../.."})
    with pytest.raises(DeatError, match="leads out of the board"):
        write_pages(tmp_path / "board", [outside])
    assert list(tmp_path.iterdir()) == []


def test_build_follows_no_symlink_out_of_the_board(tmp_path: Path) -> None:
    board = made_up_board.write(tmp_path / "board", made_up_board.board()[:1])
    (tmp_path / "elsewhere").mkdir()
    (board / "models").mkdir()
    (board / "models/digits").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeatError, match=r"models/digits/Linf leads out of the board .*; remove the symlink"):
        build(board)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# The files


def test_build_writes_self_contained_pages(board: Path, index: Document) -> None:
    for path in (board / "index.html", *board.glob("models/*/*/*.html")):
        page = read(path)
        assert page.all("link") == page.all("img") == page.all("iframe") == []
        assert all("src" not in attributes for attributes in page.all("script"))
        assert not any(name == "style" or name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert "url(" not in page.raw["style"]
        assert "@import" not in page.raw["style"]
        policies = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
        sources = dict(part.split(" ", 1) for part in (policies[0] or "").split("; "))
        assert sources["default-src"] == "'none'"
        for tag in page.raw:
            digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
            assert f"'sha256-{digest}'" in sources[f"{tag}-src"].split()


def test_build_writes_working_links(board: Path, index: Document) -> None:
    for entry in made_up_board.board():
        if entry.weights_file is not None:
            (board / entry.weights_file).parent.mkdir(parents=True, exist_ok=True)
            (board / entry.weights_file).touch()
    for path in (board / "index.html", *board.glob("models/*/*/*.html")):
        for attributes in read(path).all("a"):
            target = attributes["href"] or ""
            assert target.startswith("https://") or (path.parent / target).resolve().is_file(), target
            assert not target.startswith("https://") or attributes["rel"] == "noopener noreferrer"


def test_model_pages_link_the_entry_and_the_weights(board: Path, index: Document) -> None:
    page = board / "models" / "digits" / "Linf" / "Doe2021Made_MDEAT.html"
    targets = {(page.parent / (each["href"] or "")).resolve().relative_to(board.resolve()).as_posix()
               for each in read(page).all("a") if not (each["href"] or "").startswith("https://")}  # fmt: skip
    assert targets == {"index.html", "entries/digits/Linf/Doe2021Made_MDEAT.json",
                       "weights/digits/Linf/Doe2021Made_MDEAT.safetensors"}  # fmt: skip


def test_build_is_deterministic(tmp_path: Path, board: Path, index: Document) -> None:
    other = made_up_board.write(tmp_path / "other", made_up_board.board()[::-1])
    build(other)
    for path in (board / "index.html", *board.glob("models/*/*/*.html")):
        assert (other / path.relative_to(board)).read_bytes() == path.read_bytes()
        assert str(board) not in path.read_text()


def test_build_removes_pages_of_removed_models(tmp_path: Path) -> None:
    entries = made_up_board.board()[:2]
    board = made_up_board.write(tmp_path, entries)
    build(board)
    own = board / "models/digits/Linf/notes.html"
    own.write_text("<p>by hand</p>")
    (board / "entries" / f"{entries[0].key}.json").unlink()
    build(board)
    assert sorted(path.name for path in own.parent.iterdir()) == ["Doe2021Made_TRADES.html", "notes.html"]


def test_build_keeps_the_pages_if_an_entry_is_invalid(tmp_path: Path) -> None:
    board = made_up_board.write(tmp_path, made_up_board.board()[:2])
    before = build(board).read_bytes()
    made_up_board.write(tmp_path, made_up_board.board()[2:3])
    (board / "entries/digits/Linf/Doe2021Made_TRADES.json").write_text("{}")
    with pytest.raises(DeatError, match=r"Doe2021Made_TRADES\.json is not valid"):
        build(board)
    assert (board / "index.html").read_bytes() == before
    assert len(list(board.glob("models/*/*/*"))) == 2


def test_build_keeps_the_pages_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = made_up_board.write(tmp_path, made_up_board.board()[:1])
    before = build(board).read_bytes()
    made_up_board.write(tmp_path, made_up_board.board()[1:3])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DeatError, match="No space left"):
        build(board)
    assert (board / "index.html").read_bytes() == before
    assert [path.name for path in board.glob("models/*/*/*")] == ["Doe2021Made_MTRADES.html"]


def test_build_refuses_a_folder_without_a_board(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="there is no leaderboard at"):
        build(tmp_path / "nothing")


def test_build_writes_a_page_for_an_empty_board(tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    text = read(build(tmp_path)).text
    assert "0 measured models on 0 datasets" in text
    assert "This board has no models of its own in this table." in text
