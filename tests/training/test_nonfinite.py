"""Training that is no longer finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_problems import loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.metrics import BatchStats
from deat_rb.training.nonfinite import NonFiniteFlags
from deat_rb.utils.errors import DeatError

Batch = tuple[Tensor, Tensor]


def stats(loss: float = 1.0, l_x: float = 1.0) -> BatchStats:
    return BatchStats(1, torch.tensor(loss), torch.tensor(1), torch.tensor(l_x), 1, 1, 1, 3)


def test_the_first_batch_that_was_not_finite_is_named() -> None:
    model = nn.Linear(2, 2)
    watch = NonFiniteFlags()
    assert watch.found() is None
    watch.note(stats(), model, 0)
    assert watch.found() is None
    assert watch.note(stats(l_x=math.inf), model, 4).tolist() == [True, False, True]
    watch.note(stats(loss=math.nan), model, 5)
    assert watch.found() == (5, "l_X")
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert NonFiniteFlags().note(stats(), model, 0).tolist() == [True, True, False]


class Poisoned(list[Batch]):
    """Batches of which one has NaN in it, from the second epoch on or from the first."""

    def __init__(self, data: list[Batch], at: int) -> None:
        super().__init__(data)
        self.at = at

    def __iter__(self) -> Iterator[Batch]:
        for number, (images, labels) in enumerate(super().__iter__()):
            yield (images * math.nan if number == self.at else images), labels


@pytest.mark.parametrize("method", ["pgd-1", "free-2", "m-deat", "trades"])
def test_a_batch_that_is_skipped_leaves_no_trace(method: str) -> None:
    """Training with a bad batch at the end of the epoch is training without that batch."""
    good = loader(4)
    expected, actual = made(), made()
    expected.load_state_dict(actual.state_dict())
    theirs = deat_rb.create(method, expected).fit(good[:3], epochs=1, lr=0.1, lr_schedule="flat")
    ours = deat_rb.create(method, actual).fit(
        Poisoned(good, at=3), epochs=1, lr=0.1, lr_schedule="flat", on_nonfinite="skip"
    )
    assert (ours.rows[0].skipped, theirs.rows[0].skipped) == (1, 0)
    assert (ours.rows[0].l_x, ours.rows[0].examples) == (theirs.rows[0].l_x, theirs.rows[0].examples)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


def test_skipping_every_batch_ends_training() -> None:
    bad = [(images * math.nan, labels) for images, labels in loader(2)]

    class First(list[Batch]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Batch]:
            return list.__iter__(self) if self.epoch < 2 else iter(bad)

    trainer = deat_rb.create("pgd-1", made())
    with pytest.raises(DeatError, match="no longer finite: the loss, l_X or a gradient at batch 2 of epoch 2; epoch 1"):
        trainer.fit(First(loader(2)), epochs=2, lr=0.1, on_nonfinite="skip")
    with pytest.raises(DeatError, match="on_nonfinite = 'ignore' cannot be used: it should be 'stop' or 'skip'"):
        trainer.fit(loader(2), epochs=1, on_nonfinite="ignore")


def test_a_rule_that_is_not_heeded_is_noted() -> None:
    class Alarm(deat_rb.methods.GradientRatio):
        def update(self, stats: Any) -> Any:
            from deat_rb.training.base import Stop

            return Stop("because", keep=1) if stats.epoch == 2 else None

    def trainer() -> Any:
        made_trainer = deat_rb.create("m+u-fgsm", made())
        made_trainer.stopping = Alarm()
        return made_trainer

    heeded = trainer().fit(loader(2), epochs=4, lr=0.05)
    noted = trainer().fit(loader(2), epochs=4, lr=0.05, early_stopping=False)
    assert (len(heeded.rows), heeded.stopped, heeded.selected) == (2, "because", 1)
    assert (len(noted.rows), noted.stopped, noted.selected) == (4, None, 4)
    assert [row.stopped for row in noted.rows] == [None, "because", None, None]


@pytest.mark.parametrize("method", ["pgd-2", "fat-3", "f+trades", "free-2", "mart"])
def test_compiled_passes_train_what_eager_ones_do(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding. The graphs are captured as always, and run without the compiler that takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        model = made()
        trainer = deat_rb.create(method, model, **({"steps": 2} if method == "mart" else {}))
        history = trainer.fit(loader(3), epochs=1, lr=0.05, compile=compiled)
        assert "forward" not in model.__dict__
        results.append((history.rows[0].loss, history.rows[0].l_x))
    assert results[0] == pytest.approx(results[1], rel=1e-3)
