"""Non-finite values in training: detection, abort and skipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Generated
from resumed_runs import Stops, train
from torch import nn
from training_problems import Batch, Positioned, loader, made, normalized, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import BatchStats
from deat_rb.training.nonfinite import NonFiniteFlags
from deat_rb.utils.errors import DeatError, Interrupted


def stats(loss: float = 1.0, l_x: float = 1.0) -> BatchStats:
    return BatchStats(1, torch.tensor(loss), torch.tensor(1), torch.tensor(l_x), 1, 1, 1, 3)


def test_nonfinite_flags_name_the_first_batch() -> None:
    model = nn.Linear(2, 2)
    flags = NonFiniteFlags()
    assert flags.found() is None
    flags.note(stats(), model, 0)
    assert flags.found() is None
    assert flags.note(stats(l_x=math.inf), model, 4).tolist() == [True, False, True]
    flags.note(stats(loss=math.nan), model, 5)
    assert flags.found() == (5, "l_X")
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert NonFiniteFlags().note(stats(), model, 0).tolist() == [True, True, False]


class Poisoned(Positioned):
    """Batches of which one has NaN in it, from the second epoch on or from the first."""

    def __init__(self, data: Iterable[Batch], at: int) -> None:
        self.at = at
        super().__init__(data)

    def __iter__(self) -> Iterator[Batch]:
        for number, (images, labels) in enumerate(super().__iter__()):
            yield (images * math.nan if number == self.at else images), labels


@pytest.mark.parametrize(
    ("method", "options"),
    [("pgd-1", {}), ("free-2", {"ema": 0.5}), ("m-deat", {}), ("trades", {"ema": 0.5}), ("fgsm-pgi", {}), ("liet", {})],
)
def test_nonfinite_skip_leaves_no_trace_of_the_batch(method: str, options: dict[str, Any]) -> None:
    """Training with a bad batch at the end of the epoch is training without that batch."""
    good = loader(4)
    expected, actual = made(), made()
    expected.load_state_dict(actual.state_dict())
    theirs = deat_rb.create(method, expected).fit(
        Positioned(good[:3], 24), epochs=1, lr=0.1, lr_schedule="flat", **options
    )
    ours = deat_rb.create(method, actual).fit(
        Poisoned(good, at=3), epochs=1, lr=0.1, lr_schedule="flat", on_nonfinite="skip", **options
    )
    assert (ours.rows[0].skipped, theirs.rows[0].skipped) == (1, 0)
    assert (ours.rows[0].l_x, ours.rows[0].examples) == (theirs.rows[0].l_x, theirs.rows[0].examples)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


def test_nonfinite_skip_of_every_batch_ends_training() -> None:
    bad = [(images * math.nan, labels) for images, labels in loader(2)]

    class First(list[Batch]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Batch]:
            return list.__iter__(self) if self.epoch < 2 else iter(bad)

    trainer = deat_rb.create("pgd-1", made())
    with pytest.raises(
        DeatError,
        match=r"diverged: the loss, l_X or a gradient became NaN or Inf at batch 2 of epoch 2; the model .* epoch 1",
    ):
        trainer.fit(First(loader(2)), epochs=2, lr=0.1, on_nonfinite="skip")
    with pytest.raises(DeatError, match="on_nonfinite = 'ignore' cannot be used: it should be 'stop' or 'skip'"):
        trainer.fit(loader(2), epochs=1, on_nonfinite="ignore")


def test_nonfinite_stop_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config())
    data = loader(4)

    class Blows(Generated):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Batch]:
            yield from data[:1]
            images, labels = data[1]
            yield (images if self.epoch < 2 else images * float("nan")), labels

    state = torch.get_rng_state()
    with pytest.raises(
        DeatError,
        match=r"diverged: the loss became NaN or Inf at batch 2 of epoch 2; the model has the weights of epoch 1; "
        r"the checkpoint .*"
        r"/checkpoints/00000002.safetensors \(epoch 2, batch 0\) is unaffected; try a smaller --lr",
    ):
        deat_rb.create("pgd-1", model).fit(Blows(), epochs=3, lr=0.05, run=run)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.epoch for row in run.rows()] == [1]
    assert all(
        bool(tensor.isfinite().all()) for tensor in deat_rb.load_model(run.path, trust_code=True).state_dict().values()
    )
    with pytest.raises(
        DeatError, match=r"diverged: .* became NaN or Inf at batch . of epoch 1; no epoch has finished yet"
    ):
        deat_rb.create("standard", made()).fit(loader(3), epochs=1, lr=1e30)


def test_nonfinite_after_resume_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("pgd-1", run, Stops(6))
    newest = sorted(run.checkpoints.iterdir())[-1]
    learn = deat_rb.AttackTrainer.training_step

    def broken(self: deat_rb.AttackTrainer, *arguments: Any) -> BatchStats:
        return replace(learn(self, *arguments), loss=torch.tensor(math.nan))

    monkeypatch.setattr(deat_rb.AttackTrainer, "training_step", broken)
    with pytest.raises(
        DeatError,
        match=rf"the loss became NaN or Inf at batch 3 of epoch 2; .* checkpoint {newest} \(epoch 2, batch 2\)",
    ):
        train("pgd-1", run, resume=True)


def test_nonfinite_skip_right_after_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    data = Poisoned(loader(3), at=1)
    options: dict[str, Any] = {"epochs": 1, "lr": 0.05, "on_nonfinite": "skip", "run": run}
    with pytest.raises(Interrupted):
        deat_rb.create("pgd-1", normalized()).fit(data, callbacks=[Stops(1)], **options)
    [row] = deat_rb.create("pgd-1", normalized()).fit(data, resume=True, **options).rows
    assert (row.skipped, row.examples) == (1, 12)
