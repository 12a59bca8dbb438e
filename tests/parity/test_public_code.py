"""Attacks, losses and training steps equal the authors' public code.

``public_code.json`` holds what that code returned, at the commit named there, on the problems of ``public_code.py``:
in double precision, with its random numbers replaced by `public_code.noise`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from public_code import ALPHA, EPS, STEPS, batch, network, noise, summary
from torch import Tensor, nn
from torch.optim import SGD

import deat_rb
from deat_rb.attacks.base import CraftStats
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import EpochStats
from deat_rb.training.place import Place
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding

PUBLIC: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "public_code.json").read_text())


@pytest.fixture(autouse=True)
def _closed_form_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0

    def next_noise(images: Tensor) -> Tensor:
        nonlocal drawn
        drawn += 1
        return noise(images, drawn - 1)

    monkeypatch.setattr(seeding, "normal_like", lambda images, std: std * next_noise(images))
    monkeypatch.setattr(
        seeding, "uniform_like", lambda images, bound: (bound * next_noise(images) / 2).float().double()
    )


def assert_images(images: Tensor, expected: dict[str, list[float]]) -> None:
    found = summary(images)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=0, abs=1e-12), key


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_trades_and_mart_equal_their_public_code(name: str) -> None:
    """The public code attacks in eval mode and takes the loss in train mode."""
    images, labels = batch(8, 6)
    model = network()
    trainer = deat_rb.create(name, model, alpha=ALPHA, steps=STEPS, attack_mode="eval")
    adv = trainer(images, labels)
    assert_images(adv, PUBLIC[name]["adversarial"])
    loss = trainer.loss.function(model(adv), labels, model(images)).mean()
    assert loss.item() == pytest.approx(PUBLIC[name]["loss"], rel=1e-6)  # MART's code adds 1e-12 and 1e-7 inside KL


@pytest.mark.parametrize("name", ["fat", "f+trades"])
def test_fat_equals_its_public_code(name: str) -> None:
    images, labels = batch(8, 32)
    public = PUBLIC[name]
    method = f"fat-{STEPS}" if name == "fat" else name
    trainer = deat_rb.create(method, network(), alpha=ALPHA, steps=STEPS, tau=public["tau"])
    assert trainer.crafter.omega == public["omega"]
    assert_images(trainer(images, labels), public["adversarial"])


def train(name: str, *, after: int = 0, of: int = 1, **options: Any) -> tuple[Trainer, float, int, float]:
    """Train on a batch of 8 and one of 5 images, after some epochs of a run with ``of`` epochs.

    Return the trainer, and the sums of loss, correct and l_X.
    """
    trainer = deat_rb.create(name, network(), **options)
    trainer.schedule.begin(of)
    for epoch in range(1, after + 1):
        trainer.schedule.update(EpochStats(epoch=epoch))
    trainer.apply_schedule()
    optimizer = sgd(trainer.model)
    images, labels = batch(8, 6)
    loss = correct = l_x = 0.0
    for part in ((images, labels), (images.flip(0)[:5].contiguous(), labels.flip(0)[:5].contiguous())):
        stats = trainer.training_step(*part, optimizer)
        loss, correct, l_x = loss + float(stats.loss), correct + int(stats.correct), l_x + float(stats.l_x)
    return trainer, loss, int(correct), l_x


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("free, carried", "free-3", {"carry": True}),
        ("free, zero in each batch", "free-3", {"carry": False}),
        ("m-deat", "m-deat", {"steps": 3, "alpha": 10 / 255}),
        ("u-fgsm", "u-fgsm", {}),
        ("n-fgsm", "n-fgsm", {}),
        ("n-fgsm", "m+n-fgsm", {}),
        ("gradalign", "gradalign", {}),
        ("amata", "amata-2-10", {"after": 1, "of": 4}),
        ("yopo", "yopo-5-3", {}),
    ],
)
def test_training_equals_the_public_code(case: str, name: str, options: dict[str, Any]) -> None:
    public = PUBLIC[case]
    trainer, loss, correct, l_x = train(name, **options)
    for key, value in trainer.model.state_dict().items():
        assert float(value.double().abs().sum()) == pytest.approx(public["weights"][key], rel=1e-11), key
    assert loss == pytest.approx(public["loss"], rel=1e-11)
    assert correct == public["accuracy"]
    if "delta" in public:
        assert_images(trainer.tensors()["carried"], public["delta"])
    if "l_x_of_mean_loss" in public:
        # Theirs is of the gradient of the batch's mean loss: an eighth and a fifth of each example's.
        first, second = public["l_x_of_mean_loss"]
        assert l_x == pytest.approx(8 * first + 5 * second, rel=1e-11)


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("fgsm-pgi", "fgsm-pgi", {"label_smoothing": 0.5}),  # 0.6 for the label and 0.1 for each of the other 4 classes
        ("liet", "liet", {}),
        ("liet, eps 16/255", "liet", {"eps": 16 / 255, "consistency": 20.0, "label_smoothing": 0.4}),
    ],
)
def test_training_with_stored_perturbations_equals_the_public_code(
    case: str, name: str, options: dict[str, Any]
) -> None:
    """An epoch of eight images and one of five of them, in another order."""
    public = PUBLIC[case]
    trainer = deat_rb.create(name, network(), **options)
    optimizer, engine = sgd(trainer.model), Engine("cpu")
    images, labels = batch(8, 6)
    loss = correct = passes = 0.0
    for epoch, rows in enumerate((torch.arange(8), torch.arange(7, 2, -1)), start=1):
        place = Place(epoch, 2, 0, len(rows), 5, rows, 8)
        passes += len(rows) * (2 + trainer.begin_batch(images[rows], place, engine))
        stats = trainer.training_step(images[rows], labels[rows], optimizer, engine)
        loss, correct = loss + float(stats.loss), correct + int(stats.correct)
    for key, value in trainer.model.state_dict().items():
        assert float(value.double().abs().sum()) == pytest.approx(public["weights"][key], rel=1e-11), key
    assert loss == pytest.approx(public["loss"], rel=1e-11)
    assert correct == public["accuracy"]
    for kept in ("prior", "momentum"):
        if kept in public:
            assert_images(trainer.tensors()[kept], public[kept])
    if "passes" in public:
        assert [passes, passes] == pytest.approx(public["passes"])


@pytest.mark.parametrize(
    ("case", "name", "rel"), [("at", "pgd-7", 1e-9), ("trades", "trades", 1e-9), ("mart", "mart", 1e-6)]
)
def test_awp_equals_its_public_code(case: str, name: str, rel: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of 8 and 5 given adversarial examples; MART's form has the loss of its own public code."""
    public, drawn = PUBLIC[f"awp, {case}"], iter(range(2))

    def crafted(self: deat_rb.PGD, images: Tensor, labels: Tensor) -> tuple[Tensor, CraftStats]:
        adv = (images + EPS * noise(images, next(drawn)) / 2).clamp(0, 1)
        return adv, CraftStats(torch.zeros(()), 0.0, 0.0)

    monkeypatch.setattr(deat_rb.PGD, "craft", crafted)
    trainer, loss, _, _ = train(name, awp=public["gamma"])
    state = trainer.model.state_dict()
    for key, value in public["weights"].items():
        assert float(state[key].double().abs().sum()) == pytest.approx(value, rel=rel), key
    assert loss == pytest.approx(public["loss"], rel=rel)


def test_the_carried_perturbation_may_leave_the_bounds_of_the_next_images() -> None:
    trainer = deat_rb.create("free-2", network(), carry=True)
    images, labels = batch(8, 6)
    trainer.training_step(images, labels, sgd(trainer.model))
    start = trainer.initialize(1 - images)
    assert torch.equal(start, 1 - images + trainer.tensors()["carried"])
    assert float(start.max()) > 1 + EPS / 2
    adv = trainer(1 - images, labels)
    assert 0 <= float(adv.min()) <= float(adv.max()) <= 1


def test_pgd_without_clamped_start_stays_in_the_image_bounds() -> None:
    images, labels = batch(8, 6)
    for steps in (0, 1):
        attack = deat_rb.PGD(network(), steps=steps, start="normal", clamp_start=False, attack_mode="eval")
        assert float(attack.initialize(images).max()) > 1
        adv = attack(images, labels)
        assert 0 <= float(adv.min()) <= float(adv.max()) <= 1
