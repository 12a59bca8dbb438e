"""The sanity checks as a whole: honest networks pass, masked gradients are found, the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import masked_models as masked
import pytest
import torch
from check_reports import checked, flagged, report_of
from masked_cases import HIDING
from masked_models import EPS, held_out, plain, robust
from short_autoattack import shorten
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn
from training_problems import Snapshot, used
from training_problems import images_and_labels as coloured

from deat_rb.evaluation.checks.context import CheckContext
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.checks.registry import CHECKS, run_checks
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.utils.errors import DeatError


@cache
def evaluated(network: Callable[[], nn.Module]) -> Report:
    images, labels = held_out(200)
    attacks = "noise-uniform,fgsm,pgd-20,cw-20"
    return evaluate(network(), images, labels, attacks=attacks, eps=EPS, batch_size=200)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", HIDING)
def test_run_checks_quick_finds_gradient_masking(kind: str) -> None:
    network, expected = HIDING[kind]
    checks = checked(network())
    assert expected <= flagged(checks)
    assert all(checks[name].status == "fail" for name in expected), {name: checks[name] for name in expected}


@pytest.mark.parametrize("kind", ["saturated", "quantised", "decoy", "reversed", "shattered", "not a number"])
def test_masked_networks_do_mask_gradients(kind: str) -> None:
    """The tests above need that: accuracy under PGD is high, and low for the network inside."""
    images, labels = held_out(64)
    left = {}
    for name, model in {"inside": plain(), "outside": HIDING[kind][0]().eval()}.items():
        probe = Probe(model, images, labels, eps=EPS, norm="Linf", batch_size=64, seed=0)
        left[name] = float((~probe.pgd(torch.arange(64), eps=EPS, steps=20)).float().mean())
    assert left["inside"] < 0.05
    assert left["outside"] > 0.6


def test_run_checks_skips_square_on_small_images_in_l2() -> None:
    images, labels, _ = plane_images()
    report = evaluate(Plane(), images, labels, attacks="pgd-2", eps=0.1, norm="L2", checks="full")
    assert "Square finds no more; " in next(c for c in report.checks if c.name == "skipped").sentence


@pytest.mark.slow
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
    calls: list[tuple[str, int, int]] = []
    checked(plain(), count=4, progress=lambda *args: calls.append(args))
    assert calls == [(name, done, len(CHECKS)) for done, name in enumerate(CHECKS)]


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


@pytest.mark.slow
def test_run_checks_accepts_wide_images_in_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square's tiles are square, and pyautoattack's search in L2 fails on images wider than high."""
    shorten(monkeypatch, iterations=5, queries=40)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 16, 3)).eval()
    images = torch.rand(6, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    labels = network(images).argmax(dim=1)
    report = evaluate(network, images, labels, attacks="square", eps=0.1, norm="L2", checks="full")
    names = [check.name for check in report.checks]
    assert "PGD near AutoAttack" in names


@pytest.mark.gpu
def test_run_checks_on_a_gpu_computes_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    tf32: list[bool] = []

    def note(context: CheckContext) -> None:
        tf32.append(torch.backends.cudnn.allow_tf32)

    monkeypatch.setitem(CHECKS, "eval mode", note)
    images, labels = held_out(16)
    report = evaluate(plain(), images, labels, attacks="pgd-20", eps=EPS, device="cuda", checks="quick")
    assert tf32 == [False]
    assert {check.status for check in report.checks if check.name == "verdicts reproduced"} == {"pass"}
