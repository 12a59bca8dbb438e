"""The dataset that a board measures on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from board_problems import digits, make_run, snapshot, submit
from torch import Tensor

from deat_rb.data.images import LabeledImages, first_test_examples
from deat_rb.evaluation.frozen_model import sha256_examples
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import load_board_dataset
from deat_rb.utils.errors import DeatError


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
    with pytest.raises(
        DeatError, match=rf"--n-examples {count} is out of range for 500 test images: give a number from 1 to"
    ):
        first_test_examples(digits().test, count)


def test_first_test_examples_leaves_images_in_files_above_the_limit(image_folder: Path) -> None:
    memory, files = (load_board_dataset("folder", data_dir=image_folder, image_size=32, memory_limit=limit)
                     for limit in (None, 1000))  # fmt: skip
    images, labels = first_test_examples(memory.test, 10, (3, 2, 1, 0))
    streamed, same = first_test_examples(files.test, 10, (3, 2, 1, 0))
    assert isinstance(images, Tensor)
    assert isinstance(streamed, LabeledImages)
    assert torch.equal(streamed.tensors()[0], images)
    assert torch.equal(labels, same)
    assert sha256_examples(streamed, labels) == sha256_examples(images, labels)
