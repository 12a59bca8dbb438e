"""The training loop: the schedule's decisions and the counted passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fits import EPS
from torch import Tensor
from torch.optim import Optimizer
from training_problems import images_and_labels, loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.training.state import TrainingState


class Scripted(deat_rb.AttackTrainer):
    """Its epochs of one batch have the l_X that the script says."""

    script: list[float]

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        stats = super().training_step(images, labels, optimizer, engine)
        stats.l_x = torch.tensor(self.script.pop(0))
        return stats


def scripted(script: list[float]) -> list[EpochStats]:
    attack = deat_rb.PGD(made(), eps=EPS, alpha=2 / 255, steps=1)
    trainer = Scripted(attack, schedule=deat_rb.GradientMagnitude(gamma=1.1, max_steps=5))
    epochs = len(script)
    trainer.script = script
    return trainer.fit([images_and_labels()], epochs=epochs, lr=0.01).rows


def test_loop_steps_and_alpha_follow_l_x() -> None:
    """Thresholds by hand: 11 after epoch 2, 12.32 after epoch 4, 13.64 after epoch 6, and the bound of 5."""
    rows = scripted([9, 10, 11, 11.2, 12, 12.4, 99, 999, 0.1])
    assert [row.steps for row in rows] == [1, 2, 2, 2, 3, 3, 4, 5, 5]
    alphas = [8, 4, 4, 4, 8 / 3, 8 / 3, 2, 2, 2]
    assert [255 * (row.alpha or 0) for row in rows] == pytest.approx(alphas)
    assert [row.forwards for row in rows] == [2, 3, 3, 3, 4, 4, 5, 6, 6], "it really took them, and one for the update"
    assert [row.backwards for row in rows] == [2, 3, 3, 3, 4, 4, 5, 6, 6]


def test_loop_keeps_steps_while_l_x_stays() -> None:
    assert [row.steps for row in scripted([9.0] * 8)] == [1] + [2] * 7
    assert [row.steps for row in scripted([9, 10, 10.9, 11.0, 10.99, 3])] == [1, 2, 2, 2, 2, 2]


def test_loop_schedule_sees_the_sum_of_l_x_over_batches() -> None:
    """The schedule's threshold after epoch 2 is gamma times the row's l_X, which is the sum over its batches."""
    trainer = deat_rb.create("m+pgd", made(), gamma=1.5)
    seen: list[float] = []
    step = trainer.training_step

    def watched(*args: Any) -> BatchStats:
        stats = step(*args)
        seen.append(float(stats.l_x))
        return stats

    trainer.__dict__["training_step"] = watched
    history = trainer.fit(loader(3), epochs=2, lr=0.01)
    assert history.rows[1].l_x == pytest.approx(sum(seen[3:]))
    assert trainer.state_dict()["schedule"]["threshold"] == pytest.approx(1.5 * sum(seen[3:]))
    bound = history.rows[1].l_x / (18 * 2 * EPS * 3 * 8 * 8)
    assert history.rows[1].lipschitz == pytest.approx(bound)


@pytest.mark.parametrize(
    ("name", "epochs", "backwards", "forwards", "updates"),
    [
        ("standard", 2, 4, 4, 4),
        ("free-3", 2, 12, 12, 12),  # r M T
        ("pgd-3", 2, 16, 16, 4),  # (i + 1) M T
        ("u-fgsm", 2, 8, 8, 4),  # 2 M T
        ("deat-3", 10, 44, 44, 44),  # 22 M
        ("deat-3", 12, 60, 60, 60),  # 30 M
        ("trades", 1, 22, 26, 2),  # 10 + 1 backwards; 10 and the clean one for crafting, 2 for the update
        ("mart", 1, 22, 24, 2),  # 10 + 1 backwards; 10 for crafting, 2 for the update
    ],
)
def test_loop_counts_passes_in_mini_batches(
    name: str, epochs: int, backwards: int, forwards: int, updates: int
) -> None:
    val = [images_and_labels()] if name == "u-fgsm" else None
    trainer = deat_rb.create(name, made())
    trainer.stopping = None if name != "u-fgsm" else trainer.stopping
    history = trainer.fit([images_and_labels(2)] * 2, val, epochs=epochs, lr=1e-4)
    assert history.backwards == backwards
    assert sum(row.forwards for row in history.rows) == forwards
    assert sum(row.updates for row in history.rows) == updates


def test_loop_counts_the_passes_of_awp_after_its_warmup() -> None:
    """M = 2; per batch 2 + 1 backward passes, and 1 more with AWP; forward passes of CE 2 + 1, of TRADES 1 + 2 + 2."""
    for name, crafting, update in [("pgd-2", 2, 1), ("trades", 3, 2)]:
        trainer = deat_rb.create(name, made(), steps=2, awp=0.01, awp_warmup=1)
        rows = trainer.fit([images_and_labels(2)] * 2, epochs=3, lr=1e-4).rows
        assert [row.backwards for row in rows] == [6, 8, 8]
        assert [row.forwards for row in rows] == [2 * (crafting + update), *[2 * (crafting + 2 * update)] * 2]
        assert [row.updates for row in rows] == [2, 2, 2]


def test_training_step_counts_the_moving_share_of_friendly_crafting() -> None:
    """With tau = 0 a misclassified example takes the pass that finds this out and no other."""
    model = made().eval()
    images, labels = images_and_labels(8)
    with torch.no_grad():
        predicted = model(images).argmax(dim=1)
    labels = torch.where(torch.arange(8) < 5, (predicted + 1) % 4, predicted)  # 5 of 8 are misclassified
    trainer = deat_rb.create("fat-3", model, tau=0, eps=1e-6)
    stats = trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.0))
    assert float(stats.backwards) == pytest.approx((5 * 1 + 3 * 3) / 8 + 1)
    assert float(stats.forwards) == pytest.approx((5 * 1 + 3 * 3) / 8 + 1)


def test_the_clock_of_an_epoch_stops_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    stop = TrainingState.stop_clock

    def noting(state: TrainingState) -> None:
        events.append("stop")
        stop(state)

    monkeypatch.setattr("deat_rb.training.loop.wait_for", lambda device: events.append("wait"))
    monkeypatch.setattr(TrainingState, "stop_clock", noting)
    deat_rb.create("standard", made()).fit([images_and_labels()], epochs=2)
    assert events == ["wait", "stop"] * 2
