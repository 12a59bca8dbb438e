"""Attacks of an evaluation, built from their names."""

from __future__ import annotations

import pytest
import torch
from small_problems import batch_for, small_network

from deat_rb.attacks.functional import CountingModel
from deat_rb.attacks.registry import build_attack
from deat_rb.attacks.types import AttackContext, Batch
from deat_rb.utils.errors import DeatError

CONTEXT = AttackContext("Linf", 0.1, 0, 5, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "stages", "calls", "parameters"),
    [
        ("noise-uniform", [""], 1, {"eps": 0.1}),
        ("fgsm", [""], 2, {"eps": 0.1, "alpha": 0.1, "steps": 1, "loss": "ce", "start": "none"}),
        ("pgd-5", [""], 6, {"eps": 0.1, "alpha": 0.025, "steps": 5, "loss": "ce", "start": "uniform"}),
        ("cw-5x2", ["start-1", "start-2"], 6,
         {"eps": 0.1, "alpha": 0.025, "steps": 5, "loss": "margin", "start": "uniform", "restarts": 2}),
    ],
)  # fmt: skip
def test_build_attack_has_its_stages_and_parameters(
    name: str, stages: list[str], calls: int, parameters: dict[str, object]
) -> None:
    attack = build_attack(name, CONTEXT)
    assert attack.name == name
    assert [stage.name for stage in attack.parts] == stages
    assert {stage.calls for stage in attack.parts} == {calls}
    assert attack.parameters == parameters


@pytest.mark.parametrize("name", ["noise-gaussian", "fgsm", "pgd-3x2", "cw-3", "torchattacks.PGD(steps=3)"])
def test_build_attack_stages_attack_the_chosen_examples_only(name: str) -> None:
    model = CountingModel(small_network())
    images, labels = batch_for(model.model)
    chosen = torch.arange(len(images)) % 3 != 0
    for stage in build_attack(name, CONTEXT).parts:
        output = stage.craft(model, Batch(images, labels, chosen, 0, torch.arange(len(images))))
        assert len(output.images) == len(output.misclassified) == int(chosen.sum())
        assert float((output.images - images[chosen]).abs().max()) <= 0.1 + 1e-6
        assert torch.equal(model(output.images).argmax(dim=1) != labels[chosen], output.misclassified)


def test_build_attack_refuses_torchattacks_in_another_norm() -> None:
    with pytest.raises(DeatError, match=r"torchattacks.PGDL2\(\) attacks in L2, but the evaluation is in Linf"):
        build_attack("torchattacks.PGDL2()", CONTEXT)


def test_build_attack_refuses_torchattacks_arguments_that_fail() -> None:
    stage = build_attack("torchattacks.PGD(steps='many')", CONTEXT).parts[0]
    model = CountingModel(small_network())
    images, labels = batch_for(model.model)
    everything = Batch(images, labels, torch.ones(len(images), dtype=torch.bool), 0, torch.arange(len(images)))
    with pytest.raises(DeatError, match=r"torchattacks.PGD\(steps='many'\) failed \(TypeError: "):
        stage.craft(model, everything)
