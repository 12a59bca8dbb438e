"""The checks: honest networks pass them, and every way of hiding from attacks is called by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import masked_models as masked
import pytest
import torch
from masked_cases import HIDING
from masked_models import EPS, held_out, plain, robust
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn
from training_problems import Snapshot, used
from training_problems import images_and_labels as coloured

from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.checks.registry import CHECKS, run_checks
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import AttackResult, Check, CurvePoint, Report
from deat_rb.utils.errors import DeatError


def report_of(verdicts: dict[str, Tensor], *, eps: float = EPS, **fields: Any) -> Report:
    results = [
        AttackResult.of(name, correct, seconds=1.0, forwards=1, backwards=1, parameters=_parameters(name))
        for name, correct in verdicts.items()
    ]
    known: dict[str, Any] = {"num_classes": 10, "seed": 0, "batch_size": 64, "device": "cpu", "versions": {}}
    return Report.of(results, verdicts, eps=eps, **{**known, **fields})


def _parameters(name: str) -> dict[str, bool | int | float | str]:
    return {"steps": int(name.removeprefix("pgd-"))} if name.startswith("pgd-") else {}


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"natural": model(images).argmax(dim=1) == labels}


def checked(model: nn.Module, *, level: str = "quick", count: int = 64, **options: Any) -> dict[str, Check]:
    """The checks by name, of an evaluation that only measured the natural accuracy."""
    images, labels = held_out(count)
    report = report_of(natural(model, images, labels))
    checks = run_checks(model, images, labels, report, **{"level": level, "eps": EPS, **options})
    return {check.name: check for check in checks}


def flagged(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status != "pass"}


@cache
def evaluated(network: Callable[[], nn.Module]) -> Report:
    images, labels = held_out(200)
    attacks = "noise-uniform,fgsm,pgd-20,cw-20"
    return evaluate(network(), images, labels, attacks=attacks, eps=EPS, batch_size=200)


# Honest networks


def test_run_checks_robust_network_passes() -> None:
    images, labels = held_out(200)
    report = evaluated(robust)
    assert 0.4 < report.worst_case.accuracy < 0.7, "robust to a degree, so that there is something to be suspicious of"
    checks = {check.name: check for check in run_checks(robust(), images, labels, report, level="full", eps=EPS)}
    assert flagged(checks) == set()
    assert checks.keys() == CHECKS.keys() - {"AutoAttack <= others"} | {"skipped"}
    assert "AutoAttack <= others" in checks["skipped"].sentence


def test_run_checks_plain_network_passes() -> None:
    report = evaluated(plain)
    assert report.results["natural"].accuracy > 0.9
    assert report.worst_case.accuracy <= 0.02
    images, labels = held_out(200)
    assert {check.status for check in run_checks(plain(), images, labels, report, level="quick", eps=EPS)} == {"pass"}


# Networks that hide


@pytest.mark.parametrize("kind", HIDING)
def test_run_checks_quick_finds_gradient_masking(kind: str) -> None:
    network, expected = HIDING[kind]
    checks = checked(network())
    assert expected <= flagged(checks)
    assert all(checks[name].status == "fail" for name in expected), {name: checks[name] for name in expected}


@pytest.mark.parametrize("kind", ["quantised", "decoy", "reversed", "shattered"])
@pytest.mark.parametrize("inside", [plain, robust])
def test_square_finds_masked_gradients(kind: str, inside: Callable[[], nn.Module]) -> None:
    wrapper = {"quantised": masked.Quantised, "decoy": masked.Decoy, "reversed": masked.Reversed,
               "shattered": masked.Shattered}[kind]  # fmt: skip
    checks = checked(wrapper(inside()), level="full")
    assert checks["Square finds no more"].status == "fail"
    assert checks["PGD near AutoAttack"].status == "fail"


def test_pgd_near_autoattack_finds_saturated_logits() -> None:
    checks = checked(masked.Saturated(plain()), level="full")
    assert checks["PGD near AutoAttack"].figure == pytest.approx(92, abs=8), "PGD on the cross-entropy breaks nothing"
    assert checks["PGD near AutoAttack"].status == "fail"


def test_pgd_below_fgsm_finds_shattered_gradients() -> None:
    assert "PGD <= FGSM" in flagged(checked(masked.Shattered(plain()), level="full"))


@pytest.mark.parametrize("kind", ["saturated", "quantised", "decoy", "reversed", "shattered", "not a number"])
def test_masked_networks_do_mask_gradients(kind: str) -> None:
    """Else the tests above would show nothing: PGD leaves much of what it breaks in the network inside."""
    images, labels = held_out(64)
    left = {}
    for name, model in {"inside": plain(), "outside": HIDING[kind][0]().eval()}.items():
        probe = Probe(model, images, labels, eps=EPS, norm="Linf", batch_size=64, seed=0)
        left[name] = float((~probe.pgd(torch.arange(64), eps=EPS, steps=20)).float().mean())
    assert left["inside"] < 0.05
    assert left["outside"] > 0.6


def test_noise_below_fgsm_finds_reversed_gradients() -> None:
    found = checked(masked.Reversed(plain()), count=100)["FGSM <= noise"]
    assert found.status == "warn"
    assert found.figure == pytest.approx(4)


def test_converged_finds_pgd_with_too_few_steps() -> None:
    images, labels = held_out(64)
    preserve_state = natural(plain(), images, labels)["natural"]
    report = report_of({"natural": preserve_state, "pgd-20": preserve_state})
    checks = {c.name: c for c in run_checks(plain(), images, labels, report, level="full", eps=EPS)}
    assert checks["PGD converged"].status == "fail"
    assert checks["PGD converged"].figure == pytest.approx(100 * float(preserve_state.float().mean()), abs=5)


def test_bf16_agrees_finds_predictions_that_depend_on_rounding() -> None:
    """To 1000 bfloat16 adds in steps of 4 or 8."""
    lifted = nn.Linear(10, 10)
    with torch.no_grad():
        lifted.weight.copy_(torch.eye(10))
        lifted.bias.fill_(1000)
    checks = checked(nn.Sequential(plain(), lifted))
    assert flagged(checks) == {"bf16 agrees with fp32"}


# What the figures of a report say


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


def test_run_checks_skips_square_on_small_images_in_l2() -> None:
    images, labels, _ = plane_images()
    report = evaluate(Plane(), images, labels, attacks="pgd-2", eps=0.1, norm="L2", checks="full")
    assert "Square finds no more; " in next(c for c in report.checks if c.name == "skipped").sentence


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


@pytest.mark.parametrize(
    ("eps", "status"),
    [(8 / 255, "pass"), (0.031, "warn"), (0.0157, "warn"), (0.03, "pass"), (0.1, "pass"), (0.3, "pass"), (0.5, "pass")],
)
def test_eps_in_255ths_finds_rounded_decimals(eps: float, status: str) -> None:
    images, labels = coloured(4)
    report = report_of(natural(used(), images, labels), eps=eps)
    checks = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=eps)}
    assert checks["eps in 255ths"].status == status
    assert checks["eps in 255ths"].figure == pytest.approx(255 * eps)
    assert ("8/255" in checks["eps in 255ths"].sentence) == (eps in (8 / 255, 0.031))


# Adversarial images


def with_images(**made: Tensor) -> dict[str, Check]:
    """Checks a report of the robust network that holds these adversarial images, and their verdicts."""
    images, labels = held_out(10)
    verdicts = natural(robust(), images, labels)
    for name, adv in made.items():
        verdicts |= {name: natural(robust(), adv.nan_to_num(), labels)["natural"]}
    report = report_of(verdicts)
    report._adversarial.update(made)
    return {c.name: c for c in run_checks(robust(), images, labels, report, level="quick", eps=EPS)}


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


# The model and its images


def test_unchanged_finds_a_report_of_other_weights() -> None:
    images, labels = held_out(10)
    mine = evaluate(plain(), images, labels, attacks="natural", eps=EPS)
    own = {c.name: c.status for c in run_checks(plain(), images, labels, mine, level="quick", eps=EPS)}
    other = {c.name: c.status for c in run_checks(robust(), images, labels, mine, level="quick", eps=EPS)}
    assert (own["model unchanged"], other["model unchanged"]) == ("pass", "fail")


def test_in_range_finds_images_divided_by_255_twice() -> None:
    images, labels = held_out(16)
    report = report_of(natural(plain(), images / 255, labels))
    checks = {c.name: c for c in run_checks(plain(), images / 255, labels, report, level="quick", eps=EPS)}
    assert checks["images in [0, 1]"].status == "warn"
    assert checks["images in [0, 1]"].figure == pytest.approx(1 / 255)
    assert checks["normalization inside"].status == "fail", "the model does better on what was not divided"


def test_agreement_of_linear_networks() -> None:
    images, labels, _ = plane_images()

    def agreement(model: nn.Module) -> list[float]:
        probe = Probe(model, images, labels, eps=0.1, norm="Linf", batch_size=3, seed=0)
        return probe.agreement(8).tolist()

    assert agreement(Plane()) == pytest.approx([1] * 8, abs=1e-4)
    assert agreement(masked.Reversed(Plane())) == pytest.approx([-1] * 8, abs=1e-4)
    assert agreement(masked.Quantised(Plane(), 1000)) == [0] * 8


def test_probe_pgd_linear_model() -> None:
    images, labels, stays = plane_images()
    probe = Probe(Plane(), images, labels, eps=0.1, norm="Linf", batch_size=3, seed=0)
    assert torch.equal(~probe.pgd(torch.arange(8), eps=0.1, steps=8), stays)
    assert torch.equal(~probe.pgd(torch.tensor([6, 1, 4]), eps=0.1, steps=8, loss="margin"), stays[[6, 1, 4]])
    assert probe.pgd(torch.arange(0), eps=0.1, steps=8).tolist() == []


def test_probe_l2_steps_and_projection() -> None:
    images, labels = coloured(6)
    probe = Probe(used(), images, labels, eps=0.5, norm="L2", batch_size=4, seed=0)
    inside = 0.5 + 0.1 * (images - 0.5)
    steep = probe.steepest(torch.randn_like(images))
    assert probe.distances(inside + 0.3 * steep, inside).tolist() == pytest.approx([0.3] * 6, rel=1e-4)
    far = probe.projected(inside + 0.7 * steep, inside, 0.5)
    assert probe.distances(far, inside).tolist() == pytest.approx([0.5] * 6, rel=1e-4)


# The call itself


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_run_checks_leaves_the_model_unchanged(level: str, norm: str) -> None:
    model = used()
    images, labels = coloured(8)
    report = evaluate(model, images, labels, attacks="fgsm,pgd-2", eps=0.1, norm=norm)
    before, state = Snapshot(model), torch.get_rng_state()
    options: dict[str, Any] = {"level": level, "eps": 0.1, "norm": norm, "batch_size": 3}
    first = run_checks(model, images, labels, report, **options)
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)
    assert run_checks(model, images, labels, report, **options) == first


def test_run_checks_lists_skipped_checks() -> None:
    checks = checked(plain(), count=10)
    skipped = {
        "adversarial images within eps", "verdicts reproduced", "PGD <= FGSM", "PGD converged",
        "accuracy decreases with eps", "Square finds no more", "AutoAttack <= others", "PGD near AutoAttack",
    }  # fmt: skip
    assert skipped == CHECKS.keys() - checks.keys()
    assert checks["skipped"].figure == len(skipped)
    assert all(name in checks["skipped"].sentence for name in skipped)


def test_run_checks_sentences_are_single() -> None:
    for network, _ in HIDING.values():
        for check in checked(network(), count=10).values():
            assert check.sentence.endswith(".")
            assert "\n" not in check.sentence
            assert check.sentence.count(". ") == 0


def test_run_checks_quick_costs_a_fraction_of_pgd_20() -> None:
    images, labels = held_out(200)
    passes = {"forward": 0, "backward": 0}
    model = masked.Saturated(robust(), 1.0)

    def seen(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        passes["forward"] += len(output)
        passes["backward"] += len(output) if output.requires_grad else 0

    model.register_forward_hook(seen)
    report = evaluate(model, images, labels, attacks="fgsm,pgd-2,cw-2", eps=EPS)
    passes.update(forward=0, backward=0)
    run_checks(model, images, labels, report, level="quick", eps=EPS)
    pgd_20 = 200 * 20 * 3  # a backward pass costs about two forward ones
    assert passes["forward"] + 2 * passes["backward"] < pgd_20 / 3


def test_run_checks_reports_progress() -> None:
    told: list[tuple[str, int, int]] = []
    checked(plain(), count=4, progress=lambda *args: told.append(args))
    assert told == [(name, done, len(CHECKS)) for done, name in enumerate(CHECKS)]


def test_run_checks_level_none() -> None:
    assert checked(plain(), level="none") == {}


def test_run_checks_refuses_unknown_levels() -> None:
    with pytest.raises(DeatError, match=r"^--checks ful is unknown: did you mean 'full'\?$"):
        checked(plain(), level="ful")


def test_run_checks_refuses_images_outside_the_range() -> None:
    images, labels = batch_for(small_network())
    report = report_of({"natural": labels >= 0})
    with pytest.raises(DeatError, match=r"images must be in \[0, 1\]"):
        run_checks(small_network(), 2 * images, labels, report, level="quick", eps=EPS)
