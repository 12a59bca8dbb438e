"""What the ranks of a run communicate, and when; see tests/utils/test_distributed.py for runs with two ranks."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training_problems import made, normalized

import deat_rb
from deat_rb.methods.registry import known_methods
from deat_rb.training.averaging import WeightAverage
from deat_rb.training.callbacks import Action
from deat_rb.training.engine import Engine
from deat_rb.training.loop import AGREE_EVERY, Loop
from deat_rb.utils.distributed import World


class Recorded(World):
    """A world of two ranks that notes which tensors are averaged and how often the ranks agree."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.averaged: list[Tensor] = []
        self.agreements = 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        self.averaged = [tensor for tensor in tensors if tensor.is_floating_point()]

    def max_over_ranks(self, number: int) -> int:
        self.agreements += 1
        return number


def test_running_statistics_averaged_once_are_those_averaged_after_each_batch() -> None:
    """Two ranks, 200 batches: the difference is rounding, below 3e-8 of values around 1."""
    torch.manual_seed(0)
    each, once = [[nn.BatchNorm2d(4) for _ in range(2)] for _ in range(2)]
    for _ in range(200):
        for rank in range(2):
            images = 0.3 * torch.randn(8, 4, 3, 3) + torch.rand(1, 4, 1, 1)
            each[rank](images)
            once[rank](images)
        average(each)
    average(once)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(once[0], name), getattr(each[0], name), rtol=0, atol=1.2e-7)
        difference = (getattr(once[0], name) - getattr(each[0], name)).abs().mean()
        assert float(difference) < 3e-8


def average(layers: list[nn.BatchNorm2d]) -> None:
    for name in ("running_mean", "running_var"):
        mean = sum(getattr(layer, name).double() for layer in layers) / len(layers)
        for layer in layers:
            getattr(layer, name).copy_(mean)


def test_statistics_are_averaged_when_they_are_read_and_other_buffers_in_each_batch() -> None:
    model = normalized()
    model.register_buffer("own", torch.zeros(3))
    world, engine = Recorded(), Engine()
    engine.world = world
    engine.sync_buffers(model, statistics=False)
    assert [tensor.shape for tensor in world.averaged] == [(3,)]
    engine.sync_buffers(model)
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    assert len(world.averaged) == 1 + len(statistics) == 5  # without the normalization, which is constant
    engine.sync_buffers(model, WeightAverage(model, 0.9))
    assert len(world.averaged) == 5 + 7
    world.averaged = []
    engine.sync_bn = True
    engine.sync_buffers(model)
    assert [tensor.shape for tensor in world.averaged] == [(3,)], "BatchNorm's are those of all ranks"


def test_only_attacks_in_eval_mode_read_the_statistics() -> None:
    eval_mode = {method for method in known_methods() if deat_rb.create(method, made()).reads_statistics()}
    assert eval_mode == {"fat-5", "f+trades", "f+mart", "liet"}
    assert deat_rb.create("pgd-2", made(), attack_mode="eval").reads_statistics()
    assert not deat_rb.create("fat-5", made(), attack_mode="train").reads_statistics()


@pytest.mark.parametrize(("device", "agreements"), [("cpu", 20), ("cuda", 20 // AGREE_EVERY)])
@pytest.mark.parametrize("batches", [3, 20])
def test_ranks_on_gpus_agree_after_every_tenth_batch(device: str, agreements: int, batches: int) -> None:
    """Of the run, so that they also do where an epoch has fewer than ten."""
    world = Recorded()
    state = SimpleNamespace(world=world, batches=batches, engine=SimpleNamespace(device=torch.device(device)))
    loop: Any = SimpleNamespace(state=state, callbacks=[], requests=SimpleNamespace(requested=True))
    seen = []
    for batch in range(20):
        state.epoch, state.batch = batch // batches + 1, batch % batches + 1
        seen.append(Loop._agreed_action(loop))
    assert world.agreements == agreements
    assert seen.count(Action.STOP) == agreements
    assert seen[AGREE_EVERY - 1] == Action.STOP


@pytest.mark.parametrize(("error", "aborted"), [(ValueError("alone"), 1), (KeyboardInterrupt(), 0)])
def test_a_rank_that_raises_alone_aborts_communication(
    error: BaseException, aborted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    loop: Any = SimpleNamespace(state=SimpleNamespace(world=World(0, 2)))
    with pytest.raises(type(error)), Loop._failing_alone(loop):
        raise error
    assert len(calls) == aborted
    World().abandon()  # a single rank has nobody who waits
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    World(0, 2).abandon()  # whose peers notice by themselves
    assert len(calls) == aborted
