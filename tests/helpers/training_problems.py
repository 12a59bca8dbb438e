"""Small networks, batches and runs for the tests of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.models.spec import ModelSpec, NormalizedModel
from deat_rb.runs.config import RunConfig
from deat_rb.training.engine import Engine
from deat_rb.training.place import Place
from deat_rb.training.trainer import Trainer

Batch = tuple[Tensor, Tensor]
ARCH = "training_problems:network"


def network(num_classes: int = 4) -> nn.Sequential:
    """Two BatchNorms and a dropout, for images 3xHxW of any size, with weights from torch's global generator."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, num_classes),
    )  # fmt: skip


def made(seed: int = 0) -> nn.Sequential:
    """A network in train mode whose running statistics are not the initial ones; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
        model(torch.rand(16, 3, 8, 8))
    return model


def used() -> nn.Sequential:
    """A network in the middle of somebody's work: one BatchNorm and the dropout frozen in eval inside a training
    model, one parameter frozen, gradients on some of the others."""
    model = made()
    model[4].eval()
    model[8].eval()
    model[0].weight.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and number % 2:
            parameter.grad = torch.full_like(parameter, 0.25 + number)
    return model


class Snapshot:
    """Everything about a model that a call to an attack must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.gradients = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }
        self.required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def differences(self) -> list[str]:
        """What is not as it was."""
        now = Snapshot(self.model)
        found = [f"value of {name}" for name, old in self.tensors.items() if not torch.equal(old, now.tensors[name])]
        found += [f"mode of '{name}'" for name, old in self.modes.items() if old != now.modes[name]]
        found += [f"requires_grad of {name}" for name, old in self.required.items() if old != now.required[name]]
        for name, gradient in self.gradients.items():
            new = now.gradients[name]
            same = gradient is new if gradient is None or new is None else torch.equal(gradient, new)
            found += [] if same else [f"gradient of {name}"]
        return found


def images_and_labels(count: int = 6, size: int = 8, seed: int = 5) -> Batch:
    """Images 3 x size x size in [0, 1] and labels of 4 classes that a network can learn by their colour."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 3, size, size, generator=draw) * 0.6
    images[:, 0] += 0.35 * (labels % 2).view(-1, 1, 1)
    images[:, 1] += 0.35 * (labels // 2).view(-1, 1, 1)
    return images.clamp(0, 1), labels


def loader(batches: int = 2) -> list[Batch]:
    """A list of batches, which is the simplest of loaders."""
    return [images_and_labels(seed=20 + number) for number in range(batches)]


class Positioned(list[Batch]):
    """A list of batches of the training images in their order, which tells which images a batch has."""

    def __init__(self, batches: Iterable[Batch], number_of_images: int | None = None) -> None:
        super().__init__(batches)
        self._sizes = [len(labels) for _, labels in self]
        self.number_of_images = number_of_images or sum(self._sizes)

    def positions(self, epoch: int, batch: int) -> Tensor:
        first = sum(self._sizes[:batch])
        return torch.arange(first, first + self._sizes[batch])


def begin(trainer: Trainer, images: Tensor, epoch: int = 0, batch: int = 0, engine: Engine | None = None) -> float:
    """Tell a trainer the place of a batch (from 0), whose images are the first ones of the training images."""
    place = Place(epoch + 1, 1, batch, len(images), 4, torch.arange(len(images), device=images.device), 8)
    return trainer.begin_batch(images, place, engine or Engine(images.device))


class Passes:
    """Counts what goes through a model: a forward per call, a backward per gradient that comes back to its output."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[Passes]:
        handle = model.register_forward_hook(self._seen)
        try:
            yield self
        finally:
            handle.remove()

    def _seen(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._came_back)

    def _came_back(self, gradient: Tensor) -> None:
        self.backwards += 1


def fails_at(model: nn.Module, call: int) -> None:
    """Lets a model raise on its ``call``-th forward pass from now on."""
    calls = 0

    def fail(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("the model is out of order")

    model.register_forward_pre_hook(fail)


def run_config(**changes: Any) -> RunConfig:
    """The configuration of a run of the small network."""
    fields: dict[str, Any] = {
        "method": "pgd-2", "setting": "fast", "dataset": "digits", "data_dir": None, "image_size": 8, "train_size": 12,
        "val_size": 4, "arch": ARCH, "init_from": None, "epochs": 2, "lr": 0.1, "lr_schedule": "cyclic",
        "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 6, "eps": 8 / 255, "alpha": None, "steps": None,
        "max_steps": None, "gamma": None, "beta": None, "tau": None, "attack_mode": None, "lr_per_replay": None,
        "precision": "fp32", "device": "cpu", "seed": 0, "select": "last", "data_fingerprint": "0", "versions": {},
        "network": ModelSpec(arch=ARCH, num_classes=4, image_size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
    }  # fmt: skip
    return RunConfig.model_validate({**fields, **changes})


def normalized() -> NormalizedModel:
    """The model of `run_config`, the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return run_config().network.build()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
