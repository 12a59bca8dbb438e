"""A model's page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import made_up_board
import pytest
import torch
from html_documents import read

from deat_rb.leaderboard.entry import Accuracy
from deat_rb.leaderboard.pages.index import build, write_pages
from deat_rb.utils.files import sha256_file
from deat_rb.utils.safe_load import save_tensors

DASH = "\N{EN DASH}"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = made_up_board.write(tmp_path_factory.mktemp("board"), made_up_board.board())
    build(path)
    return path


def test_build_writes_a_models_page(board: Path) -> None:
    page = read(board / "models/digits/Linf/Doe2021Made_MTRADES.html")
    assert "Doe2021Made_MTRADES" in page.text
    assert "Digits, Linf at eps 0.1, all 500 test images" in page.text
    assert ["pgd-100", "", "83.20 %", "79.67 to 86.22", "416 / 500"] in page.tables[0]
    assert page.tables[1][1][0].strip() == "! warn", "failures and warnings come first"
    assert "deat-rb train --name Doe2021Made_MTRADES --method m+trades --epochs 10" in page.text
    assert "410 MiB" in page.text
    assert "steps per epoch 1, 1, 2, 2, 2, 3, 3, 3, 4, 4" in page.text
    assert [chart["aria-label"] for chart in page.all("svg") if chart.get("class") == "chart"] == [
        "Accuracy by epoch",
        "Gradient magnitude and steps by epoch",
    ]


def test_the_lines_on_a_page_load_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        '<h2>Load the model</h2>\n<div class="copied"><pre><code>(.*?)</code>',
        (board / f"models/{entry.key}.html").read_text(),
        re.S,
    )
    assert len(html.unescape(lines).splitlines()) == 3
    monkeypatch.chdir(board)
    images = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    names: dict[str, Any] = {"images": images}
    exec(html.unescape(lines), names)
    assert torch.equal(names["logits"], network(images))


def test_build_shows_no_measurement_of_a_published_model(board: Path) -> None:
    page = read(board / "models/cifar10/Linf/Poe2020Claimed_R18.html")
    assert "published" in page.text
    assert page.tables == []
    assert "Load the model" not in page.text
    assert "Checks" not in page.text


def test_build_shows_remeasured_accuracies(tmp_path: Path) -> None:
    again = made_up_board.entry("Doe2021Made_A", remeasured={"natural": Accuracy(n_correct=97, n_examples=100)})
    write_pages(tmp_path, [again])
    page = read(tmp_path / "models/digits/Linf/Doe2021Made_A.html")
    assert page.tables[0][1][-1] == "97 / 100"
    assert page.tables[0][2][-1] == DASH
