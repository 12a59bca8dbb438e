"""Export of a board's models in RobustBench's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up_board
import pytest
import torch
from board_problems import NAME, FakeEvaluation, entry_of, make_checkpoint, make_run, network, submit

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.robustbench_export import export_board, robustbench_info
from deat_rb.robustbench.register import register
from deat_rb.utils import compat, safe_load
from deat_rb.utils.errors import DeatError


def test_export_board_refuses_other_weights(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    safe_load.save_tensors(board.path / f"weights/digits/Linf/{NAME}.safetensors", network(1).state_dict())
    with pytest.raises(DeatError, match=r"has the SHA-256 \w{12}\.\.\., but its entry has \w{12}"):
        export_board(board.path, tmp_path / "out", as_dataset="cifar10")
    assert not (tmp_path / "out").exists()


def test_export_board_writes_what_robustbench_loads(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_checkpoint(tmp_path / "export"), "Wong2020Fast_Board", data_dir=tmp_path)
    submit(board, make_run(tmp_path / "run"), "Wang2021Gradient_Board")
    exported = export_board(board.path, tmp_path / "out")
    assert exported.names == ("cifar10/Wong2020Fast_Board",)
    assert exported.left_out[0].startswith("digits/Linf/Wang2021Gradient_Board: RobustBench has no dataset digits")
    digits = export_board(board.path, tmp_path / "digits", dataset="digits", as_dataset="cifar10")
    assert (digits.names, digits.left_out) == (("cifar10/Wang2021Gradient_Board",), ())
    with pytest.raises(DeatError, match="has no dataset 'digit': did you mean 'digits'"):
        export_board(board.path, tmp_path / "none", dataset="digit", as_dataset="cifar10")
    assert export_board(board.path, tmp_path / "both", as_dataset="cifar10").left_out == ()
    assert set(register(tmp_path / "both")) == {"Wong2020Fast_Board", "Wang2021Gradient_Board"}
    robustbench: Any = compat.robustbench()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name in ("Wong2020Fast_Board", "Wang2021Gradient_Board"):
        loaded = robustbench.load_model(
            name, model_dir=tmp_path / "both/models", dataset="cifar10", threat_model="Linf"
        )
        assert torch.equal(loaded(images), network()(images))
    info = json.loads((tmp_path / "both/model_info/cifar10/Linf/Wang2021Gradient_Board.json").read_text())
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("80.00", "40.00", "0.1")
    assert "not on CIFAR-10" in info["footnote"]


def test_export_board_refuses_imagenet(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    with pytest.raises(DeatError, match="dataset imagenet has 224x224 images in RobustBench, but exported networks"):
        export_board(board.path, tmp_path / "out", as_dataset="imagenet")


def test_export_board_leaves_out_entries_without_accuracies(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    """RobustBench would rank the accuracy "nan" among the first."""
    entry = submit(board, make_run(tmp_path / "run"))
    natural = {"natural": entry.figures["natural"]}
    entry_of(board, NAME, figures=natural, remeasured={}, weights_file=entry.weights_file, reported=None, replace=True)
    with pytest.raises(DeatError, match=r"can be exported: .* lacks an accuracy, so RobustBench would rank it wrongly"):
        export_board(board.path, tmp_path / "out", as_dataset="cifar10")


def test_export_board_refuses_an_empty_export(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"), keep_weights=False)
    with pytest.raises(DeatError, match=r"nothing on the board .*: .* does not store its weights"):
        export_board(board.path, tmp_path / "none", as_dataset="cifar10")


@pytest.mark.parametrize(
    ("eps", "norm", "note"),
    [("8/255", "Linf", None), ("1/255", "Linf", "Evaluated at eps 1/255 instead of 8/255."),
     ("0.5", "L2", None), ("0.25", "L2", "Evaluated at eps 0.25 instead of 0.5.")],
)  # fmt: skip
def test_robustbench_info_notes_another_eps(eps: str, norm: str, note: str | None) -> None:
    entry = made_up_board.entry(dataset="cifar10", eps=eps, threat_model=norm, weights_file=None)
    assert robustbench_info(entry, "cifar10").get("footnote") == note
