"""The dataset that a board measures on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from board_problems import digits, make_run, snapshot, submit

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import first_test_examples, sha256_test_examples
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import sha256_tensors


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_submit_takes_no_data_from_where_a_submission_says_and_downloads_none(
    tmp_path: Path, board: Board, image_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run = make_run(tmp_path / "run", dataset=name, data_dir=str(image_folder))
    before = snapshot(tmp_path)
    with pytest.raises(DeatError, match=f"give the folder of {name}|--dataset-name is missing"):
        submit(board, run)
    with pytest.raises(DeatError, match=r"and a board downloads nothing|mine"):
        submit(board, run, data_dir=tmp_path / "mine", **({"dataset_name": "pets"} if name == "folder" else {}))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("count", [0, 501, -1])
def test_first_test_examples_refuses_impossible_counts(count: int) -> None:
    with pytest.raises(DeatError, match=rf"--n-examples {count} is not possible \(1 to 500 test images\)"):
        first_test_examples(digits(), count)


def test_sha256_test_examples_is_that_of_the_tensors() -> None:
    images, labels = first_test_examples(digits(), 300)
    assert sha256_test_examples(digits(), 300) == sha256_tensors({"images": images, "labels": labels})
