"""Loaders for trained networks: runs, checkpoints, exports, leaderboard entries, names, and models on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deat_rb.data.normalization import Normalization
from deat_rb.models.class_names import read_class_names
from deat_rb.models.names import PRETRAINED, canonical_arch, check_trust, is_name
from deat_rb.models.pretrained import load_from_factory, load_pretrained, load_zoo_model, zoo_classes, zoo_file
from deat_rb.models.spec import NormalizedModel, check_image_size, model_spec
from deat_rb.models.weights import detect_variant, load_weights, strip_wrappers
from deat_rb.robustbench.format import ExportPaths, exported_spec
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.hub_run import open_hub
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import sha256_file
from deat_rb.utils.hub import is_hub
from deat_rb.utils.safe_load import load_state_dict, load_tensors
from deat_rb.utils.units import parse_fraction

IMAGENET_EPS = 4 / 255
"""Radius at which RobustBench evaluates models of ImageNet."""


@dataclass(frozen=True)
class NetworkOptions:
    """Settings that a target may not specify: options of `deat-rb eval`, `predict` and `export` about the network.

    Attributes:
        arch: Architecture of a checkpoint, as for `build_model`.
        num_classes: Number of logits of a checkpoint's network.
        image_size: Height and width to which a folder's images are resized.
        classes: Class names in the order of the logits.
        normalization: Mean and standard deviation of a network that expects normalized images, if neither the weights
            nor the model contain them.
        weights_key: Key of the state dict in a checkpoint, as for `deat_rb.utils.safe_load.load_state_dict`.
        model_dir: Folder of RobustBench's weights, as for `robustbench.load_model`.
        norm: Threat model under which RobustBench lists the network.
        trust_code: Whether a run may build its network with the ``package.module:factory`` that it names.
    """

    arch: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    classes: tuple[str, ...] = ()
    normalization: Normalization | None = None
    weights_key: str | None = None
    model_dir: Path | None = None
    norm: str = "Linf"
    trust_code: bool = False

    def refuse(self, reason: str, *allowed: str) -> None:
        """Raise an error if an option is set that is not ``allowed``.

        Raises:
            DeatError: Such an option is set; the message names the first one.
        """
        for name, value in vars(self).items():
            if name not in ("norm", "trust_code", *allowed) and value not in (None, ()):
                flag = {"normalization": "--mean, --std, --normalize"}.get(name, f"--{name.replace('_', '-')}")
                text = f" {value}" if isinstance(value, str | int | Path) else ""
                raise DeatError(f"{flag}{text} is {reason}")


def network_options(
    *,
    classes: str | Path | Sequence[str] | None = None,
    model_dir: str | Path | None = None,
    **options: Any,
) -> NetworkOptions:
    """Return `NetworkOptions`, with class names also from a file with one name per line.

    Raises:
        DeatError: The file cannot be read, or names a class twice.
    """
    names = read_class_names(classes) if isinstance(classes, str | Path) else tuple(classes or ())
    return NetworkOptions(classes=names, model_dir=None if model_dir is None else Path(model_dir), **options)


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        model: Module in eval mode, on the CPU, for images in [0, 1].
        source: Name of the network in error messages.
        provenance: Origin of the network.
        classes: Class names in the order of the logits; empty if unknown.
        all_classes_known: Whether ``classes`` come from the user, a run or an entry; any other class is then an error.
        image_size: Height and width of the input images; None if any size works or it is unknown.
        channels: Number of input channels.
        eps: Radius the network was trained for, in [0, 1] pixel units; None if unknown.
        norm: Norm the network was trained for, ``Linf`` or ``L2``; Linf if unknown.
        notes: Sentences for the user.
    """

    model: nn.Module
    source: str
    provenance: dict[str, str]
    classes: tuple[str, ...] = ()
    all_classes_known: bool = True
    image_size: int | None = None
    channels: int = 3
    eps: float | None = None
    norm: str = "Linf"
    notes: tuple[str, ...] = ()


def load_model(path: str | Path, *, device: torch.device | str = "cpu", trust_code: bool = False) -> NormalizedModel:
    """Load a trained network in eval mode; it takes images in [0, 1], and its ``classes`` are the class names.

    Args:
        path: A run directory, whose selected checkpoint is loaded; a run on the Hugging Face Hub, such as
            ``hf:owner/name`` or ``hf:owner/name@revision``; the ``.pt`` file of an export; or the ``.json`` of an entry
            on a leaderboard that stores the weights.
        device: Device of the network.
        trust_code: Whether a run may build its network with the ``package.module:factory`` that its ``config.json``
            names, which runs that module's code.

    Raises:
        DeatError: The run or file does not exist or is damaged, its architecture is unknown, or loading it would run
            untrusted code.
    """
    if is_hub(path):
        hub = open_hub(str(path))
        with hub.named():
            network = _open_self_contained(hub.path, trust_code)
    else:
        network = _open_self_contained(Path(path), trust_code)
    model = network.model
    assert isinstance(model, NormalizedModel)
    model.classes = network.classes
    return model.to(device)


def _open_self_contained(path: Path, trust_code: bool) -> Network:
    if path.suffix == ".json":
        return _open_entry(path)
    return _open_run(path, trust_code) if path.is_dir() else _open_export(path)


def open_network(target: str | Path, options: NetworkOptions, *, dataset: str | None = None) -> Network:
    """Open the network of a run directory, leaderboard entry, checkpoint, export, or name.

    Args:
        target: A path or a name: ``hf:OWNER/NAME``, a run on the Hugging Face Hub, or ``hf:OWNER/NAME/FILE``, a
            checkpoint there, both with ``@REVISION`` if wanted; ``robustbench:NAME`` or ``robustbench:DATASET/NAME``,
            where DATASET is the RobustBench dataset that it was trained on; ``torchvision:NAME`` or ``timm:NAME``, with
            the package's pretrained weights; or ``package.module:function``, which is called and returns the network.
        options: Settings that the target does not specify.
        dataset: Dataset for the evaluation, if any.

    Raises:
        DeatError: The network cannot be opened, a required option is missing, or an option is given that the target
            already specifies.
    """
    if is_hub(target):
        hub = open_hub(str(target))
        with hub.named():
            network = _open_local(hub.path, options, dataset)
        return replace(network, source=hub.address, provenance=hub.facts(network.provenance),
                       notes=(*hub.notes, *network.notes))  # fmt: skip
    return _open_local(target, options, dataset)


def _open_local(target: str | Path, options: NetworkOptions, dataset: str | None) -> Network:
    path = Path(target)
    if path.is_dir():
        options.refuse(f"only for checkpoints: the run {path} specifies its network and data", "classes")
        network = _open_run(path, options.trust_code)
        if options.classes and network.classes:
            raise DeatError(f"--classes is only for networks without class names: the run {path} has its own")
        return replace(network, classes=network.classes or options.classes)
    if is_name(str(target)) and not path.exists():
        options.refuse(f"only for checkpoints: {target} specifies its network", "image_size", "classes",
                       "normalization", *(["model_dir"] if str(target).startswith("robustbench:") else []))  # fmt: skip
        return _completed(_open_named(str(target), options, dataset), options)
    if options.model_dir is not None:
        raise DeatError(f"--model-dir {options.model_dir} is only for robustbench:NAME, not for {target}: omit it")
    if path.suffix == ".json":
        options.refuse(f"only for checkpoints: the entry {path} specifies its network and data")
        return _open_entry(path)
    if options.arch is None and is_export(path):
        options.refuse(f"only for checkpoints: the export {path} specifies its network", "classes", "image_size")
        return _completed(_open_export(path), options)
    return _completed(_open_checkpoint(path, options, dataset), options)


def _open_run(path: Path, trust_code: bool) -> Network:
    run = RunDirectory.open(path)
    spec, config, weights = run.model_spec, run.config, run.selected_weights_path
    check_trust(spec.arch, trust_code, source=f"the run {path}")
    model = spec.build()
    load_weights(model, load_tensors(weights), source=str(weights))
    provenance = {
        "run": run.path.name,
        "method": config.attack.method,
        "weights": weights.name,
        "weights_sha256": sha256_file(weights),
        "arch": spec.arch,
    }
    notes = (f"training has not ended: the run has {run.unfinished}",) if run.unfinished else ()
    return Network(model.eval(), f"the run {path}", provenance, config.classes, True, spec.image_size, spec.channels,
                   config.attack.eps, config.attack.norm, notes)  # fmt: skip


def _open_export(path: Path) -> Network:
    spec = exported_spec(path)
    model = spec.build()
    load_weights(model, load_tensors(path), source=str(path))
    return Network(model.eval(), str(path), _file_facts(path, spec.arch), (), False, spec.image_size, spec.channels)


def _open_entry(file: Path) -> Network:
    from deat_rb.leaderboard.weights import open_entry

    entry, model = open_entry(file)
    provenance = {"entry": entry.key, "weights_sha256": str(entry.weights_sha256)}
    size, channels = (entry.model.image_size, entry.model.channels) if entry.model is not None else (None, 3)
    return Network(model, str(file), provenance, tuple(entry.classes or ()), True, size, channels,
                   parse_fraction(entry.eps), entry.threat_model)  # fmt: skip


def _open_checkpoint(path: Path, options: NetworkOptions, dataset: str | None) -> Network:
    """Open a state dict; without a mean and standard deviation, images in [0, 1] are not normalized."""
    weights = load_state_dict(path, options.weights_key)
    bare = strip_wrappers(weights.tensors)
    if options.arch is None:
        raise DeatError(f"{path} does not specify its network{' and data' if dataset else ''}: give --arch")
    arch = detect_variant(canonical_arch(options.arch), bare)
    if options.normalization is not None and "mu" in bare:
        raise DeatError(f"{path} already contains a mean and standard deviation: omit --mean, --std and --normalize")
    check_image_size(arch, options.image_size, source=str(path), required=dataset in (None, "folder"))
    mean, std = options.normalization or (None, None)
    classes = options.num_classes or len(options.classes) or None
    if classes is None:
        raise DeatError(f"{path} does not specify its number of classes: give --classes or --num-classes")
    spec = model_spec(arch, num_classes=classes, image_size=options.image_size, mean=mean, std=std)
    model = spec.build()
    load_weights(model, weights.tensors, source=str(path))
    notes = [weights.note] if weights.note else []
    if arch != canonical_arch(options.arch):
        notes.append(f"the weights are for {arch}, not {options.arch}")
    provenance = {**_file_facts(path, arch), **_normalization_facts(options)}
    if weights.key is not None:
        provenance["weights_key"] = weights.key
    return Network(model.eval(), str(path), provenance, (), False, spec.image_size, spec.channels, notes=tuple(notes))


def _open_named(target: str, options: NetworkOptions, dataset: str | None) -> Network:
    kind, _, name = target.partition(":")
    provenance = {"model": target, **_normalization_facts(options)}
    if kind not in (*PRETRAINED, "robustbench"):
        check_image_size(target, options.image_size, source=target, required=dataset in (None, "folder"))
        model = load_from_factory(target)
        if options.normalization is not None:
            model = NormalizedModel(model, *options.normalization).eval()
        return Network(model, target, provenance, (), False, options.image_size)
    if options.normalization is not None:
        raise DeatError(f"{target} already contains a mean and standard deviation: omit --mean, --std and --normalize")
    if kind == "robustbench":
        zoo, slash, bare = name.rpartition("/")
        if not slash and dataset not in compat.DATASETS:
            raise DeatError(f"{target} does not specify the RobustBench dataset it was trained on: give "
                            f"robustbench:DATASET/{bare} with one of {', '.join(compat.DATASETS)}")  # fmt: skip
        zoo = zoo if slash else str(dataset)
        if zoo == "imagenet":
            check_image_size(target, options.image_size, source=target, required=dataset in (None, "folder"))
        model_dir = options.model_dir or "models"
        model = load_zoo_model(bare, dataset=zoo, norm=options.norm, model_dir=model_dir)
        file = zoo_file(bare, dataset=zoo, norm=options.norm, model_dir=model_dir)
        provenance |= {"weights": file.name, "weights_sha256": sha256_file(file)}
        is_imagenet = zoo == "imagenet"
        return Network(model, target, provenance, zoo_classes(zoo), False, options.image_size if is_imagenet else 32,
                       eps=IMAGENET_EPS if is_imagenet else None, norm=options.norm)  # fmt: skip
    model, (height, _), classes = load_pretrained(target)
    return Network(model, target, provenance, classes, False, options.image_size or height)


def _completed(network: Network, options: NetworkOptions) -> Network:
    """Return the network with the user's class names; refuse an image size that is not its own."""
    if options.image_size not in (None, network.image_size):
        raise DeatError(f"--image-size {options.image_size} differs from the {network.image_size} pixels of "
                        f"{network.source}: omit it")  # fmt: skip
    return replace(network, classes=options.classes, all_classes_known=True) if options.classes else network


def is_export(path: Path) -> bool:
    """Return whether a file of weights is part of an export in RobustBench's format."""
    return ExportPaths.beside(path).info.exists()


def _file_facts(path: Path, arch: str) -> dict[str, str]:
    return {"weights": path.name, "weights_sha256": sha256_file(path), "arch": arch}


def _normalization_facts(options: NetworkOptions) -> dict[str, str]:
    if options.normalization is None:
        return {}
    mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in options.normalization)
    return {"normalization": f"mean {mean}; std {std}"}
