"""Trainers: units, training steps and their statistics, and their use as torchattacks attacks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from small_problems import Plane, plane_images
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from training_problems import Snapshot, images_and_labels, made, normalized, sigmoid

import deat_rb
import deat_rb.methods
from deat_rb.attacks.base import StatelessAttack
from deat_rb.methods.losses import weighted
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError

EPS = 8 / 255


def still(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.0)


class Waits(TorchDispatchMode):
    """Records every operation that synchronizes with the device."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_to_cpu", "equal", "is_nonzero")

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed_by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.SYNCS or indexed_by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


# Units


def test_the_sum_of_a_loss_in_half_precision_is_in_float32() -> None:
    """Twelve times 1 + 1/128 is 12.09375; bfloat16 has steps of 1/16 there."""

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        return (0 * logits.sum(dim=1) + 1 + 1 / 128).bfloat16()

    images, labels = images_and_labels(12)
    for kind in (deat_rb.AttackTrainer, deat_rb.methods.ReplayTrainer):
        trainer = kind(deat_rb.PGD(made(), steps=1), loss=SurrogateLoss("own", own))
        assert float(trainer.training_step(images, labels, still(trainer.model)).loss) == 12.09375


def test_eps_and_alpha_are_in_pixel_units() -> None:
    model = normalized()
    images, labels = images_and_labels()
    adv = deat_rb.create("pgd-3", model, eps=0.1, alpha=0.02)(images, labels)
    assert 0.02 < float((adv - images).abs().max()) <= 0.1 + 1e-6
    one = deat_rb.AttackTrainer(deat_rb.PGD(model, eps=0.1, alpha=0.02, steps=1, start="none"))(images, labels)
    inside = (images > 0.02) & (images < 0.98)
    moved = (one - images).abs()[inside]
    assert torch.allclose(moved, torch.full_like(moved, 0.02), atol=1e-6)


def test_trainer_call_on_a_linear_model_by_hand() -> None:
    """The loss of class 0 rises against w = (1, -2, 3, -4), that of class 1 along it; images stay in [0, 1]."""
    images, labels, _ = plane_images()
    trainer = deat_rb.create("pgd-1", Plane(), eps=0.1, alpha=0.05)
    trainer.crafter.start = "none"
    against, along = torch.tensor([-0.05, 0.05, -0.05, 0.05]), torch.tensor([0.05, -0.05, 0.05, -0.05])
    expected = images.flatten(1) + torch.where(labels[:, None] == 0, against, along)
    expected[6:] = torch.tensor([[0.05, 0.95, 1.0, 0.55], [0.0, 1.0, 0.95, 0.35]])
    assert torch.allclose(trainer(images, labels).flatten(1), expected, atol=1e-6)


# A step


@pytest.mark.parametrize(("name", "smoothing_in_l_x"), [("free-1", 0.3), ("pgd-1", 0.0), ("u-fgsm", 0.0)])
def test_l_x_is_that_of_the_attacks_loss_with_label_smoothing(name: str, smoothing_in_l_x: float) -> None:
    """A replay's gradient is the update's, of the smoothed loss; other attacks maximize the plain cross-entropy."""
    model = made().double().eval()
    images, labels = images_and_labels()
    images = images.double().requires_grad_()
    torch.nn.CrossEntropyLoss(label_smoothing=smoothing_in_l_x, reduction="sum")(model(images), labels).backward()
    assert images.grad is not None
    trainer = deat_rb.create(name, model, eps=EPS, label_smoothing=0.3, **({"carry": True} if "free" in name else {}))
    if "free" not in name:
        trainer.crafter.start = "none"
    stats = trainer.training_step(images.detach(), labels, still(model))
    assert stats.l_x.item() == pytest.approx(images.grad.abs().sum().item(), rel=1e-6)
    if smoothing_in_l_x:
        expected = torch.nn.CrossEntropyLoss(label_smoothing=0.3, reduction="sum")(model(images), labels)
        assert stats.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["pgd-1", "free-1", "standard", "trades"])
def test_training_step_statistics_by_hand(name: str) -> None:
    """On two images of the plane, at eps 0.1 and with steps of 0.1 from the clean image: each loses 1.0 of margin."""
    images, labels, _ = plane_images()
    images, labels = images[[0, 1]], labels[[0, 1]]
    model = Plane()
    options: dict[str, Any] = {"standard": {}, "trades": {"steps": 0}}.get(name, {"alpha": 0.1, "steps": 1})
    trainer = deat_rb.create(name, model, eps=0.1, **options)
    trainer.crafter.start = "none"
    stats = trainer.training_step(images, labels, still(model))
    clean, moved = (0.9, 1.2), (-0.1, 0.2)
    # A replay updates the weights on the images before it moves them.
    margins = moved if name == "pgd-1" else clean
    assert stats.examples == 2
    assert float(stats.loss) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins), rel=1e-4)
    assert int(stats.correct) == sum(m > 0 for m in margins)
    expected = 0.0 if name in ("standard", "trades") else sum(10 * sigmoid(-m) for m in clean)
    assert float(stats.l_x) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    passes = {"pgd-1": (2, 2), "free-1": (1, 1), "standard": (1, 1), "trades": (2, 1)}[name]
    assert (stats.forwards, stats.backwards, stats.updates) == (*passes, 1)


def test_training_step_descends_on_the_mean_loss() -> None:
    """Class 0's weights at a clean image x of label 0: w += lr * (1 - p) * x, and the bias likewise."""
    image, label = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    model = Plane()
    deat_rb.create("standard", model).training_step(image, label, SGD(model.parameters(), lr=0.4))
    step = 0.4 * sigmoid(-0.0)  # the margin is 0.5 (1 - 2 + 3 - 4) + 1 = 0
    assert torch.allclose(model.linear.weight[0], torch.tensor([1.0, -2, 3, -4]) + 0.5 * step)
    assert torch.allclose(model.linear.bias, torch.tensor([1 + step, -step]))


@pytest.mark.parametrize(
    "name", ["standard", "free-3", "m-deat", "pgd-2", "trades", "mart", "u-fgsm", "fat-2", "f+mart"]
)
def test_training_step_does_not_synchronize(name: str) -> None:
    """Invariant 10. In eval mode on a CPU FAT reads its masks, which costs nothing there: here it is in train mode."""
    friendly = name in ("fat-2", "f+mart")
    model = made()
    trainer = deat_rb.create(name, model, attack_mode="train" if friendly else None)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, labels = images_and_labels()
    trainer.training_step(images, labels, optimizer)
    with Waits() as waits:
        trainer.training_step(images, labels, optimizer)
    assert waits.seen == []


def test_training_step_with_torchattacks_synchronizes_in_the_first_batch_only() -> None:
    model = made()
    trainer = deat_rb.AttackTrainer(torchattacks.PGD(model, steps=2))
    images, labels = images_and_labels()
    trainer.training_step(images, labels, still(model))
    with Waits() as waits:
        trainer.training_step(images, labels, still(model))
    assert waits.seen == []


def test_waits_detects_synchronization() -> None:
    """The test above can fail: FAT in eval mode on a CPU does read its masks."""
    model = made()
    with Waits() as waits:
        deat_rb.create("fat-2", model).training_step(*images_and_labels(), still(model))
        float(torch.ones(1))
    assert {"nonzero", "_local_scalar_dense"} <= set(waits.seen)


def test_attack_trainer_takes_a_loss_of_ones_own() -> None:
    """Twice the negated logit of the label: its mean moves the label's bias by 2 * lr."""
    model = Plane()
    loss = SurrogateLoss("own", lambda logits, labels: -2 * logits.gather(1, labels[:, None]).squeeze(1))
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), loss=loss)
    images, _, _ = plane_images()
    trainer.training_step(images, torch.zeros(8, dtype=torch.long), SGD(model.parameters(), lr=0.1))
    assert torch.allclose(model.linear.bias, torch.tensor([1.2, 0.0]))


# Replays


def test_replay_trainer_call_replays_with_fixed_weights() -> None:
    model = made().eval()
    images, labels = images_and_labels()
    attack = deat_rb.PGD(model, steps=3, alpha=10 / 255, attack_mode="eval")
    trainer = deat_rb.methods.ReplayTrainer(attack)
    torch.manual_seed(1)
    adv = trainer(images, labels)
    torch.manual_seed(1)
    assert torch.equal(adv, torchattacks.PGD(model, eps=EPS, alpha=10 / 255, steps=3)(images, labels))


def test_replay_trainer_carries_its_perturbation_over_a_short_batch() -> None:
    trainer = deat_rb.create("free-1", made())
    optimizer = still(trainer.model)
    assert isinstance(trainer, deat_rb.methods.ReplayTrainer)
    grey = torch.full((6, 3, 8, 8), 0.5)
    labels = torch.arange(6) % 4
    assert torch.equal(trainer.initialize(grey), grey), "begins at zero"
    trainer.training_step(grey, labels, optimizer)
    first = trainer.initialize(grey) - grey
    assert float(first.abs().max()) == pytest.approx(EPS, rel=1e-5)
    trainer(grey, labels)
    assert torch.equal(trainer.initialize(grey) - grey, first)
    trainer.training_step(grey[:2], labels[:2].flip(0), optimizer)
    assert torch.equal(trainer.initialize(grey)[2:] - grey[2:], first[2:])
    assert torch.equal(trainer.initialize(grey[:4]), trainer.initialize(grey)[:4])


def test_attack_trainer_refuses_what_is_not_an_attack() -> None:
    model = made()
    with pytest.raises(DeatError, match=r"'pgd-7' is already a trainer: use that trainer, or pass"):
        deat_rb.AttackTrainer(deat_rb.create("pgd-7", model))
    for attack, named in [(model, "Sequential"), (torchattacks.PGD, "PGD"), ("pgd", "str"), (None, "NoneType")]:
        with pytest.raises(DeatError, match=rf"attack must be a torchattacks\.attack\.Attack such as .*, not {named}$"):
            deat_rb.AttackTrainer(attack)


def test_replay_trainer_refuses_other_attacks_and_losses() -> None:
    model = made()
    for other in ({"loss": "kl"}, {"tau": 2}, {"omega": 0.001}):
        with pytest.raises(DeatError, match=r"needs a deat_rb\.PGD on cross-entropy without tau and omega"):
            deat_rb.methods.ReplayTrainer(deat_rb.PGD(model, **other))
    with pytest.raises(DeatError, match="steps = 0 is below 1; ReplayTrainer needs at least 1 step"):
        deat_rb.methods.ReplayTrainer(deat_rb.PGD(model, steps=0))
    with pytest.raises(DeatError, match="ReplayTrainer cannot use the loss trades, which needs the clean"):
        deat_rb.methods.ReplayTrainer(deat_rb.PGD(model), loss="trades")
    with pytest.raises(DeatError, match="no surrogate loss 'trads': did you mean 'trades'"):
        deat_rb.AttackTrainer(deat_rb.PGD(model), loss="trads")


# The schedule


def test_trainer_steps_and_alpha_follow_the_schedule() -> None:
    trainer = deat_rb.create("m+pgd", made(), eps=EPS)
    alphas = []
    for steps in (1, 2, 3, 5):
        trainer.steps = steps
        assert trainer.crafter.steps == steps
        alphas.append(trainer.alpha)
    assert alphas == pytest.approx([EPS, EPS / 2, EPS / 3, 2 / 255])
    plain = deat_rb.create("pgd-7", made(), eps=EPS)
    assert plain.steps == 7
    assert plain.alpha == pytest.approx(2 / 255)


def test_apply_schedule_sets_the_steps_of_a_torchattacks_attack() -> None:
    attack = torchattacks.PGD(made(), eps=EPS, alpha=2 / 255, steps=5)
    trainer = deat_rb.AttackTrainer(attack, schedule=deat_rb.GradientMagnitude(max_steps=7))
    assert (attack.steps, attack.alpha) == (1, EPS)
    state = {"schedule": {"steps": 3, "epochs": 4, "threshold": 9.0}, "stopping": None, "averages": True}
    trainer.load_state_dict(state)
    assert (attack.steps, attack.alpha) == (3, EPS / 3)
    assert trainer.state_dict() == state


# Attacks of one's own


class Shifted(deat_rb.PGD):
    """A PGD with a forward of its own, which training has to use, too."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        adv: Tensor = super().forward(inputs, labels)
        return (adv + 0.25).clamp(0, 1)


class Own(StatelessAttack):
    """Signed steps from the images, as in docs/own_method.md."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("Own", model, "train")
        self.eps, self.alpha, self.steps = EPS, EPS / 4, 3

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        adv = inputs
        for _ in range(self.steps):
            adv = adv.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.get_logits(adv), labels)
            (gradient,) = torch.autograd.grad(loss, adv)
            adv = (adv + self.alpha * gradient.sign()).clamp(0, 1)
        return adv.detach()


def test_training_uses_an_overridden_forward() -> None:
    images, labels = images_and_labels()
    model = made()
    trainer = deat_rb.AttackTrainer(Shifted(model, steps=1, start="none", attack_mode="eval"))
    called = trainer(images, labels)
    adv, _ = trainer.craft(images, labels)
    assert torch.equal(adv, called)
    assert float((adv - images).max()) > 0.2


def test_stateless_attack_updates_batchnorm_in_training_only() -> None:
    images, labels = images_and_labels()
    tracked = []
    for attack in (lambda model: deat_rb.PGD(model, steps=3, alpha=EPS / 4, start="none"), Own):
        model = made()
        trainer = deat_rb.AttackTrainer(attack(model))
        torch.manual_seed(4)
        trainer.training_step(images, labels, still(model))
        state = Snapshot(model)
        trainer(images, labels)
        assert state.differences() == []
        tracked.append(state.tensors)
    ours, own = tracked
    assert ours["1.num_batches_tracked"] == own["1.num_batches_tracked"] == 1 + 3 + 1
    torch.testing.assert_close(ours["1.running_mean"], own["1.running_mean"])


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
@pytest.mark.parametrize("parts", [1, 2])
def test_replay_l_x_does_not_depend_on_batch_or_loss_scale(scale: float, parts: int) -> None:
    images, labels = images_and_labels(8)

    def l_x(engine: Engine, parts: int) -> float:
        trainer = deat_rb.create("free-3", made().eval())
        seen = 0.0
        for rows in torch.arange(8).chunk(parts):
            trainer.reset_schedule()
            seen += float(trainer.training_step(images[rows], labels[rows], still(trainer.model), engine).l_x)
        return seen

    scaled = Engine("cpu")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    assert l_x(scaled, parts) == pytest.approx(l_x(Engine("cpu"), 1), rel=1e-4)


def test_lr_per_replay_moves_the_learning_rate_each_replay() -> None:
    """Of two batches and four replays each, eighths of the whole."""

    def rate(batch: int, share: float) -> float:
        return (batch + share) / 2

    for per_replay in (False, True):
        model = made()
        trainer = deat_rb.create("free-4", model, lr_per_replay=per_replay)
        seen: list[float] = []

        class Noted(SGD):
            def step(self, closure: Any = None, seen: list[float] = seen) -> Any:
                seen.append(self.param_groups[0]["lr"])
                return super().step(closure)

        optimizer = Noted(model.parameters(), lr=0.0)
        for batch in range(2):
            trainer.set_replay_lr(partial(rate, batch))
            set_rate(optimizer, batch / 2)
            trainer.training_step(*images_and_labels(), optimizer)
        expected = [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875] if per_replay else [0] * 4 + [0.5] * 4
        assert seen == expected


@pytest.mark.parametrize("name", ["free-2", "deat-3", "pgd-2", "trades", "mart"])
def test_class_weights_change_the_update_but_not_the_attack_and_l_x(name: str) -> None:
    images, labels = images_and_labels()
    weights = torch.tensor([0.25, 1.0, 2.0, 3.0])
    seen = []
    for weighs in (False, True):
        model = normalized().eval()  # in train mode, BatchNorm makes an example's gradient depend on the others
        trainer = deat_rb.create(name, model, steps=1, attack_mode=None if "-" in name and name[0] in "fd" else "eval")
        if weighs:
            trainer.loss = weighted(trainer.loss, weights)
        torch.manual_seed(0)
        stats = trainer.training_step(images, labels, SGD(model.parameters(), lr=0.1), Engine("cpu"))
        seen.append((stats, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    (plain, one), (by_class, two) = seen
    assert float(by_class.l_x) == pytest.approx(float(plain.l_x), rel=1e-4)
    assert int(by_class.correct) == int(plain.correct)
    assert float(by_class.loss) != pytest.approx(float(plain.loss), rel=1e-3)
    assert not torch.allclose(one, two)


def test_class_weights_descend_on_torchs_weighted_cross_entropy() -> None:
    images, labels = images_and_labels()
    weights = torch.tensor([0.25, 1.0, 2.0, 3.0])
    model, twin = normalized(), normalized()
    trainer = deat_rb.create("standard", model)
    trainer.loss = weighted(trainer.loss, weights)
    torch.manual_seed(0)  # for dropout
    trainer.training_step(images, labels, SGD(model.parameters(), lr=0.1), Engine("cpu"))
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy(twin(images), labels, weight=weights, reduction="sum") / len(images)
    loss.backward()
    SGD(twin.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
