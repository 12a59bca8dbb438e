"""Evaluating images that stay in their files gives the report of images in memory, batch by batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deat_rb.data.datasets import load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import ImageSet, interleave_classes
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.html_report import predictions_of, render_page

ATTACKS = "noise-uniform,fgsm,pgd-2,square"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)).eval()


@pytest.mark.slow
def test_evaluate_files_equals_evaluate_memory(network: nn.Module, image_folder: Path) -> None:
    files = interleave_classes(load_data("folder", data_dir=image_folder, image_size=32, memory_limit=0).test)
    memory = interleave_classes(load_data("folder", data_dir=image_folder, image_size=32).test)
    assert isinstance(files, ImageFolder)
    assert isinstance(memory, ImageSet)
    images, labels = memory.tensors()
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    streamed = evaluate(network, files, labels, attacks=ATTACKS, eps=0.05, batch_size=5, checks="full")
    in_memory = evaluate(network, images, labels, attacks=ATTACKS, eps=0.05, batch_size=5, checks="full")
    assert streamed.examples_sha256 == in_memory.examples_sha256
    assert streamed.checks == in_memory.checks
    for name, correct in in_memory.verdicts.items():
        assert torch.equal(streamed.verdicts[name], correct), name
        if name != "natural":
            assert torch.equal(streamed.adversarial[name], in_memory.adversarial[name])
    found = predictions_of(network, streamed, files), predictions_of(network, in_memory, images)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    classes = ("a", "b", "c", "d")
    page = render_page(streamed, images=files, labels=labels, classes=classes, predictions=found[0])
    assert page.count(b"<figure>") == render_page(
        in_memory, images=images, labels=labels, classes=classes, predictions=found[1]
    ).count(b"<figure>")


def test_evaluate_decodes_no_more_than_a_batch(
    network: nn.Module, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = load_data("folder", data_dir=image_folder, image_size=32, memory_limit=0, test_only=True).test
    decoded: list[int] = []
    tensors = ImageFolder.tensors

    def counted(self: ImageFolder, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        decoded.append(len(self))
        return tensors(self, device)

    monkeypatch.setattr(ImageFolder, "tensors", counted)
    report = evaluate(network, files, files.labels, attacks="fgsm", eps=0.05, batch_size=3, keep_adversarial=False)
    assert report.n_examples == len(files) == 16
    assert max(decoded) == 3
