"""Fixtures of all tests. One thread per process, since several processes share the cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from board_problems import FakeEvaluation
    from fresh_interpreters import Fresh

    from deat_rb.leaderboard.board import Board

torch.set_num_threads(1)

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "grey": (128, 128, 128), "red": (200, 60, 40)}


def pytest_configure(config: pytest.Config) -> None:
    """Stop at once where robustbench is damaged, rather than fail in every test that needs it."""
    from deat_rb.utils.compat import check_installation
    from deat_rb.utils.errors import DeatError

    try:
        check_installation()
    except DeatError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` without a GPU, and leave out those marked ``nightly`` unless they are asked for."""
    if not torch.cuda.is_available():
        no_gpu = "records CUDA graphs or uses streams, which no CPU has; stand-ins test the same code there"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=no_gpu))
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


@pytest.fixture
def tiny_model() -> nn.Module:
    """A network with BatchNorm for 4 classes and images of any size: the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 4 classes, each a color with noise: 12 training and 4 test images of 32x32 for each."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    noise = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.tensor(colour) + torch.randint(-30, 31, (32, 32, 3), generator=noise)
                image = Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy())
                image.save(folder / f"{index:04}.png")
    return root


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """Run code in an interpreter without deat_rb and robustbench; see `fresh_interpreters`."""
    from fresh_interpreters import started

    with started() as run:
        yield run


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation that draw no curves, which would take longer than the rest of a small run."""
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    monkeypatch.setattr("deat_rb.runs.summary.draw_curves", lambda *_, **__: b"")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEvaluation:
    """Leaderboards that do not evaluate; see `board_problems.without_evaluating`."""
    from board_problems import without_evaluating

    return without_evaluating(monkeypatch)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A leaderboard that does not exist yet."""
    from deat_rb.leaderboard.board import Board

    return Board(tmp_path / "board")
