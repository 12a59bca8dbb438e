"""The training loop in docs/training_loop.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_training_step_loop_of_the_docs_raises_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training_loop.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "training_loop.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch 1: steps 1", "epoch 2: steps 2", "epoch 3: steps 2"]
    assert names["optimizer"].state
