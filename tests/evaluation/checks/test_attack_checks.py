"""Checks of the attacks' results."""

from __future__ import annotations

from collections.abc import Callable

import masked_models as masked
import pytest
import torch
from check_reports import checked, flagged, natural, report_of
from masked_models import EPS, held_out, plain, robust
from torch import Tensor, nn
from training_problems import images_and_labels as coloured
from training_problems import used

from deat_rb.evaluation.checks.registry import run_checks
from deat_rb.evaluation.report import Check, CurvePoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "inside"),
    [("quantised", plain), ("decoy", plain), ("reversed", plain), ("shattered", plain), ("decoy", robust)],
)
def test_square_finds_masked_gradients(kind: str, inside: Callable[[], nn.Module]) -> None:
    wrapper = {"quantised": masked.Quantised, "decoy": masked.Decoy, "reversed": masked.Reversed,
               "shattered": masked.Shattered}[kind]  # fmt: skip
    checks = checked(wrapper(inside()), level="full")
    assert checks["Square finds no more"].status == "fail"
    assert checks["PGD near AutoAttack"].status == "fail"


def test_pgd_near_autoattack_finds_saturated_logits() -> None:
    checks = checked(masked.Saturated(plain()), level="full")
    assert checks["PGD near AutoAttack"].figure == pytest.approx(92, abs=8), "PGD on the cross-entropy finds nothing"
    assert checks["PGD near AutoAttack"].status == "fail"


def test_pgd_below_fgsm_finds_shattered_gradients() -> None:
    assert "PGD <= FGSM" in flagged(checked(masked.Shattered(plain()), level="full"))


class Rough(nn.Module):
    """Predicts class 1 if neighboring pixels differ by more than 0.05, and has a gradient that darkens all of them."""

    def forward(self, images: Tensor) -> Tensor:
        rough = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
        return torch.stack([0.05 + 0.01 * images.mean(dim=(1, 2, 3)), rough], dim=1)


@pytest.mark.parametrize(("correct", "status"), [(4, "warn"), (5, "fail")])
def test_noise_below_fgsm_finds_gradients_of_little_use(correct: int, status: str) -> None:
    """Of 100 flat images some have class 0: they stay flat under FGSM, but noise changes all predictions."""
    images, labels = torch.full((100, 1, 8, 8), 0.5), (torch.arange(100) >= correct).long()
    report = report_of(natural(Rough(), images, labels))
    checks = run_checks(Rough(), images, labels, report, level="quick", eps=EPS)
    found = next(check for check in checks if check.name == "FGSM <= noise")
    assert found.status == status
    assert found.figure == pytest.approx(correct)
    assert "FGSM <= noise" in flagged(checked(masked.Reversed(plain()), count=100))


def test_converged_finds_pgd_with_too_few_steps() -> None:
    images, labels = held_out(64)
    correct = natural(plain(), images, labels)["natural"]
    report = report_of({"natural": correct, "pgd-20": correct})
    checks = {c.name: c for c in run_checks(plain(), images, labels, report, level="full", eps=EPS)}
    assert checks["PGD converged"].status == "fail"
    assert checks["PGD converged"].figure == pytest.approx(100 * float(correct.float().mean()), abs=5)


def shares(**robust_counts: int) -> dict[str, Tensor]:
    """Verdicts on 1000 examples: so many of the first ones are correct."""
    return {name.replace("_", "-"): torch.arange(1000) < count for name, count in robust_counts.items()}


@pytest.mark.parametrize(
    ("name", "verdicts", "figure", "status"),
    [
        ("PGD <= FGSM", shares(natural=900, fgsm=500, pgd_20=505), 0.5, "pass"),
        ("PGD <= FGSM", shares(natural=900, fgsm=500, pgd_20=510), 1.0, "warn"),
        ("PGD <= FGSM", shares(natural=900, fgsm=500, pgd_20=530), 3.0, "fail"),
        ("PGD near AutoAttack", shares(natural=900, pgd_50=580, autoattack=500), 8.0, "pass"),
        ("PGD near AutoAttack", shares(natural=900, pgd_50=590, pgd_10=700, autoattack=500), 9.0, "warn"),
        ("PGD near AutoAttack", shares(natural=900, pgd_50=700, autoattack=500), 20.0, "fail"),
        ("AutoAttack <= others", shares(natural=900, pgd_50=500, autoattack=500), 0.0, "pass"),
        ("AutoAttack <= others", shares(natural=900, pgd_50=500, autoattack=515), 1.5, "warn"),
        ("AutoAttack <= others", shares(natural=900, pgd_50=500, autoattack=600), 10.0, "fail"),
        ("Square finds no more", shares(natural=900, pgd_50=500, square=498), 0.2, "pass"),
        ("Square finds no more", shares(natural=900, pgd_50=500, square=497), 0.3, "warn"),
        ("Square finds no more", shares(natural=900, pgd_50=500, cw_20=498, square=470), 2.8, "fail"),
        ("clean >= robust", shares(natural=900, fgsm=900), 0.0, "pass"),
        ("clean >= robust", shares(natural=900, fgsm=901), 0.1, "fail"),
    ],
)
def test_attack_checks_compare_accuracies_of_the_report(
    name: str, verdicts: dict[str, Tensor], figure: float, status: str
) -> None:
    images, labels = coloured(8)
    report = report_of(verdicts)
    found = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=8 / 255)}[name]
    assert found.figure == pytest.approx(figure)
    assert found.status == status
    assert f"{figure:.1f}" in found.sentence


def test_square_no_better_reads_autoattacks_stages() -> None:
    images, labels = coloured(8)
    for before, figure, status in ((402, 0.2, "pass"), (410, 1.0, "warn"), (430, 3.0, "fail")):
        report = report_of(shares(natural=900, autoattack=400))
        parts = {"apgd-ce": 500, "apgd-t": before, "fab-t": before, "square": 400}
        report.results["autoattack"] = report.results["autoattack"].model_copy(update={"parts": parts})
        checks = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=8 / 255)}
        found = checks["Square finds no more"]
        assert found.figure == pytest.approx(figure)
        assert found.status == status


@pytest.mark.parametrize(
    ("worst", "figure", "status"), [((0.9, 0.5, 0.1), -40.0, "pass"), ((0.9, 0.1, 0.2), 10.0, "fail")]
)
def test_falls_with_eps_reads_the_curve(worst: tuple[float, ...], figure: float, status: str) -> None:
    images, labels = coloured(8)
    curve = tuple(
        CurvePoint(eps=eps, n_correct={}, accuracy={}, worst_case=accuracy)
        for eps, accuracy in zip((0.1, 0.2, 0.4), worst, strict=True)
    )
    report = report_of(shares(natural=900), curve=curve)
    checks = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=8 / 255)}
    found = checks["accuracy decreases with eps"]
    assert found.figure == pytest.approx(figure)
    assert found.status == status


def test_no_change_at_zero_reads_the_curve() -> None:
    images, labels = coloured(8)
    curve = (CurvePoint(eps=0.0, n_correct={}, accuracy={}, worst_case=0.4),)
    report = report_of(shares(natural=900), curve=curve)
    checks = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=8 / 255)}
    assert checks["no change at eps 0"].figure == pytest.approx(50)
    assert checks["no change at eps 0"].status == "fail"


def with_images(**made: Tensor) -> dict[str, Check]:
    """Checks a report of the robust network that holds these adversarial images, and their verdicts."""
    images, labels = held_out(10)
    verdicts = natural(robust(), images, labels)
    for name, adv in made.items():
        verdicts |= {name: natural(robust(), adv.nan_to_num(), labels)["natural"]}
    report = report_of(verdicts)
    report._adversarial.update(made)
    return {c.name: c for c in run_checks(robust(), images, labels, report, level="quick", eps=EPS)}


@pytest.mark.slow
def test_admissible_accepts_images_at_eps() -> None:
    images, _ = held_out(10)
    checks = with_images(pgd=(images + EPS + 9e-7).clamp(0, 1))
    assert (checks["adversarial images within eps"].status, checks["verdicts reproduced"].status) == ("pass", "pass")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images: images + EPS + 1e-3,
        lambda images: (images - EPS - 1e-5).clamp(0, 1),
        lambda images: images.index_fill(0, torch.tensor([3]), float("nan")),
        lambda images: images.index_fill(0, torch.tensor([3]), float("-inf")),
        lambda images: images - 0.1,
    ],
)
def test_admissible_finds_one_image_outside(spoil: Callable[[Tensor], Tensor]) -> None:
    images, _ = held_out(10)
    checks = with_images(fgsm=images, pgd=spoil(images))
    found = checks["adversarial images within eps"]
    assert found.status == "fail"
    assert found.figure is not None
    assert found.figure > 1e-6


def test_reproduced_finds_a_wrong_verdict() -> None:
    images, labels = held_out(10)
    verdicts = natural(robust(), images, labels)
    right = int(verdicts["natural"].nonzero()[0])
    wrong = verdicts["natural"].clone()
    wrong[right] = False
    report = report_of(verdicts | {"pgd": wrong})
    report._adversarial["pgd"] = images
    checks = {c.name: c for c in run_checks(robust(), images, labels, report, level="quick", eps=EPS)}
    assert (checks["verdicts reproduced"].status, checks["verdicts reproduced"].figure) == ("fail", 10.0)
