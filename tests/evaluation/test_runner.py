"""Attacks run batch by batch: radius 0, sweeps, bf16, adversarial images, progress and random models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from short_autoattack import shorten
from small_problems import Plane, batch_for, small_network
from torch import Tensor, nn

from deat_rb.evaluation import frozen_model, runner
from deat_rb.evaluation.checks import registry
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.html_report import predictions_of
from deat_rb.evaluation.plots import draw_sweep
from deat_rb.evaluation.report import Check, CurvePoint, Report
from deat_rb.evaluation.runner import EvaluationCallback
from deat_rb.utils import seeding
from deat_rb.utils.metering import Meter, Usage


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    return batch_for(network)


def test_evaluate_at_eps_0_changes_nothing(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=2, queries=2)
    names = "noise-gaussian,fgsm,pgd-2,cw-2,autoattack,square,torchattacks."
    for norm, theirs in {"Linf": "PGD(steps=2)", "L2": "PGDL2(steps=2)"}.items():
        report = evaluate(network, *batch, attacks=names + theirs, eps=0, norm=norm)
        for name, verdict in report.verdicts.items():
            assert torch.equal(verdict, report.verdicts["natural"]), name
        assert "eps is 0: nothing to attack" in report.results["autoattack"].notes
        assert report.results["pgd-2"].forwards > 40, "that is tried out, not assumed"


def test_evaluate_sweep(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    report = evaluate(network, images, labels, attacks="fgsm,pgd-4", eps="0.04,0,2/255", batch_size=20)
    assert report.eps == 2 / 255, "the last one"
    assert [point.eps for point in report.curve] == [0, 2 / 255, 0.04]
    for point in report.curve[1:]:
        alone = evaluate(network, images, labels, attacks="fgsm,pgd-4", eps=point.eps, batch_size=20)
        assert point.n_correct == {name: result.n_correct for name, result in alone.results.items()}
        assert point.worst_case == alone.worst_case.accuracy
        assert alone.curve == ()
    natural = report.results["natural"].n_correct
    assert report.curve[0].n_correct == {"natural": natural, "fgsm": natural, "pgd-4": natural}
    assert report.curve[0].accuracy["fgsm"] == natural / 48
    assert report.curve[1].n_correct["pgd-4"] == report.results["pgd-4"].n_correct
    main = evaluate(network, images, labels, attacks="fgsm", eps=(0.04, 0, "2/255"), main_eps="0.04")
    assert main.eps == 0.04
    assert evaluate(network, images, labels, attacks="fgsm", eps=(0.04, 0), main_eps=0.3).eps == 0
    named = report.model_copy(update={"curve": tuple(_renamed(point, "$fgsm{$") for point in report.curve)})
    for title in ("a network", r"run-$\frac{$", "[red]", "\udcff"):
        assert draw_sweep(named, title=title).startswith(b"\x89PNG")


def _renamed(point: CurvePoint, name: str) -> CurvePoint:
    return point.model_copy(update={"accuracy": {name: point.accuracy["fgsm"]}})


def test_evaluate_bf16_verdicts_are_in_fp32(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    report = evaluate(network, images, labels, attacks="fgsm,pgd-5", eps=0.04, precision="bf16")
    assert report.precision == "bf16"
    assert "upper bounds" in report.notes[0]
    assert "upper bounds" in str(report.table().title)
    for name, adv in report.adversarial.items():
        with torch.no_grad():
            assert torch.equal(network(adv).argmax(1) == labels, report.verdicts[name])
    assert report.results["pgd-5"].n_correct < report.results["natural"].n_correct
    assert evaluate(network, images, labels, attacks="fgsm").notes == ()


def test_evaluate_bf16_misclassification_is_confirmed_in_fp32() -> None:
    # The margin of class 1 is 1e-4, 4 * 2.5e-5, which bf16 rounds away: there the classes tie, and 0 is the first.
    images = torch.tensor([0.5, 0.5, 0.5, 0.5 + 2.5e-5]).view(1, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert int(Plane()(images).argmax()) == 0
    report = evaluate(Plane(), images, torch.tensor([1]), attacks="fgsm,pgd-3", eps=1e-6, precision="bf16")
    assert {name: result.n_correct for name, result in report.results.items()} == {
        "natural": 1, "fgsm": 1, "pgd-3": 1
    }  # fmt: skip


def test_evaluate_adversarial_images_have_the_verdicts(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=3, queries=20)
    images, labels = batch
    names = ("noise-uniform", "fgsm", "pgd-5x2", "cw-5", "autoattack", "torchattacks.BIM(steps=2)")
    report = evaluate(network, images, labels, attacks=names, eps=0.04, batch_size=20)
    assert list(report.adversarial) == list(names)
    for name, adv in report.adversarial.items():
        assert (adv.dtype, adv.shape, adv.device.type) == (torch.float32, images.shape, "cpu")
        assert 0 <= adv.min() <= adv.max() <= 1
        assert (adv - images).abs().max() <= 0.04 + 1e-6
        with torch.no_grad():
            assert torch.equal(network(adv).argmax(1) == labels, report.verdicts[name])
        wrong = ~report.verdicts["natural"]
        assert torch.equal(adv[wrong], images[wrong])
    assert evaluate(network, images, labels, attacks="fgsm", keep_adversarial=False).adversarial == {}


def test_evaluate_records_digests_of_weights_and_examples(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    first = evaluate(network, images, labels, attacks=())
    again = evaluate(small_network(), images.clone(), labels, attacks=())
    assert (first.model_sha256, first.examples_sha256) == (again.model_sha256, again.examples_sha256)
    other = small_network()
    other.get_buffer("1.running_mean").add_(1e-4)
    changed = evaluate(other, images.flip(0), labels, attacks=())
    assert changed.model_sha256 != first.model_sha256
    assert changed.examples_sha256 != first.examples_sha256


def test_evaluate_checks_are_in_the_report(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def run_checks(model: nn.Module, images: Tensor, labels: Tensor, report: Any, **options: Any) -> tuple[Check, ...]:
        asked.update(options, model=model, verdicts=set(report.verdicts), adversarial=set(report.adversarial))
        return (Check(name="a doubt", status="warn", figure=1.0, sentence="Who knows."),)

    monkeypatch.setattr("deat_rb.evaluation.checks.registry.run_checks", run_checks)
    options: dict[str, Any] = {"attacks": "fgsm", "eps": 0.3, "norm": "L2", "batch_size": 9, "seed": 4}
    assert evaluate(network, *batch, **options).checks == ()
    assert not asked
    report = evaluate(network, *batch, **options, checks="full")
    assert [check.name for check in report.checks] == ["a doubt"]
    assert report.adversarial
    assert asked["model"] is network
    assert asked["verdicts"] == {"natural", "fgsm"}
    assert asked["adversarial"] == {"fgsm"}
    given = {"level": "full", "eps": 0.3, "norm": "L2", "batch_size": 9, "seed": 4}
    assert {key: asked[key] for key in given} == given


class Watching(EvaluationCallback):
    """A caller's progress that wants to know what goes on within a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[tuple[str, int, int, float]] = []

    def within(self, attack: str, batch: int, batches: int, share: float) -> None:
        self.shares.append((attack, batch, batches, share))


def test_evaluate_progress_within_a_batch(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deat_rb.evaluation.runner.WITHIN_EVERY", 0.0)
    watching = Watching()
    evaluate(network, *batch, attacks="pgd-9", eps=1e-6, batch_size=24, progress=watching)
    seen = [entry for entry in watching.shares if entry[0] == "pgd-9"]
    assert {entry[1:3] for entry in seen} == {(1, 2), (2, 2)}
    shares = [entry[3] for entry in seen if entry[1] == 2]
    # 9 steps and the final prediction are 10 passes; no fraction before the end is 1
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])


class Noisy(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images + 0.1 * torch.rand_like(images))
        return logits


def test_evaluate_seeds_models_that_draw_random_numbers(batch: tuple[Tensor, Tensor]) -> None:
    model, found = Noisy(), []
    for outside in (1, 2):
        with seeding.preserved():
            torch.manual_seed(outside)
            before = torch.get_rng_state()
            found.append(evaluate(model, *batch, attacks="fgsm,pgd-3", eps=0.04))
            assert torch.equal(torch.get_rng_state(), before)
    first, again = found
    for name in first.verdicts:
        assert torch.equal(first.verdicts[name], again.verdicts[name])
    assert 0 < first.results["pgd-3"].n_correct < 48


class Rounds(nn.Module):
    """A network that is misled only while ``exact`` is false, as one in TF32 might be."""

    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        brightness = self.scale * images.flatten(1).mean(dim=1)
        return torch.stack([torch.zeros_like(brightness), brightness - (0.4 if self.exact else 0.5)], dim=1)


def rounds(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    """Return a network that is exact in `full_float32` if convolutions are in TF32 elsewhere."""
    network = Rounds()

    @contextmanager
    def full_float32(device: torch.device) -> Iterator[None]:
        before, network.exact = network.exact, tf32
        yield
        network.exact = before

    for module in (runner, frozen_model, registry):
        monkeypatch.setattr(module, "full_float32", full_float32)
    monkeypatch.setattr("deat_rb.evaluation.evaluate.uses_tf32", lambda device: tf32)
    return network


@pytest.mark.parametrize("tf32", [True, False])
def test_evaluate_confirms_examples_found_in_tf32(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = rounds(tf32, monkeypatch)
    images, labels = torch.full((3, 1, 4, 4), 0.55), torch.ones(3, dtype=torch.int64)
    report = evaluate(network, images, labels, attacks="fgsm", eps=0.1)
    assert report.tf32 is tf32
    assert report.results["natural"].n_correct == 3
    assert report.results["fgsm"].n_correct == (3 if tf32 else 0)


def test_checks_and_page_classify_in_float32_as_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In TF32 the adversarial images, of brightness 0.45, would be in class 0."""
    network = rounds(True, monkeypatch)
    images, labels = torch.full((3, 1, 4, 4), 0.55), torch.ones(3, dtype=torch.int64)
    report = evaluate(network, images, labels, attacks="fgsm", eps=0.1, checks="quick")
    assert [check.status for check in report.checks if check.name == "verdicts reproduced"] == ["pass"]
    assert predictions_of(network, report, images)["fgsm"].tolist() == [1, 1, 1]


def test_evaluate_reports_energy_and_memory(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peaks = iter(range(1000))

    class Fake(Meter):
        def read(self) -> Usage:
            return Usage(joules=1.8e6, memory=2**20 * next(peaks))

    monkeypatch.setattr(runner, "Meter", Fake)
    report = evaluate(network, *batch, attacks="fgsm,pgd-2", eps=0.04, batch_size=24)
    assert [each.energy_kwh for each in report.results.values()] == [1.0, 1.0, 1.0]  # two batches each
    assert [each.peak_memory for each in report.results.values()] == [2**20, 3 * 2**20, 5 * 2**20]
    assert (report.worst_case.energy_kwh, report.worst_case.peak_memory) == (3.0, 5 * 2**20)
    assert "kWh" in str(report)
    assert "5 MiB" in str(report)
    assert Report.load(report.save(tmp_path)).model_dump() == report.model_dump()


def test_report_omits_energy_and_memory_of_a_cpu(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    report = evaluate(network, *batch, attacks="fgsm", eps=0.04)
    assert report.worst_case.energy_kwh is report.worst_case.peak_memory is None
    assert "kWh" not in str(report)


@pytest.mark.parametrize("batch_size", [7, 16, 48])
def test_evaluate_attacks_batches_together_without_changing_a_result(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"attacks": "pgd-6x2,cw-5", "eps": 0.04, "batch_size": batch_size, "seed": 6}
    together = evaluate(network, *batch, **options)
    monkeypatch.setattr(frozen_model.PreparedModel, "is_independent", False)
    alone = evaluate(network, *batch, **options)
    for name, result in together.results.items():
        other = alone.results[name]
        assert nearly_all_equal(together.verdicts[name], alone.verdicts[name])
        assert result.forwards == pytest.approx(other.forwards, rel=0.02)
        assert result.backwards == pytest.approx(other.backwards, rel=0.02)
        if name != "natural":
            assert nearly_all_equal(together.adversarial[name], alone.adversarial[name])


def nearly_all_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether at least 98 % of the elements are equal: CPUs may round batches of different sizes differently."""
    return (first == second).double().mean().item() >= 0.98


class Shifted(nn.Module):
    """A network whose logits depend on what a function adds to the images."""

    def __init__(self, network: nn.Module, shift: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.network = network
        self.shift = shift

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images + self.shift(images))
        return logits


@pytest.mark.parametrize(
    ("shift", "independent"),
    [
        (lambda images: 0.0, True),
        (lambda images: 5e-5 * len(images), True),
        (lambda images: -images.mean(dim=0), False),
        (lambda images: 0.01 * torch.rand(()), False),  # the same for all images of a batch
        (lambda images: 0.01 * random.random(), False),
    ],
    ids=["plain", "depends on the batch by rounding", "depends on the batch", "draws from torch", "draws from random"],
)
def test_is_independent(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], shift: Callable[[Tensor], Any], independent: bool
) -> None:
    before = torch.get_rng_state()
    with frozen_model.prepared_for_eval(Shifted(network, shift).eval(), *batch) as prepared:
        assert prepared.is_independent is independent
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluate_attacks_batches_of_a_random_model_one_by_one(
    network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    """Each batch has the model's random numbers of its own number, whichever batches come before."""
    model = Shifted(network, lambda images: 0.05 * torch.randn(images.shape)).eval()
    images, labels = batch
    labels = labels.clone()
    options: dict[str, Any] = {"attacks": "pgd-3", "eps": 0.01, "batch_size": 16}
    report = evaluate(model, images, labels, **options)
    labels[:16] = (labels[:16] + 1) % 5  # other examples of the first batch are attacked
    again = evaluate(model, images, labels, **options)
    assert torch.equal(report.verdicts["pgd-3"][16:], again.verdicts["pgd-3"][16:])
    assert torch.equal(report.adversarial["pgd-3"][16:], again.adversarial["pgd-3"][16:])
