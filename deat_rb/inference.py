"""Classification of image files with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deat_rb.data.image_folder import read_image
from deat_rb.data.normalization import Normalization
from deat_rb.evaluation.frozen_model import prepared_for_eval
from deat_rb.loading import NetworkOptions, open_network
from deat_rb.models.class_names import read_class_names
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError

BATCH_SIZE = 64


class ClassScore(BaseModel):
    """One class with its softmax probability.

    Attributes:
        index: Index of the logit.
        name: Name of the class, or its index if names are unknown.
        confidence: Softmax probability, in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    confidence: float


class Prediction(BaseModel):
    """Predicted classes of one image.

    Attributes:
        image: Path of the image file.
        guesses: Most probable classes, most probable first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    guesses: tuple[ClassScore, ...]


def predict(
    path: str | Path,
    files: Sequence[str | Path],
    *,
    top: int = 1,
    device: torch.device | str | None = None,
    arch: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    normalization: Normalization | None = None,
    weights_key: str | None = None,
    model_dir: str | Path | None = None,
    trust_code: bool = False,
    notify: Callable[[str], None] | None = None,
) -> list[Prediction]:
    """Classify image files with a trained network.

    As in a folder of training images, the largest centered square of each image is resized to the network's size.

    Args:
        path: A run directory, whose selected checkpoint is loaded; an export's ``.pt`` file; another checkpoint; or a
            name, see `deat_rb.loading.open_network`.
        files: Image files.
        top: Number of classes to return per image, capped at the network's classes.
        device: Device of the computation; by default the CPU.
        arch: Architecture of a checkpoint.
        num_classes: Number of logits of a checkpoint; by default the number of ``classes``.
        image_size: Size to which images are resized, if the network does not specify it.
        classes: Class names in the order of the logits, or a file with one name per line.
        normalization: Mean and standard deviation, if neither the weights nor the network contain them.
        weights_key: Key of the state dict in a checkpoint.
        model_dir: Folder of RobustBench's weights.
        trust_code: See `deat_rb.load_model`.
        notify: Callback for notes to the user, such as which of a file's state dicts was loaded.

    Raises:
        DeatError: The network or an image cannot be read or used, or ``top`` is not positive.
    """
    if not isinstance(top, int) or top < 1:
        raise DeatError(f"--top {top} is invalid: give 1 or more")
    if not files or isinstance(files, str | Path):
        raise DeatError("files must be a list with at least one image file")
    where = resolve_device(str(device)) if device is not None else torch.device("cpu")
    names = read_class_names(classes) if isinstance(classes, str | Path) else tuple(classes or ())
    network = open_network(path, NetworkOptions(
        arch, num_classes, image_size, names, normalization, weights_key,
        None if model_dir is None else Path(model_dir), trust_code=trust_code,
    ))  # fmt: skip
    if notify is not None:
        for note in network.notes:
            notify(note)
    images = torch.stack([_read(Path(file), network.image_size or 32, network.channels) for file in files])
    with prepared_for_eval(network.model, images, batch_size=BATCH_SIZE, device=where) as prepared, torch.no_grad():
        logits = torch.cat([network.model(part.to(where)).double().cpu() for part in images.split(BATCH_SIZE)])
    if network.classes and len(network.classes) != prepared.num_classes:
        raise DeatError(f"{network.source} has {prepared.num_classes} logits but {len(network.classes)} class names: "
                        "give one name per logit")  # fmt: skip
    if bool(logits.isnan().any()):
        raise DeatError("the model returns NaN, so its training probably diverged: use an earlier checkpoint or "
                        "retrain with a smaller --lr")  # fmt: skip
    predictions = []
    for file, row in zip(files, logits.softmax(dim=1), strict=True):
        best = row.topk(min(top, len(row)))
        guesses = [
            ClassScore(index=index, name=network.classes[index] if network.classes else str(index),
                       confidence=confidence)
            for confidence, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]  # fmt: skip
        predictions.append(Prediction(image=str(file), guesses=tuple(guesses)))
    return predictions


def _read(file: Path, size: int, channels: int) -> Tensor:
    """Read an image as float32 (channels, size, size) in [0, 1]; if ``channels`` is not 3, the RGB mean is repeated."""
    if not file.is_file():
        raise DeatError(f"{file} does not exist or is not a file: give image files")
    image = torch.from_numpy(read_image(file, size).copy()).float() / 255
    return image if channels == 3 else image.mean(dim=0, keepdim=True).expand(channels, -1, -1)
