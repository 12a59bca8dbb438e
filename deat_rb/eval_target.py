"""Targets of an evaluation: a network with the data to evaluate it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import DEFAULT_EPS
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.images import LabeledImages, first_test_examples
from deat_rb.data.normalization import Normalization
from deat_rb.loading import Network, NetworkOptions, is_export, network_options, open_network
from deat_rb.models.check import trial_logits
from deat_rb.models.class_names import match_classes
from deat_rb.models.names import is_name
from deat_rb.models.spec import check_image_size
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.hub_run import open_hub
from deat_rb.utils.errors import DeatError
from deat_rb.utils.hub import is_hub
from deat_rb.utils.safe_load import load_state_dict


@dataclass(frozen=True, eq=False)
class EvalTarget:
    """A network with its evaluation data and metadata.

    Attributes:
        model: Module in eval mode, on the CPU, for images in [0, 1].
        data: Dataset whose test part is used.
        eps: Radius the network was trained for, in [0, 1] pixel units; 8/255 if unknown.
        norm: Norm the network was trained for, ``Linf`` or ``L2``; Linf if unknown.
        provenance: Origin of the network and the data.
        run: Path of the run directory, or None for other targets.
        classes: Class names in the order of the network's logits; if unknown, those of the data.
        logit_of_class: Index of the logit of each class of the data; empty if labels are logit indices.
    """

    model: nn.Module
    data: Dataset
    eps: float
    provenance: dict[str, str]
    run: Path | None = None
    classes: tuple[str, ...] = field(default=())
    logit_of_class: tuple[int, ...] = ()
    norm: str = "Linf"

    def radius(self, norm: str) -> float:
        """Return the radius to evaluate at in a norm: the network's own, or else 8/255 in Linf and 0.5 in L2."""
        return self.eps if norm == self.norm else DEFAULT_EPS[norm]

    def test_images(self, count: int | None = None) -> tuple[Tensor | LabeledImages, Tensor]:
        """Return test images, float32 (N, C, H, W) in [0, 1], and their labels as logit indices (N,).

        Images above the memory limit stay in their files. A smaller ``count`` gives the first images of a larger one.

        Raises:
            DeatError: ``count`` is less than 1 or more than the number of test images.
        """
        return first_test_examples(self.data.test, count, self.logit_of_class)


def open_target(
    target: str | Path,
    *,
    arch: str | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    normalization: Normalization | None = None,
    weights_key: str | None = None,
    model_dir: str | Path | None = None,
    norm: str = "Linf",
    memory_limit: int | None = None,
    trust_code: bool = False,
) -> EvalTarget:
    """Open a network and the data to evaluate it on.

    Args:
        target: A run directory or the ``.json`` of a leaderboard entry (both self-contained), a checkpoint or export,
            or a name, see `open_network`.
        arch: Architecture of a checkpoint.
        dataset: Dataset, as for `load_data`; required unless the target is a run or an entry.
        data_dir: Folder of the data; for a run, needed only if its data have moved or different data are to be used.
            The path recorded in a run from the Hub is never used.
        image_size: Size to which a folder's images are resized.
        num_classes: Number of logits of a checkpoint; by default the number of classes of the data.
        classes: Class names in the order of the logits, or a file with one name per line. Labels are then mapped by
            name; the data may have a subset of the classes, in any order.
        normalization: Mean and standard deviation, see `NetworkOptions`.
        weights_key: Key of the state dict in a checkpoint.
        model_dir: Folder of RobustBench's weights.
        norm: Threat model under which RobustBench lists the network.
        memory_limit: Maximum size of a folder's decoded test images in bytes; beyond it, images stay in their files.
            By default a run's own limit, and none for other targets.
        trust_code: See `load_model`.

    Raises:
        DeatError: The network or the data cannot be opened, or they do not fit each other.
    """
    options = network_options(
        arch=arch, num_classes=num_classes, image_size=image_size, classes=classes, normalization=normalization,
        weights_key=weights_key, model_dir=model_dir, norm=norm, trust_code=trust_code,
    )  # fmt: skip
    if not is_hub(target):
        return _open_local_target(target, options, dataset, data_dir, memory_limit)
    hub = open_hub(str(target))
    with hub.named():
        opened = _open_local_target(hub.path, options, dataset, data_dir, memory_limit, own_paths=False)
    provenance = hub.facts(opened.provenance)
    if hub.notes:
        provenance["note"] = "; ".join([*hub.notes, *([provenance["note"]] if "note" in provenance else [])])
    return replace(opened, run=None, provenance=provenance)


def _open_local_target(
    target: str | Path,
    options: NetworkOptions,
    dataset: str | None,
    data_dir: str | Path | None,
    memory_limit: int | None,
    *,
    own_paths: bool = True,
) -> EvalTarget:
    """Open a target on this machine; ``own_paths`` says whether the paths in a run's configuration are the user's."""
    path, arch, image_size = Path(target), options.arch, options.image_size
    named = is_name(str(target)) and not path.exists()
    if not named and (path.is_dir() or path.suffix == ".json"):
        kind = "run" if path.is_dir() else "entry"
        if dataset is not None:
            raise DeatError(f"--dataset {dataset} is only for checkpoints: the {kind} {path} specifies its network "
                            "and data")  # fmt: skip
        network = open_network(target, options)
        return (_of_run(path, network, data_dir, memory_limit, own_paths=own_paths) if path.is_dir()
                else _of_entry(path, network, data_dir, memory_limit))  # fmt: skip
    if dataset is None and named:
        raise DeatError(f"{target} does not specify its data: give the dataset to evaluate on with --dataset")
    if dataset is None:
        load_state_dict(path, options.weights_key)
        missing = "--dataset" if arch is not None or is_export(path) else "--arch and --dataset"
        raise DeatError(f"{path} does not specify its network and data: give {missing}")
    if named or arch is None:
        network = open_network(target, options, dataset=dataset)
        size = (image_size or network.image_size) if dataset == "folder" else image_size
        data = _load_test_data(dataset, data_dir, size, memory_limit)
    else:  # the number of classes may come from the data; invalid options are refused before the data are decoded
        load_state_dict(path, options.weights_key)
        check_image_size(arch, image_size, source=str(path), required=dataset == "folder")
        data = _load_test_data(dataset, data_dir, image_size, memory_limit)
        if options.num_classes is not None and options.num_classes < len(data.classes):
            raise DeatError(f"--num-classes {options.num_classes} is too few: {data.name} has {len(data.classes)} "
                            "classes")  # fmt: skip
        logits = options.num_classes or len(options.classes) or len(data.classes)
        network = open_network(target, replace(options, num_classes=logits), dataset=dataset)
    return combine(network, data)


def _load_test_data(
    dataset: str, data_dir: str | Path | None, image_size: int | None, memory_limit: int | None
) -> Dataset:
    return load_data(dataset, data_dir=data_dir, image_size=image_size, memory_limit=memory_limit, test_only=True)


def _of_run(
    path: Path, network: Network, data_dir: str | Path | None, memory_limit: int | None, *, own_paths: bool
) -> EvalTarget:
    run = RunDirectory.open(path)
    config = run.config
    own = config.data
    if own_paths:
        data_dir = data_dir or own.data_dir
    elif data_dir is None and own.dataset == "folder":
        raise DeatError("the network was trained on images of its author: give your own with --data-dir")
    limit = own.memory_limit if memory_limit is None else memory_limit
    data = _load_test_data(own.dataset, data_dir, own.image_size, limit)
    same_data = data.fingerprint == config.data_fingerprint
    if not same_data:
        network = replace(network, notes=(*network.notes, "the data differ from those that the run was trained on"))
    return replace(combine(network, data, same_data=same_data), run=run.path)


def _of_entry(path: Path, network: Network, data_dir: str | Path | None, memory_limit: int | None) -> EvalTarget:
    from deat_rb.leaderboard.datasets import load_entry_data
    from deat_rb.leaderboard.entry import read_entry

    entry = read_entry(path)
    data = load_entry_data(entry, None if data_dir is None else Path(data_dir), memory_limit)
    if data.fingerprint != entry.data_sha256:
        raise DeatError(f"{path} was measured on different data (SHA-256 {str(entry.data_sha256)[:12]}...) than those "
                        f"here ({data.fingerprint[:12]}...): check --data-dir")  # fmt: skip
    return combine(network, data, same_data=True)


def combine(network: Network, data: Dataset, *, same_data: bool = False) -> EvalTarget:
    """Combine a network and data; ``same_data`` means that it was trained or measured on them, in this label order."""
    images = torch.zeros(2, *data.test.shape)
    logits = trial_logits(network.model, images, source=network.source, advice="use other data or another model")
    matched = match_classes(data.classes, network.classes, logits.shape[1], source=network.source, dataset=data.name,
                            must_match=network.all_classes_known)  # fmt: skip
    provenance = {**network.provenance, "dataset": data.name, "data_sha256": data.fingerprint}
    notes = [*network.notes, *([matched.note] if matched.note and not same_data else []), *data.notes]
    eps = DEFAULT_EPS[network.norm] if network.eps is None else network.eps
    own, size = network.image_size, data.test.shape[-1]
    if own not in (None, size):
        notes.append(f"the network was trained on {own}x{own} images, but these are {size}x{size}")
    if notes:
        provenance["note"] = "; ".join(notes)
    return EvalTarget(network.model, data, eps, provenance, classes=matched.classes,
                      logit_of_class=matched.logit_of_class, norm=network.norm)  # fmt: skip
