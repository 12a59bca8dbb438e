"""The training loop in docs/training_loop.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from docs_examples import replaced

from deat_rb.training.metrics import EpochStats

TEXT = (Path(__file__).parents[2] / "docs" / "training_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FEWER_IMAGES = {"first(256)": "first(128)"}


@pytest.mark.slow
def test_training_step_loop_of_the_docs_raises_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(replaced(BLOCKS[0], FEWER_IMAGES), "training_loop.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["epoch 1: steps 1", "epoch 2: steps 2"]
    assert len(lines) == 3
    assert names["optimizer"].state


@pytest.mark.slow
def test_training_step_loop_of_the_docs_warms_up() -> None:
    """Of 128 images in batches of 64, PGD-1 takes 2 * 2 backward passes, and AWP one more in each batch."""
    changes = {
        **FEWER_IMAGES, "    print(": "    rows.append(row)  # ",
        'create("m-deat", model, eps=0.1)': 'create("pgd-1", model, eps=0.1, awp=0.005, awp_warmup=1)',
    }  # fmt: skip
    rows: list[EpochStats] = []
    exec(compile(replaced(BLOCKS[0], changes), "training_loop.md", "exec"), {"rows": rows})
    assert [row.backwards for row in rows] == [4, 6, 6]


def test_fabric_loop_of_the_docs_trains(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning_fabric", reason="an optional package that nothing else needs")
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[1], "training_loop.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 2
    momentum = [state["momentum_buffer"] for state in names["optimizer"].optimizer.state.values()]
    assert momentum
    assert all(bool(buffer.any()) for buffer in momentum)
