"""The registry of methods: rows, names, overrides, and registered methods."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from paper_table import TABLE
from small_problems import Plane
from torch import nn
from torch.optim import SGD
from training_problems import begin

from deat_rb.attacks import losses
from deat_rb.attacks.pgd import PGD
from deat_rb.methods import registry
from deat_rb.methods.describe import describe, explain, method_table
from deat_rb.methods.recipes import Recipe
from deat_rb.methods.registry import create, known_methods, recipe, register_method
from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
from deat_rb.methods.shared_forward import SharedForwardTrainer
from deat_rb.methods.stopping import GradientRatio
from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer
from deat_rb.methods.yopo import YopoTrainer
from deat_rb.training.metrics import EpochStats
from deat_rb.training.schedule import Schedule
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("name", TABLE)
def test_create_builds_the_row(name: str) -> None:
    kind, steps, alpha, start, craft, tau, mode, loss, schedule, numbers, stopping, stop_numbers, epochs = TABLE[name]
    model = Plane().train()
    trainer = create(name, model)
    attack = trainer.crafter
    assert trainer.attack == name
    assert isinstance(attack, PGD)
    if isinstance(trainer, ReplayTrainer):
        assert kind == ("carried" if trainer.carry else "replay")
    else:
        assert isinstance(trainer, {"shared": SharedForwardTrainer, "yopo": YopoTrainer}.get(kind, AttackTrainer))
    assert (trainer.steps, attack.steps) == (steps, steps)
    assert trainer.base_alpha == pytest.approx(alpha / 255)
    assert attack.eps == pytest.approx(8 / 255)
    assert (attack.start, attack.loss, attack.tau) == (start, craft, tau)
    attack.enter_mode()
    assert model.training == (mode == "train")
    assert trainer.loss.name == loss
    assert type(trainer.schedule) is schedule
    assert {key: getattr(trainer.schedule, key) for key in numbers} == numbers
    assert (type(trainer.stopping) if trainer.stopping else None) is stopping
    assert {key: getattr(trainer.stopping, key) for key in stop_numbers} == stop_numbers
    row = recipe(name)[1]
    assert row.fast_epochs == epochs
    assert row.guided == (schedule is GradientMagnitude)


def test_known_methods_are_the_papers_in_its_order_and_then_the_others() -> None:
    assert known_methods() == list(TABLE)
    assert [row.name for row in method_table()] == list(TABLE)


@pytest.mark.parametrize(("name", "largest"), [("m-deat", 8), ("m+pgd", 7), ("m+trades", 10), ("m+mart", 10)])
def test_alpha_of_guided_methods_is_at_least_eps_over_r(name: str, largest: int) -> None:
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
def test_beta_is_six_by_default(name: str, clean: float, missed: float) -> None:
    # Clean prediction (3/4, 1/4), adversarial (1/2, 1/2), label 0; KL = 3/4 ln 3 - ln 2.
    sure, unsure, label = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    kl = 0.75 * math.log(3) - math.log(2)
    for prefix in ("", "f+", "m+"):
        found = create(prefix + name, Plane()).loss.function(unsure, label, sure)
        assert found.item() == pytest.approx(clean + 6 * kl * missed, rel=1e-5)
    half = create(name, Plane(), beta=3.0).loss.function(unsure, label, sure)
    assert half.item() == pytest.approx(clean + 3 * kl * missed, rel=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_training_step_updates_the_weights_of_every_method(name: str, tiny_model: nn.Module) -> None:
    trainer = create(name, tiny_model.train())
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    begin(trainer, images)
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
def test_recipe_reads_names_as_the_paper_writes_them(written: str, canonical: str) -> None:
    assert recipe(written)[0] == canonical
    assert create(written, Plane()).attack == canonical


def test_recipe_takes_the_number_from_the_name() -> None:
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
def test_recipe_suggests_the_nearest_name(wrong: str, meant: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"there is no method '{wrong}': did you mean ")) as error:
        recipe(wrong)
    assert f"'{meant}'" in str(error.value)


def test_create_lists_all_names_when_none_is_near() -> None:
    with pytest.raises(
        DeatError,
        match=r"no method 'zzzzzzzz': choose one of standard, free-8, .*, m\+mart, n-fgsm, .*, fgsm-pgi, liet$",
    ):
        create("zzzzzzzz", Plane())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("free-0", "method 'free-0': 0 is out of range for free-R (1 to 1000); the paper has free-8"),
        ("deat-0", "method 'deat-0': 0 is out of range for deat-D (1 to 1000); the paper has deat-3"),
        ("deat-100%", "method 'deat-100%': 100 is out of range for deat-P% (1 to 99); the paper has deat-40%"),
        ("deat-0%", "method 'deat-0%': 0 is out of range for deat-P% (1 to 99); the paper has deat-40%"),
        ("pgd-1001", "method 'pgd-1001': 1001 is out of range for pgd-N (1 to 1000); the paper has pgd-7"),
        ("amata-2-0", "method 'amata-2-0': 0 is out of range for amata-K-L (1 to 1000); the paper has amata-2-10"),
        ("yopo-5-0", "method 'yopo-5-0': 0 is out of range for yopo-m-n (1 to 1000); the paper has yopo-5-3"),
        ("amata-9-2", "method 'amata-9-2': the number of steps cannot fall from 9 to 2"),
    ],
)
def test_recipe_refuses_a_number_out_of_range(wrong: str, message: str) -> None:
    with pytest.raises(DeatError, match=f"^{re.escape(message)}$"):
        recipe(wrong)


# ------------------------------------------------------------------------------------------------ one's own


@pytest.mark.parametrize(
    "eps", ["4/255", " 4 / 255 ", "0.01568627450980392", np.float32(4 / 255), torch.tensor(4 / 255)]
)
def test_create_reads_eps_and_alpha_as_text(eps: Any) -> None:
    trainer = create("pgd-7", Plane(), eps=eps, alpha="3/255")
    assert (trainer.crafter.eps, trainer.base_alpha) == (pytest.approx(4 / 255), 3 / 255)


@pytest.mark.parametrize("method", ["pgd-7", "trades", "m-deat"])
def test_create_attacks_a_frozen_model_that_fit_then_refuses(method: str) -> None:
    frozen = Plane().requires_grad_(False).eval()
    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    trainer = create(method, frozen, eps=0.1)
    assert 0 < float((trainer(images, labels) - images).abs().max()) <= 0.1 + 1e-6
    with pytest.raises(DeatError, match=r"all parameters of the model are frozen \(requires_grad is False\)"):
        trainer.fit([(images, labels)], epochs=1)


def test_create_refuses_a_model_without_weights() -> None:
    with torch.inference_mode():
        created_in_inference_mode = Plane()
    cases: list[tuple[Any, str]] = [
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), "the model has lazy layers without weights: forward one batch"),
        (created_in_inference_mode, r"the model was created inside torch\.inference_mode\(\)"),
        (lambda images: images, r"the model must be a torch\.nn\.Module that returns logits, not a function"),
        ("resnet18", r"the model must be a torch\.nn\.Module that returns logits, not a str"),
    ]
    for model, message in cases:
        with pytest.raises(DeatError, match=message):
            create("pgd-7", model)


def test_register_method_adds_a_row() -> None:
    register_method("  Mine ", Recipe(steps=2, alpha=4 / 255))
    assert known_methods() == [*TABLE, "mine"]
    assert recipe("MINE")[0] == "mine"
    trainer = create("mine", Plane(), steps=3)
    assert (trainer.attack, trainer.steps, trainer.base_alpha) == ("mine", 3, 4 / 255)
    row = method_table()[-1]
    assert (row.name, row.attack, row.loss, row.schedule) == (
        "mine",
        "2 steps of 4/255, uniform start",
        "CE",
        "constant",
    )
    assert (row.stop, row.cost, row.paper) == ("-", "(2 + 1)MT", "-")
    assert explain("mine").startswith("mine: constant")


def test_register_method_takes_a_loss_and_a_trainer_of_ones_own() -> None:
    class Halves(AttackTrainer):
        pass

    own = SurrogateLoss("half", lambda logits, labels: losses.cross_entropy(logits, labels) / 2)
    register_method("halves", Recipe(steps=1, loss=own, trainer=Halves, stopping=GradientRatio))
    trainer = create("halves", Plane())
    assert type(trainer) is Halves
    assert trainer.loss is own
    assert describe("halves").loss == "half"
    assert "Halves" in explain("halves")
    with pytest.raises(DeatError, match="the method halves has no parameter beta"):
        create("halves", Plane(), beta=2.0)


@pytest.mark.parametrize("taken", ["trades", "M+TRADES", "pgd-7", "pgd-10", "Trade", "deat-55%"])
def test_register_method_refuses_the_papers_names(taken: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"the method '{taken.lower()}' already exists; register yours")):
        register_method(taken, Recipe())


def test_register_method_refuses_a_second_row_of_one_name() -> None:
    register_method("mine", Recipe())
    with pytest.raises(DeatError, match="the method 'mine' already exists"):
        register_method("Mine", Recipe())


@pytest.mark.parametrize("name", ["x/y", "..", ".hidden", "", "two words", "ümlaut"])
def test_register_method_refuses_names_unfit_for_a_directory(name: str) -> None:
    with pytest.raises(DeatError, match=re.escape(f"invalid method name '{name}': use a letter or digit")):
        register_method(name, Recipe())


def test_recipe_reads_deat_p_as_forty_percent() -> None:
    assert recipe("DEAT-P%")[0] == recipe("deat-%")[0] == "deat-40%"


def test_register_method_takes_attacks_of_torchattacks(tiny_model: nn.Module) -> None:
    register_method("one", Recipe(attack=torchattacks.FFGSM, alpha=10 / 255))
    register_method("auto", Recipe(attack=torchattacks.APGD, steps=3, attack_options={"loss": "dlr"}))
    one, auto = create("one", tiny_model, eps=0.1, alpha=0.2), create("auto", tiny_model, steps=4)
    assert (one.crafter.alpha, one.steps) == (0.2, 1)
    assert (auto.crafter.steps, auto.base_alpha) == (4, None)
    with pytest.raises(DeatError, match="the method one has no parameter steps"):
        create("one", tiny_model, steps=2)
    with pytest.raises(DeatError, match="the method auto has no parameter alpha"):
        create("auto", tiny_model, alpha=0.1)
    register_method("led", Recipe(attack=torchattacks.FFGSM, schedule=GradientMagnitude))
    with pytest.raises(DeatError, match="FFGSM has no steps that a schedule could set"):
        create("led", tiny_model)
    register_method("square", Recipe(attack=torchattacks.Square, attack_options={"queries": 5}))
    with pytest.raises(DeatError, match="the attack of the method square cannot be created from a model, eps="):
        create("square", tiny_model)


def test_register_method_takes_a_schedule_of_ones_own() -> None:
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


def test_entry_points_are_methods_and_broken_ones_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(DeatError, match=r"the entry point elsewhere:ROW of the method 'none' is not a deat_rb\.me"):
        recipe("none")
    complaints: list[str] = []
    assert [row.name for row in method_table(complaints.append)] == [*TABLE, "fine"]
    assert [complaint.split("'")[1] for complaint in complaints] == ["broken", "none"]
    with pytest.raises(DeatError, match="broken"):
        method_table()
