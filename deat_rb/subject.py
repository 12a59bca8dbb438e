"""What an evaluation is about: a trained network and the test images it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.data import DataSet, ImageSet, load_data
from deat_rb.errors import DeatError
from deat_rb.export import exported_spec
from deat_rb.files import load_tensors, sha256_file
from deat_rb.models import build_model, load_weights
from deat_rb.runs import RunDirectory


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, its test images and what is known of both.

    Attributes:
        model: In eval mode, on the CPU; takes images in [0, 1].
        data: The data set whose test part counts.
        eps: The radius it was trained for, in [0, 1] pixel units; 8/255 where that is not known.
        provenance: Where the network and the data come from.
        run: The run directory's path, or None for a bare checkpoint.
    """

    model: nn.Module
    data: DataSet
    eps: float
    provenance: dict[str, str]
    run: Path | None = None

    def examples(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The test images: float32 (N, C, H, W) in [0, 1], and labels (N,).

        The first ``count`` of a longer evaluation are the examples of a shorter one. See `in_turn`.

        Raises:
            DeatError: There are not that many.
        """
        test = in_turn(self.data.test)
        if count is None:
            return test.tensors()
        if not 1 <= count <= len(test):
            raise DeatError(f"--n-examples {count} is not possible with {len(test)} test images: "
                            f"give a number from 1 to {len(test)}")  # fmt: skip
        return test.first(count).tensors()


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Loads a trained network, in eval mode; it takes images in [0, 1].

    Args:
        path: A run directory, of which the selected checkpoint is taken, or the ``.pt`` file of an export.
        device: Where to put it.

    Raises:
        DeatError: There is no such run or file, it is damaged, or nothing says of what architecture it is.
    """
    path = Path(path)
    if path.is_dir():
        run = RunDirectory.open(path)
        spec, weights = run.model_spec, run.selected_weights_path
    else:
        spec, weights = exported_spec(path), path
    model = spec.build()
    load_weights(model, load_tensors(weights), source=str(weights))
    return model.to(device).eval()


def in_turn(images: ImageSet) -> ImageSet:
    """Orders images that lie class by class, as a folder's do, so that the classes take turns.

    The first images are then of all classes. Others stay in their order, in which RobustBench takes the first, too.
    """
    labels = images.labels
    if not bool((labels.diff() >= 0).all()):
        return images
    counts = torch.bincount(labels)
    within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    return images.select(within_class.argsort(stable=True))


def open_run(path: Path, *, data_dir: str | Path | None = None) -> Subject:
    """Opens a run with its selected checkpoint and the data it was trained on.

    Args:
        path: The run directory.
        data_dir: Where the data lie now, if they have been moved since.

    Raises:
        DeatError: It is no run, or its weights or its data cannot be had.
    """
    run = RunDirectory.open(path)
    config = run.config
    model = load_model(path)
    data = load_data(config.dataset, data_dir=data_dir or config.data_dir, image_size=config.image_size)
    provenance = {
        "run": run.path.name,
        "method": config.method,
        "weights": run.selected_weights_path.name,
        "weights_sha256": sha256_file(run.selected_weights_path),
        "arch": run.model_spec.arch,
        "dataset": data.name,
        "data_sha256": data.fingerprint,
    }
    if data.fingerprint != config.data_fingerprint:
        provenance["note"] = "the data are not those that the run was trained on"
    return Subject(model, data, config.eps, provenance, run.path)


def open_checkpoint(
    path: Path,
    *,
    arch: str | None,
    dataset: str | None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """Opens a state dict of a named architecture.

    A state dict that holds no mean and standard deviation is of a network that takes [0, 1] images as they are.

    Args:
        path: The file.
        arch: As for `build_model`.
        dataset: As for `load_data`.
        data_dir: As for `load_data`.
        image_size: As for `load_data`.
        num_classes: How many logits the network has; by default as many as the data have classes.

    Raises:
        DeatError: Something is missing, or the parts do not fit each other.
    """
    tensors = load_tensors(path)
    if arch is None or dataset is None:
        missing = " and ".join(flag for flag, value in (("--arch", arch), ("--dataset", dataset)) if value is None)
        raise DeatError(f"{path} is a checkpoint, which does not say its network and data: give {missing}")
    data = load_data(dataset, data_dir=data_dir, image_size=image_size)
    classes = num_classes or len(data.classes)
    if classes < len(data.classes):
        raise DeatError(f"--num-classes {classes} is too few: {data.name} has {len(data.classes)} classes")
    model = build_model(arch, num_classes=classes, image_size=data.test.images.shape[-1])
    load_weights(model, tensors, source=str(path))
    provenance = {
        "weights": path.name,
        "weights_sha256": sha256_file(path),
        "arch": arch,
        "dataset": data.name,
        "data_sha256": data.fingerprint,
    }
    return Subject(model.eval(), data, 8 / 255, provenance)


def open_subject(
    path: str | Path,
    *,
    arch: str | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """Opens what `deat-rb eval` was given: a run directory, which says everything itself, or a checkpoint file.

    Args:
        path: Either.
        arch: See `open_checkpoint`, like what follows.
        dataset: Of a checkpoint.
        data_dir: Of a checkpoint; of a run only if its data have been moved.
        image_size: Of a checkpoint.
        num_classes: Of a checkpoint.

    Raises:
        DeatError: See `open_run` and `open_checkpoint`.
    """
    path = Path(path)
    if not path.is_dir():
        return open_checkpoint(
            path, arch=arch, dataset=dataset, data_dir=data_dir, image_size=image_size, num_classes=num_classes
        )
    of_checkpoints = {"--arch": arch, "--dataset": dataset, "--image-size": image_size, "--num-classes": num_classes}
    for flag, value in of_checkpoints.items():
        if value is not None:
            raise DeatError(f"{flag} {value} is for checkpoints: the run {path} says its network and data itself")
    return open_run(path, data_dir=data_dir)
