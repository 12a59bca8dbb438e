"""Radii of 0 and several, L2, noise, restarts, torchattacks by name, bf16, and what the report keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from short_autoattack import shorten
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn

from deat_rb.attacks.threat_models import L2, check_norm, check_radius, threat_model
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.plots import draw_sweep
from deat_rb.evaluation.report import Check, CurvePoint
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError

GREY = torch.full((200, 3, 8, 8), 0.5)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    return batch_for(network)


@pytest.mark.parametrize("attack", ["square", "autoattack", "fgsm,autoattack-plus"])
def test_evaluate_square_in_l2_refuses_tiny_images(attack: str) -> None:
    images, labels = torch.rand(4, 3, 4, 8), torch.tensor([0, 1, 2, 0])
    network = nn.Sequential(nn.Flatten(), nn.Linear(96, 3))
    with pytest.raises(
        DeatError, match=r"(square|autoattack|autoattack-plus) in L2 needs images of at least 5x5 .* 4x8"
    ):
        evaluate(network, images, labels, attacks=attack, eps=0.5, norm="L2")


# L2. The plane's margin falls by at most eps * |w| = eps * sqrt(30), where [0, 1] leaves room for it. The last image
# has room in two of its four values: there the best step takes eps * |(3, 4)| = 5 eps off its margin of 0.8, and the
# clipped step along the gradient eps * (3^2 + 4^2) / sqrt(30) = 4.56 eps.


@pytest.mark.parametrize(
    ("attack", "eps", "robust"),
    [
        ("fgsm", 0.15, [0, 1, 3, 4, 7]),  # 0.82 off margins of 0.9, 1.2, 0.8, 1.2 and 0.9
        ("pgd-20", 0.15, [0, 1, 3, 4, 7]),
        ("cw-20", 0.15, [0, 1, 3, 4, 7]),
        ("fgsm", 0.17, [1, 3, 7]),  # 0.93; of the last 0.776
        ("pgd-20", 0.17, [1, 3]),  # of the last nearly 0.85
        ("torchattacks.PGDL2(alpha=0.05, steps=20)", 0.17, [1, 3]),
    ],
)
def test_evaluate_linear_model_in_l2(attack: str, eps: float, robust: list[int]) -> None:
    images, labels, _ = plane_images()
    report = evaluate(Plane(), images, labels, attacks=attack, eps=eps, norm="L2", batch_size=3)
    name = list(report.results)[1]
    assert report.verdicts[name].nonzero().flatten().tolist() == robust
    assert (report.norm, report.results[name].inadmissible) == ("L2", 0)
    lengths = (report.adversarial[name] - images).flatten(1).norm(dim=1)
    assert lengths.max() <= eps + 1e-6


def test_l2_projection_and_step() -> None:
    images = torch.full((3, 1, 1, 2), 0.5)
    adv = images + torch.tensor([[0.3, 0.4], [0.03, 0.04], [0.0, 0.0]]).view(3, 1, 1, 2)
    projected = L2(0.1).project(adv, images) - images
    assert projected.flatten(1).tolist() == [pytest.approx([0.06, 0.08]), pytest.approx([0.03, 0.04]), [0, 0]]
    assert L2(1.0).project(adv + 2, images).flatten().tolist() == [1.0] * 6
    # Gradients whose squares are 0 in float32, and one that is 0.
    step = L2(0.1).step(torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [0.0, -7.0]]).view(3, 1, 1, 2), 0.5)
    assert step.flatten(1).tolist() == [pytest.approx([0.3, 0.4]), [0, 0], [0, -0.5]]


def test_l2_contains() -> None:
    images = torch.full((5, 1, 2, 2), 0.5)
    adv = images.clone()
    adv[0] += 0.1  # length 0.2
    adv[1] += 0.1 + 1e-5
    adv[2, 0, 0, 0] = float("nan")
    adv[3] = 0.6
    images[4], adv[4] = 1.0, 1.0 + 1e-4
    assert L2(0.2).contains(adv, images).tolist() == [True, False, False, True, False]


def test_l2_start_is_inside_and_of_all_lengths() -> None:
    start = L2(0.5).start(GREY, torch.Generator().manual_seed(0))
    lengths = (start - GREY).flatten(1).norm(dim=1)
    # U(0, 0.5): mean 0.25, standard deviation 0.144, of 200 draws 0.0102
    assert lengths.max() <= 0.5 + 1e-6
    assert float(lengths.mean()) == pytest.approx(0.25, abs=0.04)
    assert lengths.min() < 0.05


@pytest.mark.parametrize("value", [0, "0", 3.5, "1/2", 1])
def test_check_radius(value: float | str) -> None:
    assert check_radius(value, norm="L2") == {0: 0, "0": 0, 3.5: 3.5, "1/2": 0.5, 1: 1}[value]


def test_check_norm() -> None:
    assert threat_model("L2", 0.5) == L2(0.5)
    assert (check_norm("linf"), check_norm("l2"), check_norm("Linf")) == ("Linf", "L2", "Linf")
    with pytest.raises(DeatError, match="there is no norm 'L1' here: known are Linf, L2"):
        check_norm("L1")
    with pytest.raises(DeatError, match=r"--eps = -1 is no length"):
        check_radius(-1, "--eps", norm="L2")


# Noise.


@pytest.mark.parametrize(
    ("kind", "deviation", "at_the_border"),
    [
        ("gaussian", 0.7193, 0.3173),  # of min(|N(0, 1)|, 1): sqrt(0.1987 + 0.3173); P(|N(0, 1)| > 1)
        ("uniform", 1 / math.sqrt(3), 0.0),
    ],
)
def test_noise_in_linf(kind: str, deviation: float, at_the_border: float, network: nn.Sequential) -> None:
    labels = network(GREY).argmax(dim=1)
    report = evaluate(network, GREY, labels, attacks=f"noise-{kind}", eps=0.1, batch_size=64)
    noise = (report.adversarial[f"noise-{kind}"] - GREY) / 0.1
    assert float(noise.abs().max()) <= 1 + 1e-5
    assert float(noise.std()) == pytest.approx(deviation, abs=0.01)
    assert float((noise.abs() > 1 - 1e-5).float().mean()) == pytest.approx(at_the_border, abs=0.01)
    assert report.results[f"noise-{kind}"].forwards == 200
    assert report.results[f"noise-{kind}"].inadmissible == 0


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_in_l2_is_about_as_long_as_eps(kind: str) -> None:
    noise = L2(0.4).noise(GREY, torch.Generator().manual_seed(1), kind) - GREY
    lengths = noise.flatten(1).norm(dim=1)
    assert lengths.max() <= 0.4 + 1e-6
    assert float(lengths.mean()) == pytest.approx(0.4, rel=0.05)


# Restarts.


def test_evaluate_restarts_only_lower_accuracy(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    report = evaluate(network, *batch, attacks="pgd-1,pgd-1x2,pgd-1x6", eps=0.04, batch_size=20)
    once, twice, often = (report.verdicts[name] for name in ("pgd-1", "pgd-1x2", "pgd-1x6"))
    assert not (often & ~twice).any()
    assert not (twice & ~once).any()
    assert often.sum() < once.sum()
    found = report.results["pgd-1x6"]
    assert found.parameters["restarts"] == 6
    assert found.notes[0] == f"{int(once.sum())} of 48 correct after start-1"
    # Every start costs an image 2 forwards, the last included; who is broken at the start costs one.
    assert found.forwards > report.results["pgd-1"].forwards + 5 * int(often.sum())


# torchattacks by name.


def test_evaluate_torchattacks_by_name_equals_torchattacks(
    network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    name = "torchattacks.MIFGSM(steps=3, alpha=4/255)"
    report = evaluate(network, images, labels, attacks=name, eps="6/255", batch_size=20)
    expected = torch.cat(
        [
            network(torchattacks.MIFGSM(network, eps=6 / 255, alpha=4 / 255, steps=3)(image, label)).argmax(1) == label
            for image, label in zip(images.split(20), labels.split(20), strict=True)
        ]
    )
    assert torch.equal(report.verdicts[name], expected & report.verdicts["natural"])
    assert 0 < report.results[name].n_correct < report.results["natural"].n_correct
    assert report.results[name].parameters == {"eps": 6 / 255, "alpha": 4 / 255, "steps": 3, "decay": 1.0}
    assert report.results[name].backwards == 3 * 48


def test_evaluate_torchattacks_seeds_and_restores_torch_generators(
    network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    name = "torchattacks.PGD(steps=1)"
    before = torch.get_rng_state()
    first, again, other = (
        evaluate(network, *batch, attacks=name, eps=0.04, seed=seed).adversarial[name] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with seeding.preserved():
        seeding.seed_global(1, "evaluate", name, 0)
        theirs = torchattacks.PGD(network, eps=0.04, steps=1)(*batch)
    attacked = network(batch[0]).argmax(1) == batch[1]
    assert torch.equal(first[attacked], theirs[attacked])


def test_evaluate_torchattacks_seeds_numpy(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    name = "torchattacks.Pixle(restarts=1, max_iterations=2)"
    images, labels = batch[0][1:4], batch[1][1:4]
    before = np.random.get_state()
    made, states = [], []
    for outside, seed in ((1, 1), (2, 1), (1, 2)):
        np.random.seed(outside)
        states.append(np.random.get_state(legacy=False)["state"]["key"].tolist())
        made.append(evaluate(network, images, labels, attacks=[name], eps=1.0, seed=seed).adversarial[name])
        assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[-1]
    np.random.set_state(before)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    "name", ["torchattacks.CW(steps=2)", "torchattacks.PIFGSM(num_iter_set=2)", "torchattacks.FAB(steps=2)",
             "torchattacks.APGDT(steps=2)", "torchattacks.GN", "torchattacks.AutoAttack(version='rand')"],
)  # fmt: skip
def test_evaluate_torchattacks_other_attacks(
    name: str, network: nn.Sequential, batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = batch[0][:8], batch[1][:8]
    report = evaluate(network, images, labels, attacks=[name], eps=0.04)
    found = list(report.results.values())[1]
    assert found.n_correct <= report.results["natural"].n_correct
    assert (report.adversarial[found.name] - images).abs().max() <= 0.04 + 1e-6
    assert capsys.readouterr().out == ""


def test_evaluate_images_outside_the_ball_do_not_count(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    name = "torchattacks.FGSM(eps=0.5)"
    report = evaluate(network, *batch, attacks=name, eps=0.01)
    found = report.results[name]
    assert found.n_correct == report.results["natural"].n_correct
    assert found.inadmissible == 40
    assert "40 adversarial images were not finite, in [0, 1] and within eps, and do not count" in found.notes
    assert torch.equal(report.adversarial[name], batch[0])


def test_evaluate_torchattacks_refuses_attacks_that_fail(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(DeatError, match=r"torchattacks.PGD\(steps='many'\) cannot run here \(TypeError: "):
        evaluate(network, *batch, attacks="torchattacks.PGD(steps='many')")


# A radius of 0, and several.


def test_evaluate_at_eps_0_changes_nothing(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=2, queries=2)
    names = "noise-gaussian,fgsm,pgd-2,cw-2,autoattack,square,torchattacks.PGD(steps=2)"
    for norm in ("Linf", "L2"):
        report = evaluate(network, *batch, attacks=names, eps=0, norm=norm)
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


# bf16.


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


# What is kept and looked at.


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


class Watching:
    """A caller's progress that wants to know what goes on within a batch."""

    def __init__(self) -> None:
        self.shares: list[tuple[str, int, int, float]] = []

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        pass

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
    # 9 steps and a last look are 10 passes; whatever is told before the end is not the end
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])


# The layout.


class Flat(nn.Module):
    """Flattens by view, which images in channels_last cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        logits: Tensor = self.linear(features.view(len(images), -1))
        return logits


class Noisy(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images + 0.1 * torch.rand_like(images))
        return logits


class LaidOut(nn.Module):
    """Remembers how its weights were laid out when it was called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        weight = self.network.get_parameter("4.weight")
        self.seen.add(weight.is_contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.network(images)
        return logits


@pytest.mark.parametrize(
    ("make", "wanted", "layout"),
    [(small_network, True, "channels_last"), (small_network, False, "own"), (Flat, True, "own"), (Plane, True, "own")],
)
def test_evaluate_memory_format(make: type[nn.Module], wanted: bool, layout: str) -> None:
    model = make().eval()
    images = torch.rand(6, 1, 2, 2) if make is Plane else torch.rand(6, 3, 8, 8)
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    labels = model(images).argmax(1)
    report = evaluate(model, images, labels, attacks="pgd-2", channels_last=wanted)
    assert report.layout == layout
    after = [(p.data_ptr(), p.stride(), p) for p in model.parameters()]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def test_evaluate_runs_in_channels_last(batch: tuple[Tensor, Tensor]) -> None:
    model = LaidOut(small_network())
    evaluate(model, *batch, attacks=())
    assert model.seen == {False, True}, "the first look is at the model as it is"
    model.seen.clear()
    evaluate(model, *batch, attacks="fgsm", channels_last=False)
    assert model.seen == {False}


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
