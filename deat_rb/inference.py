"""Classification of image files with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deat_rb.data.image_folder import decoding_pool, read_image
from deat_rb.data.normalization import Normalization
from deat_rb.evaluation.frozen_model import prepared_for_eval
from deat_rb.loading import Network, network_options, open_network
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError


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
        guesses: Most probable classes, most probable first; empty if the file cannot be read.
        error: Why the file cannot be read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    guesses: tuple[ClassScore, ...] = ()
    error: str | None = None


def predict(path: str | Path, files: Sequence[str | Path], **options: Any) -> list[Prediction]:
    """Classify image files with a trained network; the arguments are those of `iter_predictions`.

    Examples:
        >>> predictions = predict("runs/NAME", ["a.jpg", "b.jpg"], top_k=3)

    Raises:
        DeatError: The network cannot be opened, or an option is invalid. A file that cannot be read is not an error:
            its prediction has no guesses but an ``error``.
    """
    return list(iter_predictions(path, files, **options))


def iter_predictions(
    path: str | Path,
    files: Sequence[str | Path],
    *,
    top_k: int = 1,
    batch_size: int = 64,
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
) -> Iterator[Prediction]:
    """Classify image files with a trained network, batch by batch.

    As in a folder of training images, the EXIF orientation is applied and the largest centered square of each image is
    resized to the network's size.

    Args:
        path: A run directory, whose selected checkpoint is loaded; an export's ``.pt`` file; another checkpoint; or a
            name, see `deat_rb.loading.open_network`.
        files: Image files; `deat_rb.data.image_files.find_images` lists those of folders and patterns.
        top_k: Number of classes to return per image, up to 1000; capped at the network's classes.
        batch_size: Images per forward pass; only two batches are in memory.
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

    Returns:
        An iterator over the predictions, in the order of the files. The network is opened before this function returns.

    Raises:
        DeatError: The network cannot be opened, or an option is invalid; on iteration, if the network returns NaN.
    """
    for flag, value, most in (("--top-k", top_k, 1000), ("--batch-size", batch_size, 10**6)):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise DeatError(f"{flag} {value} is invalid: give 1 to {most}")
    if not files or isinstance(files, str | Path):
        raise DeatError("files must be a list with at least one image file")
    where = resolve_device(str(device)) if device is not None else torch.device("cpu")
    network = open_network(path, network_options(
        arch=arch, num_classes=num_classes, image_size=image_size, classes=classes, normalization=normalization,
        weights_key=weights_key, model_dir=model_dir, trust_code=trust_code,
    ))  # fmt: skip
    if notify is not None:
        for note in network.notes:
            notify(note)
    predictions = _predictions(network, [Path(file) for file in files], top_k, batch_size, where)
    next(predictions)  # checks the network
    return (each for each in predictions if each is not None)


def _predictions(
    network: Network, files: list[Path], top_k: int, batch_size: int, device: torch.device
) -> Iterator[Prediction | None]:
    """Yield None after checking the network, then the prediction of each file."""
    size = network.image_size or 32
    trial = torch.zeros(2, network.channels, size, size)
    with prepared_for_eval(network.model, trial, batch_size=batch_size, device=device) as prepared:
        if network.classes and len(network.classes) != prepared.num_classes:
            raise DeatError(f"{network.source} has {prepared.num_classes} logits but {len(network.classes)} class "
                            "names: give one name per logit")  # fmt: skip
        names = network.classes or tuple(map(str, range(prepared.num_classes)))
        yield None
        for batch in _decoded(files, batch_size, partial(_read, size=size, channels=network.channels)):
            images = [image for _, image in batch if isinstance(image, Tensor)]
            rows: Iterator[Tensor] = iter(())
            if images:
                with torch.no_grad():
                    logits = network.model(torch.stack(images).to(device)).cpu().double()
                if bool(logits.isnan().any()):
                    raise DeatError("the model returns NaN, so its training probably diverged: use an earlier "
                                    "checkpoint or retrain with a smaller --lr")  # fmt: skip
                rows = iter(logits.softmax(dim=1))
            for file, image in batch:
                if isinstance(image, DeatError):
                    yield Prediction(image=str(file), error=str(image))
                    continue
                best = next(rows).topk(min(top_k, len(names)))
                guesses = tuple(
                    ClassScore(index=index, name=names[index], confidence=confidence)
                    for confidence, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                )
                yield Prediction(image=str(file), guesses=guesses)


def _decoded(
    files: list[Path], batch_size: int, read: Callable[[Path], Tensor | DeatError]
) -> Iterator[list[tuple[Path, Tensor | DeatError]]]:
    """Yield batches of decoded images; the next batch is decoded by threads in the meantime."""
    ahead: list[tuple[Path, Future[Tensor | DeatError]]] = []
    with decoding_pool() as pool:
        try:
            for start in range(0, len(files), batch_size):
                ready = ahead
                ahead = [(file, pool.submit(read, file)) for file in files[start : start + batch_size]]
                if ready:
                    yield [(file, future.result()) for file, future in ready]
            yield [(file, future.result()) for file, future in ahead]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(file: Path, size: int, channels: int) -> Tensor | DeatError:
    """Read an image as float32 (channels, size, size) in [0, 1]; if ``channels`` is not 3, the RGB mean is repeated."""
    if not file.is_file():
        return DeatError(f"{file} does not exist or is not a file: give image files")
    try:
        image = torch.from_numpy(read_image(file, size).copy()).float() / 255
    except DeatError as error:
        return error
    return image if channels == 3 else image.mean(dim=0, keepdim=True).expand(channels, -1, -1)
