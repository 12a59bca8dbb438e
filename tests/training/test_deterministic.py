"""Deterministic algorithms: switched on for a run, and what happens where there are none."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from fits import equal, fitted
from torch import Tensor, nn
from training_problems import images_and_labels, made

import deat_rb
from deat_rb.training.engine import Engine
from deat_rb.utils.errors import DeatError


def test_a_run_uses_deterministic_algorithms_and_restores_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    engine = Engine(deterministic=True)
    with engine.prepared(made()):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with Engine().prepared(made()):
        assert not torch.are_deterministic_algorithms_enabled()


def test_autotuning_is_off_in_a_deterministic_run() -> None:
    for deterministic in (True, False):
        engine = Engine(deterministic=deterministic)
        engine.device = torch.device("cuda")  # on which nothing is run here
        with patch.object(engine, "prepare", lambda model: model), engine.prepared(made()):  # without moving it there
            assert torch.backends.cudnn.benchmark != deterministic


def test_on_a_cpu_it_changes_nothing() -> None:
    assert equal(fitted("pgd-2", deterministic=True), fitted("pgd-2"))


class Scattered(nn.Module):
    """A network with an operation that has no deterministic form."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
        return logits


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    with pytest.raises(DeatError, match=r"--deterministic is impossible: put_ has no deterministic implementation .*"):
        deat_rb.create("pgd-1", Scattered()).fit([images_and_labels()], epochs=1, deterministic=True)


class Multiplies(nn.Module):
    """A network whose matrix product fails as on a GPU in torch 2.6 (aten/src/ATen/Context.cpp)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, images: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
                "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it "
                "uses CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an "
                "environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
                "CUBLAS_WORKSPACE_CONFIG=:16:8. For more information, go to "
                "https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"
            )
        logits: Tensor = self.inner(images)
        return logits


def test_a_matrix_product_before_the_workspace_was_fixed_is_explained() -> None:
    with pytest.raises(DeatError, match=r"^--deterministic needs the environment variable CUBLAS_WORKSPACE_CONFIG=.*"):
        deat_rb.create("pgd-1", Multiplies()).fit([images_and_labels()], epochs=1, deterministic=True)
