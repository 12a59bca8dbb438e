"""Training in L2: attacks, l_X, validation, and a run that is evaluated and exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from click.testing import CliRunner
from small_problems import Plane, plane_images
from small_runs import SMALL
from torch import Tensor, nn
from torch.optim import SGD
from training_problems import images_and_labels, made

import deat_rb
from deat_rb.attacks.gradient_probe import lipschitz_lower_bound
from deat_rb.attacks.threat_models import L2
from deat_rb.cli import main
from deat_rb.eval_target import open_target
from deat_rb.methods import registry
from deat_rb.methods.describe import describe
from deat_rb.methods.recipes import Recipe
from deat_rb.robustbench.export import export
from deat_rb.runs.options import make_options
from deat_rb.runs.resolution import resolve
from deat_rb.runs.train import train
from deat_rb.training.validation import validate
from deat_rb.utils.errors import DeatError

ROWS = ["free-3", "deat-2", "m-deat", "pgd-3", "m+pgd", "u-fgsm", "m+u-fgsm", "n-fgsm", "m+n-fgsm", "fat-3", "trades",
        "f+trades", "m+trades", "mart", "f+mart", "m+mart", "amata-2-3", "yopo-2-2"]  # fmt: skip


def lengths(delta: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_in_l2_with_its_ratio_of_alpha_to_eps(name: str) -> None:
    trainer, linf = deat_rb.create(name, made(), norm="L2"), deat_rb.create(name, made())
    assert (trainer.norm, trainer.eps) == ("L2", 0.5)
    assert trainer.base_alpha is not None
    assert linf.base_alpha is not None
    assert trainer.base_alpha / 0.5 == pytest.approx(linf.base_alpha * 255 / 8)
    images, labels = images_and_labels()
    torch.manual_seed(0)
    moved = lengths(trainer(images, labels) - images)
    # N-FGSM's start has up to twice eps, and its step has eps.
    assert 0.05 < float(moved.max()) <= (1.5 if "n-fgsm" in name else 0.5) + 1e-5
    stats = trainer.training_step(images, labels, SGD(trainer.model.parameters(), lr=0.1))
    assert math.isfinite(float(stats.loss))
    assert float(stats.l_x) > 0


def test_pgd_equals_torchattacks_pgdl2() -> None:
    model = made().double()
    images, labels = images_and_labels(7)
    images = images.double()
    ours = deat_rb.PGD(model, norm="L2", eps=0.5, alpha=0.15, steps=5, start="none", attack_mode="eval")
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.15, steps=5, random_start=False)
    adv = ours(images, labels)
    assert float(lengths(adv - images).max()) > 0.3
    torch.testing.assert_close(adv, theirs(images, labels), rtol=0, atol=1e-8)


def test_training_noise_has_lengths_from_zero_to_the_radius() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = lengths(L2.training_noise(torch.zeros(400, 3, 8, 8), 0.5))
    # U(0, 0.5): mean 0.25, standard deviation 0.144, of 400 draws 0.0072
    assert found.max() <= 0.5 + 1e-6
    assert float(found.mean()) == pytest.approx(0.25, abs=0.03)
    assert found.min() < 0.02


@pytest.mark.parametrize("name", ["pgd-1", "fat-1", "free-1", "torchattacks"])
def test_l_x_is_the_sum_of_l2_norms(name: str) -> None:
    """A plane's gradient is w sigmoid(-+ margin), and ||w||_2 = sqrt(1 + 4 + 9 + 16)."""
    images, labels, _ = plane_images()
    model = Plane()
    if name == "torchattacks":
        attack = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=1, random_start=False)
        trainer: Any = deat_rb.AttackTrainer(attack)
    else:
        trainer = deat_rb.create(name, model, norm="L2", eps=0.5)
        trainer.crafter.start = "none"
    assert trainer.norm == "L2"
    stats = trainer.training_step(images, labels, SGD(model.parameters(), lr=0.0))
    margins = images.flatten(1) @ torch.tensor([1.0, -2.0, 3.0, -4.0]) + 1
    norms = math.sqrt(30) * torch.sigmoid(torch.where(labels == 0, -margins, margins))
    assert float(stats.l_x) == pytest.approx(float(norms.sum()), rel=1e-5)


def test_lipschitz_lower_bound_in_l2_by_hand() -> None:
    """48 / (4 examples * 2 * 0.5): the distances of the proof are 0.5, whatever the images' size."""
    assert lipschitz_lower_bound(48.0, examples=4, eps=0.5, size=3072, norm="L2") == pytest.approx(12)


def test_validate_in_l2_by_hand() -> None:
    """The margins 0.3 and 0.65 of 3 x + 4 y are at distances of 0.06 and 0.13 in L2, 0.043 and 0.093 in Linf."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        linear.bias.copy_(torch.tensor([-3.5, 0.0]))
    model = nn.Sequential(nn.Flatten(), linear)
    images = torch.tensor([[0.6, 0.5], [0.5, 0.5 + 0.65 / 4]]).view(2, 1, 1, 2)
    labels = torch.zeros(2, dtype=torch.long)
    assert validate(model, images, labels, eps=0.1, norm="L2").robust == 0.5
    assert validate(model, images, labels, eps=0.1).robust == 0


def test_describe_names_the_norm() -> None:
    assert describe("pgd-7", norm="L2").attack == "7 steps of 0.125, uniform start, in L2"
    assert describe("pgd-7", norm="Linf") == describe("pgd-7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "unknown norm 'L1': choose one of Linf, L2"),
        ({"norm": "L2", "eps": 0}, "eps = 0 is not a positive L2 distance; give one such as 0.5"),
        ({"norm": "L2", "eps": float("inf")}, "eps = inf is not a positive L2 distance"),
        ({"norm": "L2", "alpha": -1}, "alpha = -1 is not a positive number"),
        ({"norm": "Linf", "eps": 2}, r"eps = 2 is outside \(0, 1\]"),
    ],
)
def test_create_refuses_what_is_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-7", made(), **options)
    assert deat_rb.create("pgd-7", made(), norm="L2", eps=8, alpha=2).eps == 8


def test_create_refuses_an_attack_without_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"mine": Recipe(attack=torchattacks.FGSM, steps=0)})
    assert deat_rb.create("mine", made(), norm="Linf").norm == "Linf"
    with pytest.raises(DeatError, match="the attack of the method mine is in Linf only: omit norm = L2"):
        deat_rb.create("mine", made(), norm="L2")


class OwnL2(torchattacks.PGDL2):
    """Derived from an attack in L2."""


@pytest.mark.parametrize("attack", [torchattacks.PGDL2, torchattacks.PGDRSL2, OwnL2])
def test_methods_with_an_attack_in_l2_are_in_l2(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"mine": Recipe(attack=attack, steps=3, alpha=2 / 255)})
    trainer = deat_rb.create("mine", made())
    assert (trainer.norm, trainer.eps) == ("L2", 0.5)
    assert trainer.alpha == pytest.approx(0.125)
    resolved = resolve(make_options({"method": "mine"})).attack
    assert (resolved.norm, resolved.eps) == ("L2", 0.5)
    assert deat_rb.create("mine", made(), norm="L2", eps=1).eps == 1
    with pytest.raises(DeatError, match="the attack of the method mine is in L2 only: omit norm = Linf"):
        deat_rb.create("mine", made(), norm="Linf")
    with pytest.raises(DeatError, match="the attack of the method mine is in L2 only: omit norm = Linf"):
        resolve(make_options({"method": "mine", "norm": "Linf"}))


def test_methods_take_the_norm_of_their_attack_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"mine": Recipe(steps=3, attack_options={"norm": "L2"})})
    trainer, linf = deat_rb.create("mine", made()), deat_rb.create("mine", made(), norm="Linf")
    assert (trainer.norm, trainer.eps) == ("L2", 0.5)
    assert (linf.norm, linf.eps) == ("Linf", 8 / 255)
    assert resolve(make_options({"method": "mine", "norm": "Linf"})).attack.norm == "Linf"


def test_methods_refuse_an_attack_whose_norm_only_its_instances_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def attack(model: nn.Module, eps: float, alpha: float, steps: int) -> Any:
        return torchattacks.PGDL2(model, eps=eps, alpha=alpha, steps=steps)

    monkeypatch.setattr(registry, "_registered", {"mine": Recipe(attack=attack)})
    with pytest.raises(
        DeatError, match="attack of the method mine is in L2, not in Linf: give its class the attribute"
    ):
        deat_rb.create("mine", made())
    monkeypatch.setattr(attack, "norm", "L2", raising=False)
    assert deat_rb.create("mine", made()).eps == 0.5


@pytest.mark.slow
def test_a_run_in_l2_is_validated_evaluated_and_exported_in_l2(tmp_path: Path) -> None:
    options = {**SMALL, "arch": "wrn-10-1", "epochs": 1, "norm": "L2"}
    del options["eps"]
    run, history = train(make_options(options), output=tmp_path)
    assert (run.config.attack.norm, run.config.attack.eps) == ("L2", 0.5)
    assert history.rows[0].alpha == pytest.approx(0.125)
    result = CliRunner().invoke(main, ["eval", str(run.path), "--attacks", "pgd-2", "--n-examples", "8", "--checks",
                                       "none", "--no-page"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "L2, eps 0.5" in result.output
    paths = export(run.path, model_name="Wang2021Gradient_L2", output=tmp_path / "exported", as_dataset="cifar10")
    assert paths.info == tmp_path / "exported" / "model_info" / "cifar10" / "L2" / "Wang2021Gradient_L2.json"
    assert "\nl2 = OrderedDict" in paths.source.read_text()
    import robustbench

    names = deat_rb.register(tmp_path / "exported")
    assert names == ("Wang2021Gradient_L2",)
    loaded = robustbench.load_model(names[0], model_dir=tmp_path / "exported" / "models", threat_model="L2")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), open_target(run.path).model(images), rtol=0, atol=1e-5)
