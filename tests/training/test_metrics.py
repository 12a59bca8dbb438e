"""Per-epoch sums and rows of metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.utils.distributed import World


def test_epoch_accumulator_over_ranks_resumes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses tensors of the CPU, and a loss in single precision depends on the order it is summed in."""
    losses = [[1e8, 3.0, 0.1, 5e7], [7.7, 2e7, 0.3, 1.0]]

    def accumulate(rank: int, batches: slice, sums: EpochAccumulator | None = None) -> EpochAccumulator:
        sums = sums or EpochAccumulator()
        for loss in losses[rank][batches]:
            sums.add(BatchStats(4, torch.tensor(loss), torch.tensor(3), torch.tensor(loss / 3), 2, 2, 1, 192), 0.5)
        return sums

    def all_gather(values: list[Any], value: Any, group: Any) -> None:
        values[:] = together

    monkeypatch.setattr(dist, "all_gather_object", all_gather)
    monkeypatch.setattr(dist, "all_reduce", None)
    together = [accumulate(rank, slice(None)).state_dict() for rank in (0, 1)]
    whole = accumulate(0, slice(None)).all_reduce(World(0, 2)).state_dict()
    assert (whole["examples"], whole["batches"], whole["correct"], whole["forwards"]) == (32, 4, 24, 8)

    parts = [accumulate(rank, slice(2)).state_dict() for rank in (0, 1)]
    resumed = [accumulate(rank, slice(2, 4), EpochAccumulator.resume_share(parts, World(rank, 2))) for rank in (0, 1)]
    together = [sums.state_dict() for sums in resumed]
    assert resumed[0].all_reduce(World(0, 2)).state_dict() == whole
    # Resumed on another number of ranks, the earlier sums count once.
    for size in (1, 3):
        shares = [EpochAccumulator.resume_share(parts, World(rank, size)).state_dict() for rank in range(size)]
        assert sum(share["examples"] for share in shares) == 16
        assert sum(share["loss"] for share in shares) == pytest.approx(sum(part["loss"] for part in parts))
        assert {share["batches"] for share in shares} == {2}


def test_epoch_stats_from_row_ignores_unknown_fields() -> None:
    row = EpochStats(epoch=3, l_x=2.5, val_acc=0.5)
    assert EpochStats.from_row({**asdict(row), "of_a_later_version": 1}) == row
    assert EpochStats.from_row({"epoch": 3, "l_x": 2.5, "val_acc": 0.5}) == row
    assert EpochStats.of({"l_x": 2.5}, number=7).epoch == 7
