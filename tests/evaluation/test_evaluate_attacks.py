"""`evaluate` with L2, noise, restarts, Square and torchattacks by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchattacks
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn

from deat_rb.attacks.threat_models import L2
from deat_rb.evaluation.evaluate import evaluate
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


@pytest.mark.parametrize("attack", ["autoattack", "fgsm,autoattack-rand"])
def test_evaluate_autoattack_refuses_float64(attack: str) -> None:
    images, labels = torch.rand(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    with pytest.raises(
        DeatError, match=r"autoattack(-rand)? is computed in float32, not float64: give model.float\(\)"
    ):
        evaluate(network, images, labels, attacks=attack, eps=0.1)
    assert evaluate(network, images, labels, attacks="pgd-2", eps=0.1).n_examples == 4


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


def test_evaluate_restarts_only_lower_accuracy(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    report = evaluate(network, *batch, attacks="pgd-1,pgd-1x2,pgd-1x6", eps=0.04, batch_size=20)
    once, twice, often = (report.verdicts[name] for name in ("pgd-1", "pgd-1x2", "pgd-1x6"))
    assert not (often & ~twice).any()
    assert not (twice & ~once).any()
    assert often.sum() < once.sum()
    found = report.results["pgd-1x6"]
    assert found.parameters["restarts"] == 6
    assert found.notes[0] == f"{int(once.sum())} of 48 correct after start-1"
    # Every restart takes 2 forward passes per image, the final one included; one if the start is misclassified.
    assert found.forwards > report.results["pgd-1"].forwards + 5 * int(often.sum())


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
        theirs = torchattacks.PGD(network, eps=0.04, alpha=0.01, steps=1)(*batch)  # 2/255 of 8/255
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


def test_evaluate_torchattacks_in_l2_of_a_network_in_channels_last(
    network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    reports = [
        evaluate(network, *batch, attacks="torchattacks.PGDL2(steps=3)", eps=0.5, norm="L2", channels_last=wanted)
        for wanted in (True, False)
    ]
    assert [report.layout for report in reports] == ["channels_last", "own"]
    found = [list(report.results.values())[1].n_correct for report in reports]
    assert found[0] == found[1] < reports[0].results["natural"].n_correct


def test_evaluate_images_outside_the_ball_do_not_count(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    name = "torchattacks.FGSM(eps=0.5)"
    report = evaluate(network, *batch, attacks=name, eps=0.01)
    found = report.results[name]
    assert found.n_correct == report.results["natural"].n_correct
    assert found.inadmissible == 40
    assert "40 adversarial images do not count: not finite, not in [0, 1] or not within eps" in found.notes
    assert torch.equal(report.adversarial[name], batch[0])


def test_evaluate_torchattacks_refuses_attacks_that_fail(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(DeatError, match=r"torchattacks.PGD\(steps='many'\) failed \(TypeError: "):
        evaluate(network, *batch, attacks="torchattacks.PGD(steps='many')")
