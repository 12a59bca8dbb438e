"""Classification of image files with a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from deat_rb.data.image_folder import read_image
from deat_rb.loading import load_model
from deat_rb.models.spec import ModelSpec
from deat_rb.robustbench.format import exported_spec
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state

BATCH_SIZE = 64


class ClassScore(BaseModel):
    """One class with its softmax probability.

    Attributes:
        index: Index of the logit.
        name: Name of the class; the index, where names are not known.
        confidence: Softmax probability, in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    confidence: float


class Prediction(BaseModel):
    """Predicted classes of one image.

    Attributes:
        image: The file.
        guesses: The classes with the highest probabilities, highest first.
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
    trust_code: bool = False,
) -> list[Prediction]:
    """Classifies image files by a trained network.

    As in a folder of training images, the largest centred square of each is resized to what the network takes.

    Args:
        path: A run directory, of which the selected checkpoint is taken, or the ``.pt`` file of an export.
        files: The images.
        top: How many classes are wanted for each; of fewer classes all.
        device: Where to run; by default the CPU.
        trust_code: See `deat_rb.load_model`.

    Raises:
        DeatError: If the run or an image cannot be used, or ``top`` is not positive.
    """
    if not isinstance(top, int) or top < 1:
        raise DeatError(f"--top {top} is not possible: give 1 or more")
    if not files or isinstance(files, str | Path):
        raise DeatError("no list of images was given; give the names of one or more image files")
    where = resolve_device(str(device)) if device is not None else torch.device("cpu")
    spec, names = _described(Path(path))
    images = torch.stack([_read(Path(file), spec) for file in files])
    model = load_model(path, device=where, trust_code=trust_code)
    confidences = _confidences(model, images, where)
    found = []
    for file, row in zip(files, confidences, strict=True):
        best = row.topk(min(top, len(row)))
        guesses = [
            ClassScore(index=index, name=names[index] if index < len(names) else str(index), confidence=confidence)
            for confidence, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        found.append(Prediction(image=str(file), guesses=tuple(guesses)))
    return found


def _confidences(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Softmax probabilities (N, K) of images (N, C, H, W), on the CPU."""
    with preserve_state(model), torch.no_grad():
        parts = [model(part.to(device)).double().softmax(dim=1).cpu() for part in images.split(BATCH_SIZE)]
    confidences = torch.cat(parts)
    if bool(confidences.isnan().any()):
        raise DeatError("the model gives NaN; a model that has diverged cannot predict")
    return confidences


def _read(file: Path, spec: ModelSpec) -> Tensor:
    if not file.is_file():
        raise DeatError(f"{file} is not there, or is no file; give image files")
    image = torch.from_numpy(read_image(file, spec.image_size).copy()).float() / 255
    return image if spec.channels == 3 else image.mean(dim=0, keepdim=True).expand(spec.channels, -1, -1)


def _described(path: Path) -> tuple[ModelSpec, tuple[str, ...]]:
    """The network of a run or an export, and the names of its classes, where they are known."""
    if not path.is_dir():
        return exported_spec(path), ()
    config = RunDirectory.open(path).config
    return config.network, config.classes
