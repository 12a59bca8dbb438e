"""Export of a trained network as an ONNX file or a `torch.export` program, checked against the network."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from deat_rb.loading import Network, network_options, open_network
from deat_rb.models.check import first_line, trial_logits
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.files import atomic_write
from deat_rb.utils.units import format_fraction

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
"""Suffixes of the files by format."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra ``onnx``."""

CHECKED_BATCHES = (1, 2, 5)
"""Sizes of the batches of random images on which the file is compared with the network."""

TOLERANCE = 1e-3
"""Largest accepted difference of a logit, relative to the largest logit (at least 1)."""

MAX_ONNX = 2**31 - 2**20
"""Largest ONNX file in bytes; protobuf cannot store more than 2 GiB."""


@dataclass(frozen=True)
class Deployed:
    """An exported network.

    Attributes:
        path: The file.
        difference: Largest absolute difference of a logit from the network's, on random images in [0, 1].
        largest_logit: Largest absolute logit of these images.
        classes: Class names in the order of the logits; empty if unknown.
        notes: Sentences for the user, such as that a cached model of the Hub was used.
    """

    path: Path
    difference: float
    largest_logit: float
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def deploy(
    target: str | Path,
    *,
    format: Literal["onnx", "torch-export"],
    output: str | Path = ".",
    overwrite: bool = False,
    **options: Any,
) -> Deployed:
    """Write a trained network as one file that serves batches of any size without deat_rb.

    The file takes float32 images (N, C, H, W) in [0, 1] and returns logits (N, K); the normalization is included. Its
    metadata name the classes, the input and the origin: ``metadata_props`` of an ONNX model, the extra file
    ``metadata.json`` of a program (`torch.export.load(path, extra_files={"metadata.json": ""})`).

    Args:
        target: A run directory, an export's ``.pt`` file, another checkpoint, the ``.json`` of a leaderboard entry, or
            a name, as for `deat_rb.loading.open_network`.
        format: ``onnx``, checked with onnxruntime, or ``torch-export``.
        output: The file, or the folder for it.
        overwrite: Whether to replace an existing file.
        options: Arguments of `deat_rb.inference.iter_predictions` that describe the network: ``arch``, ``num_classes``,
            ``image_size``, ``classes``, ``normalization``, ``weights_key``, ``model_dir`` and ``trust_code``.

    Raises:
        DeatError: The network cannot be opened or converted, a package is missing, the file exists or cannot be
            written, or the logits of the converted network differ.
    """
    if format not in SUFFIXES:
        raise DeatError(f"--format {format} is unknown: {did_you_mean(format, SUFFIXES)}")
    if format == "onnx":
        _require_packages()
    path = _file(Path(output), _stem(target), SUFFIXES[format])
    if path.exists() and not overwrite:
        raise DeatError(f"{path} exists: choose another --output, or use --overwrite (overwrite=True)")
    if not path.parent.is_dir():
        raise DeatError(f"the folder {path.parent} for {path.name} does not exist: create it")
    network = open_network(target, network_options(**options))
    size = network.image_size or 32
    batches = _random_batches(network.channels, size)
    with torch.no_grad(), _quiet(), seeding.preserved():
        expected = [_logits(network, images) for images in batches]
        metadata = _metadata(network, size, expected[0].shape[1])
        convert = _onnx if format == "onnx" else _torch_export
        content, run = convert(_Logits(network.model).eval(), batches[1], metadata, source=str(target))
        found = [run(images) for images in batches]
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(logits.abs().max()) for logits in expected)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise DeatError(f"the logits of the converted network differ by up to {difference:.2g} from those of {target}, "
                        f"so {path} was not written: use another --format")  # fmt: skip
    atomic_write(path, content)
    return Deployed(path, difference, largest, network.classes, network.notes)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DeatError(
            f"--format onnx needs {', '.join(missing)}, which must be installed: pip install 'deat-rb[onnx]'"
        )


def _stem(target: str | Path) -> str:
    path = Path(target)
    name = path.resolve().name if path.is_dir() else path.stem if path.exists() else str(target)
    return "".join(char if char.isalnum() or char in "._+%-" else "-" for char in name)


def _file(output: Path, stem: str, suffix: str) -> Path:
    if output.is_dir():
        return output / f"{stem}{suffix}"
    if output.suffix != suffix:
        raise DeatError(f"--output {output} is neither an existing folder nor a file name ending in {suffix}")
    return output


def _random_batches(channels: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, channels, size, size, generator=generator) for count in CHECKED_BATCHES]


def _logits(network: Network, images: Tensor) -> Tensor:
    logits = trial_logits(network.model, images, source=network.source, advice="it cannot be converted")
    if not bool(logits.isfinite().all()):
        raise DeatError(f"{network.source} returns NaN or infinity, so its training probably diverged: use an earlier "
                        "checkpoint or retrain with a smaller --lr")  # fmt: skip
    return logits


def _metadata(network: Network, size: int, num_classes: int) -> dict[str, str]:
    """Return a file's metadata: input, output, classes and origin as strings; classes and numbers as JSON."""
    if network.classes and len(network.classes) != num_classes:
        raise DeatError(f"{network.source} has {num_classes} logits but {len(network.classes)} class names: "
                        "give one name per logit")  # fmt: skip
    facts = {
        "producer": f"deat-rb {importlib.import_module('deat_rb').__version__}",
        "input": f"images: float32 (N, {network.channels}, {size}, {size}), RGB in [0, 1], not normalized",
        "output": f"logits: float32 (N, {num_classes})",
        "classes": json.dumps(network.classes),
        "norm": "" if network.eps is None else network.norm,
        "eps": "" if network.eps is None else format_fraction(network.eps),
        **{name: value for name, value in network.provenance.items() if name != "note"},
    }
    for name, buffer in (("mean", "mu"), ("std", "sigma")):
        value = getattr(network.model, buffer, None)
        if isinstance(value, Tensor):
            facts[name] = json.dumps([round(number, 6) for number in value.flatten().tolist()])
    return {name: value for name, value in facts.items() if value}


Run = Callable[[Tensor], Tensor]


def _torch_export(model: nn.Module, images: Tensor, metadata: dict[str, str], *, source: str) -> tuple[bytes, Run]:
    with _conversion_of(source, "torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        for node in program.graph.nodes:  # paths of this machine's source files
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(name, None)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
        loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), loaded


def _onnx(model: nn.Module, images: Tensor, metadata: dict[str, str], *, source: str) -> tuple[bytes, Run]:
    onnx: Any = importlib.import_module("onnx")
    runtime: Any = importlib.import_module("onnxruntime")
    with _conversion_of(source, "torch.onnx"):
        program: Any = torch.onnx.export(
            model, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        proto = program.model_proto
        graphs = [proto.graph, *proto.functions]
        for part in (node for graph in graphs for node in graph.node):  # paths of this machine's source files
            del part.metadata_props[:]
            part.doc_string = ""
        proto.producer_name, proto.doc_string = "deat-rb", ""
        onnx.helper.set_model_props(proto, metadata)
        if proto.ByteSize() > MAX_ONNX:
            raise DeatError(f"{source} has too many weights for one ONNX file, which stores at most 2 GiB: "
                            "use --format torch-export")  # fmt: skip
        content: bytes = proto.SerializeToString()
        onnx.checker.check_model(content)
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))


@contextmanager
def _conversion_of(source: str, how: str) -> Iterator[None]:
    try:
        yield
    except DeatError:
        raise
    except Exception as error:  # any exception: networks may contain code that cannot be traced
        raise DeatError(f"{source} cannot be converted with {how} ({type(error).__name__}: {first_line(error)}): "
                        "use another --format, or a network without control flow that depends on values"
                        ) from error  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converters, which warn about their own deprecations and log every step."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and onnxscript's own calls
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
