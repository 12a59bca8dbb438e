"""The table of methods: its rows, the names they go by, what overrides them, and rows of one's own."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torchattacks
from paper_table import TABLE
from small_problems import Plane
from torch import nn
from torch.optim import SGD

from deat_rb.attacks import losses
from deat_rb.attacks.pgd import PGD
from deat_rb.methods import registry
from deat_rb.methods.describe import describe, explain, method_table
from deat_rb.methods.recipes import Recipe
from deat_rb.methods.registry import create, known_methods, recipe, register_method
from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer
from deat_rb.training import base as training_base
from deat_rb.training.base import Schedule
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("name", TABLE)
def test_a_row_has_the_papers_numbers(name: str) -> None:
    kind, steps, alpha, start, craft, tau, mode, loss, schedule, numbers, stopping, stop_numbers, epochs = TABLE[name]
    trainer = create(name, Plane())
    attack = trainer.crafter
    assert trainer.attack == name
    assert isinstance(attack, PGD)
    if isinstance(trainer, ReplayTrainer):
        assert kind == ("Replay, carried" if trainer.carry else "Replay")
    else:
        assert isinstance(trainer, AttackTrainer)
        assert kind == "Attack"
    assert (trainer.steps, attack.steps) == (steps, steps)
    assert trainer.base_alpha == pytest.approx(alpha / 255)
    assert attack.eps == pytest.approx(8 / 255)
    assert (attack.start, attack.loss, attack.tau) == (start, craft, tau)
    assert attack._model_training == (mode == "train")
    assert trainer.loss.name == loss
    assert type(trainer.schedule) is schedule
    assert {key: getattr(trainer.schedule, key) for key in numbers} == numbers
    assert (type(trainer.stopping) if trainer.stopping else None) is stopping
    assert {key: getattr(trainer.stopping, key) for key in stop_numbers} == stop_numbers
    row = recipe(name)[1]
    assert row.fast_epochs == epochs
    assert row.guided == (schedule is GradientMagnitude)


def test_the_table_has_these_sixteen_methods_in_this_order() -> None:
    assert known_methods() == list(TABLE)
    assert [row.name for row in method_table()] == list(TABLE)


@pytest.mark.parametrize(("name", "largest"), [("m-deat", 8), ("m+pgd", 7), ("m+trades", 10), ("m+mart", 10)])
def test_guided_rows_raise_alpha_to_eps_over_r_up_to_their_bound(name: str, largest: int) -> None:
    trainer = create(name, Plane())
    base = 10 if name == "m-deat" else 2
    for steps in range(1, largest + 1):
        trainer.steps = steps
        assert trainer.crafter.steps == steps
        assert trainer.alpha == pytest.approx(max(base, 8 / steps) / 255)
    trainer.schedule._rise()
    assert trainer.steps == largest


@pytest.mark.parametrize(
    ("name", "clean", "missed"), [("trades", math.log(4 / 3), 1.0), ("mart", math.log(2) - math.log(0.5001), 0.25)]
)
def test_the_regularisers_weight_is_six(name: str, clean: float, missed: float) -> None:
    # Clean prediction (3/4, 1/4), adversarial (1/2, 1/2), label 0; KL = 3/4 ln 3 - ln 2.
    sure, unsure, label = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    kl = 0.75 * math.log(3) - math.log(2)
    for prefix in ("", "f+", "m+"):
        found = create(prefix + name, Plane()).loss.function(unsure, label, sure)
        assert found.item() == pytest.approx(clean + 6 * kl * missed, rel=1e-5)
    half = create(name, Plane(), beta=3.0).loss.function(unsure, label, sure)
    assert half.item() == pytest.approx(clean + 3 * kl * missed, rel=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_every_row_takes_a_training_step(name: str, tiny_model: nn.Module) -> None:
    trainer = create(name, tiny_model.train())
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    stats = trainer.training_step(images, torch.arange(6) % 4, SGD(tiny_model.parameters(), lr=0.1))
    assert stats.examples == 6
    assert math.isfinite(float(stats.loss))
    assert (float(stats.l_x) > 0) == (name != "standard")
    assert any(not torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        *[(name.upper(), name) for name in TABLE],
        ("M+TRADE", "m+trades"),
        ("TRADE", "trades"),
        ("F+TRADE", "f+trades"),
        ("F+TRADES", "f+trades"),
        ("DEAT-40%", "deat-40%"),
        ("DEAT-20%", "deat-20%"),
        ("Deat-5", "deat-5"),
        ("FREE-8", "free-8"),
        ("FREE-4", "free-4"),
        ("PGD-20", "pgd-20"),
        ("FAT-10", "fat-10"),
        ("  M-DEAT ", "m-deat"),
    ],
)
def test_names_are_read_as_the_paper_writes_them(written: str, canonical: str) -> None:
    assert recipe(written)[0] == canonical
    assert create(written, Plane()).attack == canonical


def test_the_number_in_a_name_is_the_rows() -> None:
    assert create("free-4", Plane()).steps == 4
    assert create("pgd-20", Plane()).steps == 20
    assert create("fat-10", Plane()).steps == 10
    every, above = create("deat-5", Plane()).schedule, create("deat-20%", Plane()).schedule
    assert isinstance(every, EveryDEpochs)
    assert isinstance(above, AccuracyThreshold)
    assert (every.every, above.threshold) == (5, 0.2)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("m+trads", "m+trades"),
        ("M+PDG", "m+pgd"),
        ("mdeat", "m-deat"),
        ("ufgsm", "u-fgsm"),
        ("deat", "deat-3"),
        ("pgd", "pgd-7"),
        ("free8", "free-8"),
        ("fat", "fat-5"),
        ("f-mart", "f+mart"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"there is no method '{wrong}': did you mean ")) as error:
        recipe(wrong)
    assert f"'{meant}'" in str(error.value)


def test_a_name_near_none_is_told_all() -> None:
    with pytest.raises(DeatError, match=r"no method 'zzzzzzzz': known are standard, free-8, deat-3, .*, m\+mart$"):
        create("zzzzzzzz", Plane())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("free-0", "0 in the method 'free-0' makes no free-R; the paper has free-8"),
        ("deat-0", "0 in the method 'deat-0' makes no deat-D; the paper has deat-3"),
        ("deat-100%", "100 in the method 'deat-100%' makes no deat-P%; the paper has deat-40%"),
        ("deat-0%", "0 in the method 'deat-0%' makes no deat-P%; the paper has deat-40%"),
        ("pgd-1001", "1001 in the method 'pgd-1001' makes no pgd-N; the paper has pgd-7"),
    ],
)
def test_a_number_that_makes_no_method_is_named(wrong: str, message: str) -> None:
    with pytest.raises(DeatError, match=f"^{re.escape(message)}$"):
        recipe(wrong)


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides_reach_their_places() -> None:
    guided = create("m+trades", Plane(), alpha=1 / 255, steps=2, max_steps=5, gamma=1.2, attack_mode="eval")
    assert isinstance(guided.schedule, GradientMagnitude)
    assert (guided.schedule.steps, guided.schedule.max_steps, guided.schedule.gamma) == (2, 5, 1.2)
    assert guided.base_alpha == 1 / 255
    assert guided.alpha == pytest.approx(4 / 255)  # eps / r
    assert guided.crafter._model_training is False

    friendly = create("fat-5", Plane(), tau=1, attack_mode="train", steps=8)
    assert (friendly.crafter.tau, friendly.crafter.steps, friendly.crafter._model_training) == (1, 8, True)

    every, above = create("deat-3", Plane(), every=2, max_steps=4), create("deat-40%", Plane(), threshold=0.3)
    assert isinstance(every.schedule, EveryDEpochs)
    assert isinstance(above.schedule, AccuracyThreshold)
    assert (every.schedule.every, every.schedule.max_steps, above.schedule.threshold) == (2, 4, 0.3)

    stopped = create("m+u-fgsm", Plane(), gamma=2.0, m=3, guard=0.1).stopping
    assert isinstance(stopped, GradientRatio)
    assert (stopped.gamma, stopped.m, stopped.guard) == (2.0, 3, 0.1)
    dropped = create("u-fgsm", Plane(), drop=0.3).stopping
    assert isinstance(dropped, RobustnessDrop)
    assert (dropped.drop, dropped.validation_steps) == (0.3, 5)


def test_none_leaves_the_rows_own_value() -> None:
    trainer = create("m+pgd", Plane(), alpha=None, steps=None, max_steps=None, gamma=None, tau=None, beta=None)
    assert (trainer.steps, trainer.schedule.max_steps) == (1, 7)


def test_step_sizes_grow_with_eps_unless_they_are_given() -> None:
    for name in ("pgd-7", "fat-5", "mart"):
        assert create(name, Plane(), eps=4 / 255).base_alpha == pytest.approx(1 / 255)
    assert create("free-8", Plane(), eps=16 / 255).base_alpha == pytest.approx(16 / 255)
    assert create("u-fgsm", Plane(), eps=16 / 255).base_alpha == pytest.approx(20 / 255)
    assert create("pgd-7", Plane(), eps=4 / 255, alpha=3 / 255).base_alpha == pytest.approx(3 / 255)
    assert create("pgd-7", Plane(), eps=4 / 255).crafter.eps == 4 / 255


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("pgd-7", {"gamma": 1.0}, "the method pgd-7 has no gamma to change; see deat-rb methods pgd-7"),
        ("pgd-7", {"tau": 3, "beta": 6.0}, "the method pgd-7 has no beta, tau to change"),
        ("trades", {"max_steps": 5}, "the method trades has no max_steps to change"),
        ("M+PGD", {"every": 3}, r"the method m\+pgd has no every to change"),
        ("pgd-7", {"epz": 1}, "the method pgd-7 has no epz to change"),
        ("pgd-7", {"alpha": -1.0}, "alpha = -1 is not a positive number"),
        ("pgd-7", {"alpha": 2.0}, "alpha = 2 is above 1; images are in"),
        ("standard", {"steps": 3}, "the method standard has no steps to change"),
        ("pgd-7", {"steps": -2}, "steps = -2 is not a whole number of 0 or more"),
        ("pgd-7", {"eps": 8.0}, r"eps = 8 is outside \(0, 1\]"),
        ("m+pgd", {"steps": 9}, "max_steps = 7 is below 9, with which the schedule begins"),
        ("m+pgd", {"gamma": 0.0}, "gamma = 0 is not a positive number"),
        ("deat-40%", {"threshold": 40}, r"threshold = 40 is outside \(0, 1\)"),
        ("free-8", {"steps": 0}, "steps = 0 replays would learn nothing"),
        ("fat-5", {"tau": -1}, "tau = -1 is negative"),
        ("trades", {"attack_mode": "test"}, "attack_mode = 'test' is neither 'train' nor 'eval'"),
        ("u-fgsm", {"drop": 20}, r"drop = 20 is outside \(0, 1\)"),
    ],
)
def test_what_a_method_has_not_or_cannot_be_is_refused(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        create(name, Plane(), **override)


# ------------------------------------------------------------------------------------------------ one's own


def test_a_registered_row_is_a_method_like_the_others() -> None:
    register_method("  Mine ", Recipe(steps=2, alpha=4 / 255))
    assert known_methods() == [*TABLE, "mine"]
    assert recipe("MINE")[0] == "mine"
    trainer = create("mine", Plane(), steps=3)
    assert (trainer.attack, trainer.steps, trainer.base_alpha) == ("mine", 3, 4 / 255)
    row = method_table()[-1]
    assert (row.name, row.attack, row.loss, row.schedule, row.stop, row.cost, row.paper) == (
        "mine",
        "PGD",
        "CE",
        "constant",
        "-",
        "counted",
        "-",
    )
    assert explain("mine").startswith("mine: constant")


def test_a_row_may_have_a_loss_a_trainer_and_a_schedule_of_its_own() -> None:
    class Halves(AttackTrainer):
        pass

    own = training_base.SurrogateLoss("half", lambda logits, labels: losses.cross_entropy(logits, labels) / 2)
    register_method("halves", Recipe(steps=1, loss=own, trainer=Halves, stopping=GradientRatio))
    trainer = create("halves", Plane())
    assert type(trainer) is Halves
    assert trainer.loss is own
    assert describe("halves").loss == "half"
    assert "Halves" in explain("halves")
    with pytest.raises(DeatError, match="the method halves has no beta to change"):
        create("halves", Plane(), beta=2.0)


@pytest.mark.parametrize("taken", ["trades", "M+TRADES", "pgd-7", "pgd-10", "Trade", "deat-55%"])
def test_a_name_that_the_table_reads_cannot_be_taken(taken: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"there is a method '{taken.lower()}' already; register yours")):
        register_method(taken, Recipe())


def test_a_name_is_registered_once() -> None:
    register_method("mine", Recipe())
    with pytest.raises(DeatError, match="there is a method 'mine' already"):
        register_method("Mine", Recipe())


@pytest.mark.parametrize("name", ["x/y", "..", ".hidden", "", "two words", "ümlaut"])
def test_a_name_that_makes_no_folder_is_refused(name: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"'{name}' cannot be a method's name")):
        register_method(name, Recipe())


def test_p_is_forty_where_nobody_says() -> None:
    assert recipe("DEAT-P%")[0] == recipe("deat-%")[0] == "deat-40%"


def test_a_row_may_have_any_attack_of_torchattacks(tiny_model: nn.Module) -> None:
    register_method("one", Recipe(attack=torchattacks.FFGSM, alpha=10 / 255))
    register_method("auto", Recipe(attack=torchattacks.APGD, steps=3, attack_options={"loss": "dlr"}))
    one, auto = create("one", tiny_model, eps=0.1, alpha=0.2), create("auto", tiny_model, steps=4)
    assert (one.crafter.alpha, one.steps) == (0.2, 1)
    assert (auto.crafter.steps, auto.base_alpha) == (4, None)
    with pytest.raises(DeatError, match="the method one has no steps to change"):
        create("one", tiny_model, steps=2)
    with pytest.raises(DeatError, match="the method auto has no alpha to change"):
        create("auto", tiny_model, alpha=0.1)
    register_method("led", Recipe(attack=torchattacks.FFGSM, schedule=GradientMagnitude))
    with pytest.raises(DeatError, match="FFGSM has no steps, so a schedule cannot set them"):
        create("led", tiny_model)
    register_method("square", Recipe(attack=torchattacks.Square, attack_options={"queries": 5}))
    with pytest.raises(DeatError, match="the attack of the method square cannot be made with the model, eps=, alpha="):
        create("square", tiny_model)


def test_a_row_may_have_a_schedule_of_its_own() -> None:
    class Doubling(Schedule):
        def update(self, stats: EpochStats) -> None:
            self.steps *= 2

    register_method("doubling", Recipe(steps=2, schedule=Doubling))
    trainer = create("doubling", Plane())
    trainer.schedule.update(EpochStats())
    assert trainer.steps == 4
    assert describe("doubling").schedule == "Doubling"


class Point:
    """An entry point."""

    def __init__(self, name: str, found: object) -> None:
        self.name, self.value, self.found = name, "elsewhere:ROW", found

    def load(self) -> object:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_entry_points_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        Point("broken", ImportError("no module named elsewhere")),
        Point("Fine", Recipe(steps=2)),
        Point("none", 7),
        Point("pgd-7", Recipe(steps=1)),
    ]
    monkeypatch.setattr("deat_rb.methods.registry.entry_points", lambda group: points)
    assert known_methods() == [*TABLE, "broken", "fine", "none"]
    assert create("pgd-7", Plane()).steps == 7
    with pytest.raises(DeatError, match="'broken' of the entry point elsewhere:ROW cannot be loaded: no module named"):
        recipe("broken")
    with pytest.raises(DeatError, match=r"the entry point elsewhere:ROW of the method 'none' is no deat_rb\.Recipe"):
        recipe("none")
    complaints: list[str] = []
    assert [row.name for row in method_table(complaints.append)] == [*TABLE, "fine"]
    assert [complaint.split("'")[1] for complaint in complaints] == ["broken", "none"]
    with pytest.raises(DeatError, match="broken"):
        method_table()
