"""The leaderboard's pages: what they say, in which order, and that no text in an entry is more than text."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import made_up_board
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.entry import Accuracy, Entry
from deat_rb.leaderboard.pages.charts import Point, curves, pareto_front, scatter
from deat_rb.leaderboard.pages.format import duration, memory, name_parts, web_link
from deat_rb.leaderboard.pages.index import build, write_pages
from deat_rb.leaderboard.pages.published import PAPER_TABLES, REFERENCES
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import sha256_file
from deat_rb.utils.safe_load import save_tensors
from deat_rb.utils.text import replace_invisible

NASTY = "\"'></title></style></script><script>alert(1)</script><img src=x onerror=alert(1)><!--{{ 7*7 }}&amp;"
DASH = "\N{EN DASH}"
VOID = {"meta", "img", "input", "wbr"}


class Document(HTMLParser):
    """What a browser would see: elements, their attributes, rows of tables and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: dict[str, str] = {}
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("small", "dt", "dd"):
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.raw[self.open[-1]] = data
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def structure(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def column(self, table: int, number: int) -> list[str]:
        return [" ".join(row[number].split()) for row in self.tables[table][1:]]


def read(path: Path) -> Document:
    return Document(path.read_text(encoding="utf-8"))


def index_of(folder: Path, entries: list[Entry]) -> Document:
    return read(write_pages(folder, entries))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_board.write(tmp_path_factory.mktemp("board"), made_up_board.board())


@pytest.fixture(scope="module")
def index(board: Path) -> Document:
    return read(build(board))


CIFAR, DIGITS, PART = 0, 1, 2


def test_robust_accuracy_decides_the_rank(index: Document) -> None:
    names = [name.split()[0] for name in index.column(DIGITS, 1)]
    # m-deat has 78.20 under AutoAttack and 77.90 under the best known attack, which is what counts.
    assert list(zip(index.column(DIGITS, 0), names, index.column(DIGITS, 4), strict=True)) == [
        ("1", "Doe2021Made_TRADES", "81.40"),
        ("2", "Doe2021Made_MTRADES", "80.80"),
        ("3", "Doe2021Made_MDEAT", "77.90 external"),
        ("4", "Doe2021Made_FreeEight", "75.40"),
        ("5", "Doe2021Made_UFGSM", "73.60"),
        ("6", "Doe2021Made_Plain", "0.00"),
        (DASH, "Doe2021Made_NoAA", DASH),
    ]


def test_best_known_attack_may_change_the_order(tmp_path: Path) -> None:
    weaker = made_up_board.entry("Doe2021Made_A", correct=(490, 433, 416, 405, 404))
    stronger = made_up_board.entry("Doe2021Made_B", correct=(490, 433, 416, 405, 405), external="60.00")
    page = index_of(tmp_path, [stronger, weaker])
    assert [name.split()[0] for name in page.column(0, 1)] == ["Doe2021Made_A", "Doe2021Made_B"]


def test_equals_share_a_rank_and_are_in_the_order_of_natural_accuracy_and_name(tmp_path: Path) -> None:
    entries = [
        made_up_board.entry("Doe2021Made_D", correct=(480, 400, 400, 400, 399)),
        made_up_board.entry("Doe2021Made_C", correct=(480, 400, 400, 400, 400)),
        made_up_board.entry("Doe2021Made_B", correct=(480, 400, 400, 400, 400)),
        made_up_board.entry("Doe2021Made_A", correct=(470, 400, 400, 400, 400)),
    ]
    page = index_of(tmp_path, entries)
    assert [name.split()[0][-1] for name in page.column(0, 1)] == ["B", "C", "A", "D"]
    assert page.column(0, 0) == ["1", "1", "1", "4"]


def test_parts_of_the_test_set_are_listed_apart(index: Document) -> None:
    assert index.column(PART, 1)[0].startswith("Doe2021Made_Part")
    assert "Digits, Linf, eps 0.1, 200 test images" in index.text
    assert not any("Part" in name for name in index.column(DIGITS, 1))
    assert index.column(PART, 0) == [DASH]


def test_published_rows_have_no_rank(index: Document) -> None:
    rows = dict(zip([name.split()[0] for name in index.column(CIFAR, 1)], index.column(CIFAR, 0), strict=True))
    assert {name: rank for name, rank in rows.items() if rank.isdigit()} == {
        "Roe2022Made_MDEAT": "1",
        "Roe2022Made_FREE": "2",
        "Roe2022Made_PGD": "3",
    }
    assert {"Wong2020Fast", "Poe2020Claimed_R18"} <= set(rows)
    marked = [row for row in index.column(CIFAR, 1) if "published" in row]
    assert len(marked) == len(rows) - 3


def test_figures_of_a_row(index: Document) -> None:
    row = [" ".join(cell.split()) for cell in index.tables[DIGITS][2]]
    assert row[2:] == ["98.00", "80.80 77.1 to 84.0", "80.80", "86.60", "83.20", "81.00",
                       "m+trades standard, 10 epochs", "1,121", "99 s", "no", "WideResNet-10-1",
                       "arXiv, Mar 2021", "1 of 2 1 warn"]  # fmt: skip


def test_columns_that_would_tell_nothing_are_left_out(tmp_path: Path) -> None:
    plain, broken = made_up_board.entry("Doe2021Made_A"), made_up_board.entry("Doe2021Made_B", external="60.00")
    doubted = made_up_board.entry("Doe2021Made_C", unreliable=True)
    heads = [
        set(index_of(tmp_path / str(number), entries).tables[0][0])
        for number, entries in enumerate(([plain], [plain, broken], [plain, doubted]))
    ]
    assert [{"best known", "perhaps unreliable"} & found for found in heads] == [
        set(), {"best known"}, {"perhaps unreliable"}
    ]  # fmt: skip


def test_what_was_left_out_is_no_check_that_passed(tmp_path: Path) -> None:
    left_out = Check(name="skipped", status="pass", figure=None, sentence="Two checks were left out.")
    entry = made_up_board.entry()
    page = index_of(tmp_path, [entry.model_copy(update={"checks": (*entry.checks, left_out)})])
    assert page.column(0, -1)[0].startswith("1 of 2")


def test_the_papers_tables_stand_beside_what_was_measured(index: Document) -> None:
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


def test_a_model_stands_beside_the_papers_of_its_setting(tmp_path: Path) -> None:
    assert beside_the_paper(tmp_path) == [0, 4]
    assert beside_the_paper(tmp_path, setting="standard") == [3, 6]
    assert beside_the_paper(tmp_path, model=made_up_board.model_spec("wrn-34-10")) == [1, 5]


@pytest.mark.parametrize(
    "other",
    [{"eps": "0.01"}, {"setting": None}, {"dataset": "cifar10-jpeg", "weights_file": None},
     {"model": made_up_board.model_spec("wrn-10-1")}, {"method": "m+mart"}],
)  # fmt: skip
def test_only_the_same_problem_stands_beside_the_paper(tmp_path: Path, other: dict[str, Any]) -> None:
    assert beside_the_paper(tmp_path, **other) == []


def test_tables_of_the_paper_agree_with_each_other() -> None:
    """Table 5 repeats the M-DEAT rows of Tables 1 to 4."""
    figures = {(table.dataset, table.arch, table.setting): {row.method: row for row in table.rows}
               for table in PAPER_TABLES if table.number < 5}  # fmt: skip
    fifth = [table for table in PAPER_TABLES if table.number == 5]
    assert [len(table.rows) for table in PAPER_TABLES] == [6, 6, 6, 13, 2, 2, 2, 2]
    for table in fifth:
        repeated = figures[table.dataset, table.arch, table.setting]["M-DEAT"]
        assert table.rows[0] == repeated._replace(fgsm=None)


def test_reference_rows_are_robustbenchs() -> None:
    rows = {(reference.dataset, reference.model_name): reference for reference in REFERENCES}
    wong = rows["cifar10", "Wong2020Fast"]
    assert (wong.clean_acc, wong.autoattack_acc, wong.reported, wong.eps) == (83.34, 43.21, 46.06, "8/255")
    assert rows["cifar10", "Wang2020Improving"].additional_data
    for reference in REFERENCES:
        assert reference.autoattack_acc <= reference.reported <= 100
        assert web_link(reference.link) == reference.link


def test_page_of_a_model(board: Path, index: Document) -> None:
    page = read(board / "models/digits/Linf/Doe2021Made_MTRADES.html")
    assert "Doe2021Made_MTRADES" in page.text
    assert "Digits, Linf at eps 0.1, all 500 test images" in page.text
    assert ["pgd-100", "", "83.20 %", "79.67 to 86.22", "416 / 500"] in page.tables[0]
    assert page.tables[1][1][0].strip() == "! warn", "what is wrong comes first"
    assert "deat-rb train --name Doe2021Made_MTRADES --method m+trades --epochs 10" in page.text
    assert "410 MiB" in page.text
    assert "steps per epoch 1, 1, 2, 2, 2, 3, 3, 3, 4, 4" in page.text
    assert [chart["aria-label"] for chart in page.all("svg") if chart.get("class") == "chart"] == [
        "Accuracy by epoch",
        "Gradient magnitude and steps by epoch",
    ]


def test_the_three_lines_load_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made_up_board.entry("Doe2021Made_A")
    assert entry.model is not None
    assert entry.weights_file is not None
    network = entry.model.build().eval()
    board = made_up_board.write(tmp_path, [entry])
    (board / entry.weights_file).parent.mkdir(parents=True)
    save_tensors(board / entry.weights_file, network.state_dict())
    digest = sha256_file(board / entry.weights_file)
    entry = entry.model_copy(update={"weights_sha256": digest})
    made_up_board.write(tmp_path, [entry])
    build(board)
    (lines,) = re.findall(
        "<h2>Load it</h2>\n<pre><code>(.*?)</code>", (board / f"models/{entry.key}.html").read_text(), re.S
    )
    assert len(html.unescape(lines).splitlines()) == 3
    monkeypatch.chdir(board)
    images = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    names: dict[str, Any] = {"images": images}
    exec(html.unescape(lines), names)
    assert torch.equal(names["logits"], network(images))


def test_page_of_a_published_model_claims_no_measurement(board: Path, index: Document) -> None:
    page = read(board / "models/cifar10/Linf/Poe2020Claimed_R18.html")
    assert "published" in page.text
    assert page.tables == []
    assert "Load it" not in page.text
    assert "Checks" not in page.text


def test_what_the_board_measured_again_is_shown(tmp_path: Path) -> None:
    again = made_up_board.entry("Doe2021Made_A", remeasured={"natural": Accuracy.of(97, 100)})
    write_pages(tmp_path, [again])
    page = read(tmp_path / "models/digits/Linf/Doe2021Made_A.html")
    assert page.tables[0][1][-1] == "97 / 100"
    assert page.tables[0][2][-1] == DASH


# The pictures


def test_pareto_front_by_hand() -> None:
    points = [(100.0, 40.0), (200.0, 50.0), (150.0, 35.0), (200.0, 45.0), (400.0, 50.0), (500.0, 51.0), (200.0, 50.0)]
    # 150 is dearer than 100 and worse; (200, 45) and (400, 50) are no better than (200, 50), which is there twice.
    assert pareto_front(points) == [0, 1, 6, 5]
    assert pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=9))
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_scatter_is_logarithmic_in_cost() -> None:
    picture = scatter([Point(cost, accuracy, "m", "t", "p") for cost, accuracy in ((10, 20), (100, 70), (1000, 45))])
    assert picture is not None
    (x1, y1), (x2, y2), (x3, y3) = [(dot["x"], dot["y"]) for dot in picture["dots"]]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y1 - y3), abs=0.2), "45 lies halfway between 20 and 70, and up is less"
    assert [dot["front"] for dot in picture["dots"]] == [True, True, False]
    assert picture["front"] == [(x1, y1), (x2, y1), (x2, y2)]
    assert [tick["text"] for tick in picture["x_ticks"]] == ["10", "100", "1k"]


def test_labels_do_not_cover_each_other() -> None:
    picture = scatter([Point(100 + number, 50.0 + number % 2, "a-long-method", "t", "p") for number in range(12)])
    assert picture is not None
    labels = [dot["label"] for dot in picture["dots"] if dot["label"]]
    assert 1 <= len(labels) < 12
    assert len({(label["x"], label["y"]) for label in labels}) == len(labels)


def test_curves_lie_where_the_figures_are() -> None:
    rows: list[dict[str, int | float | None]] = [
        {"epoch": 1, "steps": 1, "l_x": 10.0, "val_acc": 0.0, "train_acc": 0.25},
        {"epoch": 2, "steps": 1, "l_x": 5.0, "val_acc": 0.5, "train_acc": None},
        {"epoch": 3, "steps": 3, "l_x": 0.0, "val_acc": 1.0, "train_acc": 0.75},
    ]
    accuracy, magnitude = curves(rows)
    # The picture is from 46 to 454 and from 252 up to 12.
    assert accuracy["lines"][0]["points"] == [(46.0, 252.0), (250.0, 132.0), (454.0, 12.0)]
    assert accuracy["lines"][1]["points"] == [(46.0, 192.0), (454.0, 72.0)]
    # 1, 1 and 3 of an axis up to 4: the step comes with the third epoch.
    assert magnitude["lines"][1]["points"] == [
        (46.0, 192.0),
        (250.0, 192.0),
        (250.0, 192.0),
        (454.0, 192.0),
        (454.0, 72.0),
    ]
    assert magnitude["lines"][0]["points"][2] == (454.0, 252.0)


NUMBERS = st.one_of(st.none(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
ROWS = st.dictionaries(st.sampled_from(["epoch", "steps", "l_x", "val_acc", "train_acc", "val_robust_acc"]), NUMBERS)


@given(st.lists(ROWS, max_size=4))
def test_no_numbers_break_the_curves(rows: list[dict[str, int | float | None]]) -> None:
    for picture in curves(rows):
        assert len(picture["x_ticks"]) <= 12
        assert len(picture["y_ticks"]) <= 12
        assert len(picture["right_ticks"]) <= 12


# Text that anybody may have written

LINKS = ("javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\nscript:alert(1)", "https:",
         "vbscript:x", "data:text/html,x", "file:///etc/passwd", "//example.org/x", "https://", "http:///x", "https://[",
         "x", "", "https://example.org/a b", "https://example.org\\@evil.example",
         "\x01https://example.org")  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_only_web_addresses_are_links(link: str) -> None:
    assert web_link(link) is None


@pytest.mark.parametrize("link", ["https://arxiv.org/abs/2103.03076", "http://example.org/?a=1&b=2#c"])
def test_web_addresses_are_links(link: str) -> None:
    assert web_link(link) == link


def hostile(text: str, link: str) -> Entry:
    """An entry that no check was made of, with a text in every field that can hold one."""
    benign = made_up_board.entry("Doe2021Made_A")
    fields = dict(benign)
    words = ("name", "authors", "venue", "architecture", "dataset_note", "method", "setting", "hardware", "command",
             "footnote", "weights_sha256", "data_sha256", "submitted", "evaluated_on")  # fmt: skip
    fields.update(dict.fromkeys(words, text))
    check = Check.model_construct(name=text, status="pass", figure=0.0, sentence=text)
    fields |= {"link": link, "classes": (text, text), "versions": {text: text}, "evaluated_with": {text: text},
               "checks": (check, check), "model": None, "figures": {text: benign.figures["natural"]}}  # fmt: skip
    return Entry.model_construct(**fields)


def test_every_text_field_is_tried() -> None:
    """So that a field that an entry gains does not go untried."""
    texts = {
        name
        for name, field in Entry.model_fields.items()
        if "str" in str(get_args(field.annotation) or field.annotation)
    }
    tried = {name for name, value in dict(hostile("¤", "¤")).items() if "¤" in str(value)}
    assert texts - tried <= {"dataset", "model_name", "threat_model", "kind", "eps", "weights_file", "clean_acc",
                             "reported", "autoattack_acc", "external", "remeasured", "metrics"}  # fmt: skip


@pytest.mark.parametrize("link", ["javascript:alert(1)", '"><script>alert(1)</script>'])
def test_text_never_becomes_markup(tmp_path: Path, link: str) -> None:
    """The pages have the same elements with the same attributes as those of an entry with harmless text."""
    documents = []
    for number, (text, address) in enumerate((("x" * len(NASTY), ""), (NASTY, link))):
        folder = tmp_path / str(number)
        top = index_of(folder, [hostile(text, address), hostile(text, address)])
        documents.append((top, read(folder / "models/digits/Linf/Doe2021Made_A.html")))
    for harmless, nasty in zip(*documents, strict=True):
        assert nasty.structure == harmless.structure
        assert NASTY in "".join(nasty.words)
        assert not any((attributes["href"] or "").lower().startswith("java") for attributes in nasty.all("a"))


@pytest.mark.parametrize("text", ["\x00", "\x1b[31m", "\ud800", "\u202egnp.exe", "\u2067x", "\x85", "a\u2028b"])
def test_what_is_not_seen_is_shown(tmp_path: Path, text: str) -> None:
    index_of(tmp_path, [hostile(f"a{text}b", "")])
    written = (tmp_path / "models/digits/Linf/Doe2021Made_A.html").read_bytes().decode()
    assert "\ufffd" in written
    assert replace_invisible(written).replace("\r", "") == written
    assert "\ufffd" not in replace_invisible("é 数 ≤ \n\t-")


def test_a_name_is_a_file_name_below_the_board(tmp_path: Path) -> None:
    outside = made_up_board.entry("Doe2021Made_A").model_copy(update={"dataset": "../../.."})
    with pytest.raises(DeatError, match="leads out of the board"):
        write_pages(tmp_path / "board", [outside])
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_board_is_not_followed(tmp_path: Path) -> None:
    board = made_up_board.write(tmp_path / "board", made_up_board.board()[:1])
    (tmp_path / "elsewhere").mkdir()
    (board / "models").mkdir()
    (board / "models/digits").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeatError, match=r"models/digits/Linf leads out of the board .*; remove the link"):
        build(board)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# The files


def test_pages_need_nothing_but_themselves(board: Path, index: Document) -> None:
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
            assert sources[f"{tag}-src"] == f"'sha256-{digest}'"


def test_every_link_leads_somewhere(board: Path, index: Document) -> None:
    for path in (board / "index.html", *board.glob("models/*/*/*.html")):
        for attributes in read(path).all("a"):
            target = attributes["href"] or ""
            assert target.startswith("https://") or (path.parent / target).resolve().is_file(), target
            assert not target.startswith("https://") or attributes["rel"] == "noopener noreferrer"


def test_the_same_board_gives_the_same_bytes(tmp_path: Path, board: Path, index: Document) -> None:
    other = made_up_board.write(tmp_path / "other", made_up_board.board()[::-1])
    build(other)
    for path in (board / "index.html", *board.glob("models/*/*/*.html")):
        assert (other / path.relative_to(board)).read_bytes() == path.read_bytes()
        assert str(board) not in path.read_text()


def test_pages_of_models_that_left_are_removed(tmp_path: Path) -> None:
    entries = made_up_board.board()[:2]
    board = made_up_board.write(tmp_path, entries)
    build(board)
    own = board / "models/digits/Linf/notes.html"
    own.write_text("<p>somebody's own</p>")
    (board / "entries" / f"{entries[0].key}.json").unlink()
    build(board)
    assert sorted(path.name for path in own.parent.iterdir()) == ["Doe2021Made_TRADES.html", "notes.html"]


def test_a_board_with_a_wrong_entry_keeps_its_pages(tmp_path: Path) -> None:
    board = made_up_board.write(tmp_path, made_up_board.board()[:2])
    before = build(board).read_bytes()
    made_up_board.write(tmp_path, made_up_board.board()[2:3])
    (board / "entries/digits/Linf/Doe2021Made_TRADES.json").write_text("{}")
    with pytest.raises(DeatError, match=r"Doe2021Made_TRADES\.json is not"):
        build(board)
    assert (board / "index.html").read_bytes() == before
    assert len(list(board.glob("models/*/*/*"))) == 2


def test_a_board_that_cannot_be_written_keeps_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_board_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="there is no leaderboard at"):
        build(tmp_path / "nothing")


def test_an_empty_board_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    text = read(build(tmp_path)).text
    assert "0 measured models on 0 data sets" in text
    assert "This board has no model of its own here." in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, DASH), (0.0, "0.0 s"), (9.96, "10.0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"),
     (7200, "2.0 h"), (172_800, "2.0 d")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_names() -> None:
    assert [memory(size) for size in (None, 3 * 2**20, 5 * 2**29)] == [DASH, "3 MiB", "2.5 GiB"]
    assert name_parts("Wang2021Gradient_R18") == ["Wang", "2021", "Gradient_", "R18"]
    assert re.sub(r"\W", "", "".join(name_parts(NASTY))) == re.sub(r"\W", "", NASTY)
