"""Every trainer and attack of the table can be pickled, saved by torch, copied, and used by spawned workers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paper_table import TABLE
from small_problems import AttackingCollate
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from training_problems import begin, images_and_labels, made

import deat_rb
from deat_rb.training.trainer import Trainer


def by_torch(trainer: Trainer) -> Any:
    buffer = io.BytesIO()
    torch.save(trainer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ROUND_TRIPS: dict[str, Callable[[Trainer], Any]] = {
    "pickle": lambda trainer: pickle.loads(pickle.dumps(trainer)),
    "torch": by_torch,
    "copy": copy.deepcopy,
}


def adversarial(attack: Any) -> Tensor:
    torch.manual_seed(5)
    adv: Tensor = attack(*images_and_labels())
    return adv


@pytest.mark.slow
@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("name", TABLE)
def test_create_returns_a_trainer_that_can_be_pickled(name: str, way: str) -> None:
    trainer = deat_rb.create(name, made())
    trainer.reset_schedule()
    again = ROUND_TRIPS[way](trainer)
    assert again.crafter.model is again.model
    assert torch.equal(adversarial(again), adversarial(trainer))
    assert torch.equal(adversarial(again.crafter), adversarial(trainer.crafter))
    images, labels = images_and_labels()
    losses = []
    for each in (trainer, again):
        torch.manual_seed(6)
        begin(each, images)
        losses.append(float(each.training_step(images, labels, SGD(each.model.parameters(), lr=0.1)).loss))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["trades", "f+mart", "free-8"])
def test_a_trainer_can_be_pickled_after_fit(name: str) -> None:
    trainer = deat_rb.create(name, made())
    trainer.fit([images_and_labels()], epochs=1)
    assert torch.equal(adversarial(pickle.loads(pickle.dumps(trainer))), adversarial(trainer))


@pytest.mark.slow
def test_spawned_dataloader_workers_attack() -> None:
    trainer = deat_rb.create("mart", made().eval())
    loader = DataLoader(
        TensorDataset(*images_and_labels()),
        batch_size=3, num_workers=1, multiprocessing_context="spawn", collate_fn=AttackingCollate(trainer),
    )  # fmt: skip
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 3]
    assert not torch.equal(torch.cat(batches), images_and_labels()[0])
