"""`evaluate`: verdicts of a linear model, early stopping, counts, unchanged models, refused input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_autoattack import shorten
from small_problems import Plane, batch_for, plain_pgd, plane_images, small_network
from torch import Tensor, nn

from deat_rb.attacks.names import parse_attacks
from deat_rb.attacks.threat_models import Linf
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.training.validation import validate
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    return batch_for(network)


@pytest.mark.parametrize("attack", ["fgsm", "pgd-12", "cw-12", pytest.param("autoattack", marks=pytest.mark.slow)])
def test_evaluate_linear_model_in_linf(attack: str) -> None:
    images, labels, robust = plane_images()
    report = evaluate(Plane(), images, labels, attacks=attack, eps=0.1, batch_size=3)
    assert report.verdicts["natural"].tolist() == [True] * 5 + [False] + [True] * 2
    assert report.verdicts[attack].tolist() == robust.tolist()
    assert report.results[attack].n_correct == 3


def test_evaluate_pgd_one_step_is_weaker_than_many() -> None:
    images, labels, robust = plane_images()
    report = evaluate(Plane(), images, labels, attacks=("pgd-1", "pgd-12"), eps=0.1)
    # A start anywhere in the ball and one step of eps / 4 reaches the corner of no example but by luck.
    assert report.results["pgd-1"].n_correct > report.results["pgd-12"].n_correct == int(robust.sum())


@pytest.mark.parametrize("name", ["pgd-10", "cw-10"])
def test_evaluate_early_stopping_changes_no_verdict(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], name: str
) -> None:
    images, labels = batch
    eps = 0.04
    report = evaluate(network, images, labels, attacks=name, eps=eps, batch_size=48, seed=7)
    start = Linf(eps).start(images, seeding.generator(7, "evaluate", name, 0))
    first = plain_pgd(network, images, labels, start, eps, eps / 4, 10, margin=name.startswith("cw"))
    expected = report.verdicts["natural"] & (first > 10)
    assert report.verdicts[name].tolist() == expected.tolist()
    attacked = first[report.verdicts["natural"]]
    assert len(set(attacked.tolist()) - {0, 11}) >= 3, "examples should be misclassified at several steps"
    assert (attacked == 11).any()


def test_evaluate_verdicts_do_not_depend_on_other_examples(
    network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    other = labels.clone()
    other[1] = (other[1] + 1) % 5  # one more that is wrong without an attack, and so is not attacked
    before = evaluate(network, images, labels, attacks="pgd-5", eps=0.04, batch_size=16).verdicts["pgd-5"]
    after = evaluate(network, images, other, attacks="pgd-5", eps=0.04, batch_size=16).verdicts["pgd-5"]
    rest = torch.arange(len(images)) != 1
    assert torch.equal(before[rest], after[rest])


def test_evaluate_report_counts_examples_and_passes(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    calls: list[tuple[str, int, int, int]] = []
    report = evaluate(
        network,
        images,
        labels,
        attacks="cw-3, FGSM,cw-3,pgd-4",
        eps=0.04,
        batch_size=20,
        seed=1,
        progress=lambda *now: calls.append(now),
    )
    assert list(report.results) == list(report.verdicts) == ["natural", "cw-3", "fgsm", "pgd-4"]
    natural, single = report.results["natural"], report.results["fgsm"]
    assert (natural.n_correct, natural.n_examples, natural.accuracy) == (40, 48, 40 / 48)
    assert (natural.forwards, natural.backwards) == (48, 0)
    assert (single.forwards, single.backwards) == (80, 40)
    together = report.verdicts["natural"].clone()
    for verdict in report.verdicts.values():
        assert verdict.shape == (48,)
        assert verdict.dtype == torch.bool
        together &= verdict
    assert report.worst_case.n_correct == int(together.sum())
    assert report.worst_case.n_correct <= min(result.n_correct for result in report.results.values())
    assert report.worst_case.forwards == sum(result.forwards for result in report.results.values())
    assert report.results["pgd-4"].parameters == {
        "eps": 0.04,
        "alpha": 0.01,
        "steps": 4,
        "loss": "ce",
        "start": "uniform",
    }
    assert (report.num_classes, report.batch_size, report.seed, report.device) == (5, 20, 1, "cpu")
    assert report.versions["torch"] == torch.__version__.partition("+")[0]
    assert [call[1] for call in calls if call[0] == "pgd-4"] == [20, 40, 48]
    assert calls[-1] == ("pgd-4", 48, 48, report.results["pgd-4"].n_correct)


def test_evaluate_step_size_is_2_255_at_eps_8_255() -> None:
    images, labels, _ = plane_images()
    report = evaluate(Plane(), images, labels, attacks=("pgd-1", "cw-1"))
    assert report.eps == 8 / 255
    assert report.results["pgd-1"].parameters["alpha"] == 2 / 255
    assert report.results["cw-1"].parameters["alpha"] == 2 / 255
    assert report.results["cw-1"].parameters["loss"] == "margin"


def test_evaluate_in_l2_has_the_radius_that_methods_train_for() -> None:
    images, labels, _ = plane_images()
    report = evaluate(Plane(), images, labels, attacks="pgd-1", norm="L2")
    assert (report.eps, report.results["pgd-1"].parameters["alpha"]) == (0.5, 0.125)


def test_validate_equals_evaluate(network: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    report = evaluate(network, *batch, attacks="pgd-6", eps=0.04, batch_size=16, seed=4)
    assert validate(network, *batch, eps=0.04, steps=6, batch_size=16, seed=4)[:2] == (
        report.results["natural"].accuracy,
        report.results["pgd-6"].accuracy,
    )
    # With steps too small to move anything, only the random start counts, which misleads fewer.
    assert validate(network, *batch, eps=0.04, steps=6, alpha=1e-9, batch_size=16, seed=4)[1] > (
        report.results["pgd-6"].accuracy
    )


class Fragile(nn.Module):
    """Raises at its third call with a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        if self.calls == 3:
            raise RuntimeError("out of memory")
        logits: Tensor = self.inner(images)
        return logits


@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_leaves_the_model_unchanged(batch: tuple[Tensor, Tensor], network: nn.Sequential, fails: bool) -> None:
    model = nn.Sequential(copy.deepcopy(network), nn.BatchNorm1d(5), nn.Dropout(0.5))
    images, labels = batch
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    frozen.bias.requires_grad_(False)
    torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    required = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    attacked = Fragile(model) if fails else model
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(attacked, images, labels, attacks="pgd-5,autoattack", eps=0.1)
    else:
        evaluate(attacked, images, labels, attacks="fgsm,pgd-5,cw-5,autoattack", eps=0.1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(torch.as_tensor(parameter.grad), gradient)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluate_uses_eval_mode(batch: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    images, labels = batch
    expected = evaluate(network, images, labels, attacks="pgd-3", eps=0.04).verdicts
    network.train()
    found = evaluate(network, images, labels, attacks="pgd-3", eps=0.04).verdicts
    network.eval()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("fgsm", ("natural", "fgsm")),
        ("natural", ("natural",)),
        ((), ("natural",)),
        (" FGSM, PGD-050 ,AutoAttack,fgsm", ("natural", "fgsm", "pgd-50", "autoattack")),
        (("cw-7", "natural"), ("natural", "cw-7")),
    ],
)
def test_parse_attacks(given: str | tuple[str, ...], names: tuple[str, ...]) -> None:
    assert parse_attacks(given) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pdg-100", "no attack 'pdg-100': did you mean 'pgd-100'"),
        ("pgd", "did you mean 'pgd-100'"),
        ("cw", "did you mean 'cw-20'"),
        ("auto-attack", "did you mean 'autoattack'"),
        ("pgd-0", "'pgd-0' has 0 steps; give 1 or more, such as pgd-20"),
        ("fgsm,", "no attack ''"),
        ("pgd--5", "no attack 'pgd--5'"),
    ],
)
def test_parse_attacks_refuses_unknown_names(given: str, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        parse_attacks(given)


def bad_input() -> Iterator[tuple[str, dict[str, object], str]]:
    images, labels, _ = plane_images()
    yield "range", {"images": images * 3 - 1}, "normalization"
    yield "bytes", {"images": (images * 255).byte()}, "255"
    yield "nan", {"images": images / 0 * 0}, "NaN"
    yield "label", {"labels": labels + 1}, "label 2 is out of range"
    yield "count", {"labels": labels[:3]}, "there are 8 images but 3 labels"
    yield "eps negative", {"eps": -0.1}, "eps = -0.1 is outside"
    yield "eps text", {"eps": "8 px"}, "'8 px' is not a number"
    yield "eps zero division", {"eps": "8/0"}, "'8/0' divides by zero"
    yield "no eps", {"eps": ()}, "eps is an empty list"
    yield "array of eps", {"eps": torch.tensor([0.1, 2.0])}, "eps = 2 is outside"
    yield "one of several eps", {"eps": (0.1, 2)}, "eps = 2 is outside"
    yield "eps in L2", {"eps": float("inf"), "norm": "L2"}, "eps = inf is not a finite, non-negative radius"
    yield "norm", {"norm": "L1"}, "unknown norm 'L1'"
    yield "precision", {"precision": "fp16"}, "unknown evaluation precision 'fp16'"
    yield "checks", {"checks": "all"}, "unknown level of checks 'all': "
    yield "seed", {"seed": -1}, "seed = -1 is invalid"
    yield "attack of another kind", {"attacks": [3]}, "attack names must be strings such as 'pgd-100', not int"
    yield "eps nan", {"eps": float("nan")}, "eps = nan"
    yield "eps pixels", {"eps": 8.0}, "eps = 8"
    yield "batch", {"batch_size": 0}, "batch_size = 0"
    yield "batch of text", {"batch_size": "8"}, "batch_size = '8' is not positive"
    yield "batch yes", {"batch_size": True}, "batch_size = True is not positive"
    yield "eps that no float holds", {"eps": 10**400}, "eps = inf is outside"
    yield "no radius", {"eps": [None]}, "None is not a number; give a fraction such as 8/255"
    yield "eps yes", {"eps": True}, "True is not a number"
    yield "eps of tensors", {"eps": [torch.zeros(2)]}, r"tensor\(\[0., 0.\]\) is not a number"
    yield "no precision", {"precision": None}, "unknown evaluation precision 'None'"
    yield "checks yes", {"checks": True}, "unknown level of checks 'True'"
    yield "no attacks", {"attacks": None}, "attacks = None is not a list of names"
    yield "channels", {"images": images.repeat(1, 3, 1, 1)}, r"does not accept torch.float32 images of 3x2x2 on cpu"
    yield "double", {"images": images.double()}, "does not accept torch.float64 images"
    yield "labels with a fraction", {"labels": labels.float()}, "labels must be int64"
    yield "no images", {"images": images[:0], "labels": labels[:0]}, "non-empty tensor"
    yield "infinite", {"images": images / 0}, "NaN|inf"
    yield "arrays", {"images": images.numpy()}, "must be tensors, not ndarray"
    yield "device", {"device": "tpu9"}, "there is no device 'tpu9'"
    yield "attack", {"attacks": "fgms"}, "did you mean 'fgsm'"


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in bad_input()], ids=[c[0] for c in bad_input()])
def test_evaluate_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    images, labels, _ = plane_images()
    arguments: dict[str, Any] = {"images": images, "labels": labels, "eps": 0.1} | change
    with pytest.raises(DeatError, match=message):
        evaluate(Plane(), **arguments)


def test_evaluate_accepts_numpy_numbers() -> None:
    images, labels, robust = plane_images()
    numbers: dict[str, Any] = {"eps": np.float32(0.1), "batch_size": np.int64(3), "seed": np.int64(1)}
    report = evaluate(Plane(), images, labels, attacks="fgsm", **numbers)
    assert (report.batch_size, report.seed) == (3, 1)
    assert report.verdicts["fgsm"].tolist() == robust.tolist()


def test_evaluate_refuses_objects_that_are_no_module() -> None:
    images, labels, _ = plane_images()
    models: tuple[Any, ...] = (None, "runs/a", lambda images: images.flatten(1))
    for model in models:
        with pytest.raises(DeatError, match=r"the model must be a torch.nn.Module that returns logits, not a \w+"):
            evaluate(model, images, labels)


def test_evaluate_converts_provenance_to_text(tmp_path: Path) -> None:
    images, labels, _ = plane_images()
    known: dict[str, Any] = {"run": "a\udcff", "epoch": 3}
    report = evaluate(Plane(), images, labels, attacks="natural", eps=0.1, provenance=known)
    assert report.save(tmp_path).exists()
    assert report.provenance == {"run": "a\ufffd", "epoch": "3"}


@pytest.mark.slow
def test_evaluate_ignores_requires_grad_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=8)
    images, labels, robust = plane_images()
    report = evaluate(Plane(), images.requires_grad_(), labels, attacks="fgsm,pgd-2,square", eps=0.1)
    assert report.verdicts["fgsm"].tolist() == robust.tolist()
    assert not any(made.requires_grad for made in report.adversarial.values())
    assert images.grad is None


class Large(Plane):
    """Has memory for two images."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return super().forward(images)


def test_evaluate_explains_out_of_memory(tmp_path: Path) -> None:
    images, labels, _ = plane_images()
    with pytest.raises(DeatError, match=r"^cpu has too little memory for batches of 3 images: use a smaller --batch"):
        evaluate(Large(), images, labels, attacks="fgsm", eps=0.1, batch_size=3, state=tmp_path / "state")
    assert evaluate(Large(), images, labels, attacks="fgsm", eps=0.1, batch_size=2, state=tmp_path / "state")


class Detached(Plane):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Split(Plane):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).repeat(4, 1)


class Decided(Plane):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) > 0


class Diverged(Plane):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Detached(), "the model's logits have no gradient"),
        (Split(), r"shape \(8, 2\) for 2 images"),
        (Diverged(), "NaN for images 0 to 7"),
        (Decided(), "returns torch.bool logits: return floating-point logits"),
    ],
)
def test_evaluate_refuses_unusable_models(model: nn.Module, message: str) -> None:
    images, labels, _ = plane_images()
    with pytest.raises(DeatError, match=message):
        evaluate(model, images, labels, attacks="fgsm", eps=0.1)


@pytest.mark.gpu
def test_evaluate_moves_the_model_to_the_device_and_back() -> None:
    images, labels, robust = plane_images()
    model = Plane()
    report = evaluate(model, images, labels, attacks="fgsm,pgd-12,autoattack", eps=0.1, device="cuda")
    assert report.device.startswith("cuda")
    assert next(model.parameters()).device.type == "cpu"
    assert all(report.verdicts[name].tolist() == robust.tolist() for name in ("fgsm", "pgd-12", "autoattack"))


@pytest.mark.gpu
def test_evaluate_on_a_gpu_agrees_with_the_cpu() -> None:
    """The verdicts may differ for a few examples near the boundary, because TF32 and float32 round differently."""
    network = small_network()
    images, labels = batch_for(network)
    reports = {
        device: evaluate(network, images, labels, attacks="fgsm,pgd-10", eps=0.04, device=device)
        for device in ("cpu", "cuda")
    }
    assert (reports["cpu"].batch_size, reports["cuda"].batch_size) == (128, 500)
    assert reports["cuda"].layout == reports["cpu"].layout == "channels_last"
    for name, verdict in reports["cpu"].verdicts.items():
        differing = int((reports["cuda"].verdicts[name] != verdict).sum())
        assert differing <= (0 if name == "natural" else 2), name
        assert (reports["cuda"].results[name].peak_memory or 0) > 0
