"""What an evaluation is about: a trained network and the test images it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.images import interleave_classes
from deat_rb.models.check import trial_logits
from deat_rb.models.names import PRETRAINED, check_trust
from deat_rb.models.pretrained import load_from_factory, load_pretrained, load_zoo_model, zoo_file
from deat_rb.models.spec import build_model
from deat_rb.models.weights import load_weights
from deat_rb.robustbench.format import ExportPaths, exported_spec
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import sha256_file
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import parse_fraction


@dataclass(frozen=True, eq=False)
class EvalTarget:
    """A network, its test images and what is known of both.

    Attributes:
        model: In eval mode, on the CPU; takes images in [0, 1].
        data: The data set whose test part counts.
        eps: The radius it was trained for, in [0, 1] pixel units; 8/255 where that is not known.
        provenance: Where the network and the data come from.
        run: The run directory's path, or None for a bare checkpoint.
    """

    model: nn.Module
    data: Dataset
    eps: float
    provenance: dict[str, str]
    run: Path | None = None

    def examples(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The test images: float32 (N, C, H, W) in [0, 1], and labels (N,).

        The first ``count`` of a longer evaluation are the examples of a shorter one. See `interleave_classes`.

        Raises:
            DeatError: There are not that many.
        """
        test = interleave_classes(self.data.test)
        if count is None:
            return test.tensors()
        if not 1 <= count <= len(test):
            raise DeatError(f"--n-examples {count} is not possible with {len(test)} test images: "
                            f"give a number from 1 to {len(test)}")  # fmt: skip
        return test.first(count).tensors()


def load_model(path: str | Path, *, device: torch.device | str = "cpu", trust_code: bool = False) -> nn.Module:
    """Loads a trained network, in eval mode; it takes images in [0, 1].

    Args:
        path: A run directory, of which the selected checkpoint is taken, the ``.pt`` file of an export, or, in a
            leaderboard that holds the weights, the ``.json`` of an entry.
        device: Where to put it.
        trust_code: Whether a run may have its network built by the function ``package.module:factory`` that its
            ``config.json`` names, which runs code of that module.

    Raises:
        DeatError: There is no such run or file, it is damaged, nothing says of what architecture it is, or it would
            run code that is not trusted.
    """
    path = Path(path)
    if path.suffix == ".json":
        from deat_rb.leaderboard.weights import open_entry

        return open_entry(path)[1].to(device)
    if path.is_dir():
        run = RunDirectory.open(path)
        spec, weights = run.model_spec, run.selected_weights_path
        check_trust(run.model_spec.arch, trust_code, source=f"the run {path}")
    else:
        spec, weights = exported_spec(path), path
    model = spec.build()
    load_weights(model, load_tensors(weights), source=str(weights))
    return model.to(device).eval()


def open_run(path: Path, *, data_dir: str | Path | None = None, trust_code: bool = False) -> EvalTarget:
    """Opens a run with its selected checkpoint and the data it was trained on.

    Args:
        path: The run directory.
        data_dir: Where the data lie now, if they have been moved since.
        trust_code: See `load_model`.

    Raises:
        DeatError: It is no run, or its weights or its data cannot be had.
    """
    run = RunDirectory.open(path)
    config = run.config
    model = load_model(path, trust_code=trust_code)
    where = config.data
    data = load_data(where.dataset, data_dir=data_dir or where.data_dir, image_size=where.image_size)
    provenance = {
        "run": run.path.name,
        "method": config.attack.method,
        "weights": run.selected_weights_path.name,
        "weights_sha256": sha256_file(run.selected_weights_path),
        "arch": run.model_spec.arch,
        "dataset": data.name,
        "data_sha256": data.fingerprint,
    }
    if data.fingerprint != config.data_fingerprint:
        provenance["note"] = "the data are not those that the run was trained on"
    return EvalTarget(model, data, config.attack.eps, provenance, run.path)


def open_checkpoint(
    path: Path,
    *,
    arch: str | None,
    dataset: str | None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> EvalTarget:
    """Opens a state dict of a named architecture, or an export, which says its architecture itself.

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
    described = arch is not None or not _is_export(path)
    if dataset is None or (arch is None and described):
        wanted = (("--arch", arch if described else ""), ("--dataset", dataset))
        missing = " and ".join(flag for flag, value in wanted if value is None)
        raise DeatError(f"{path} is a checkpoint, which does not say its network and data: give {missing}")
    data = load_data(dataset, data_dir=data_dir, image_size=image_size)
    classes = num_classes or len(data.classes)
    if classes < len(data.classes):
        raise DeatError(f"--num-classes {classes} is too few: {data.name} has {len(data.classes)} classes")
    if arch is None:
        spec = exported_spec(path)
        arch, model = spec.arch, load_model(path)
        _check_takes(model, data, str(path))
    else:
        model = build_model(arch, num_classes=classes, image_size=data.test.shape[-1])
        load_weights(model, tensors, source=str(path))
    provenance = {"weights": path.name, "weights_sha256": sha256_file(path), "arch": arch, **_data_facts(data)}
    return EvalTarget(model.eval(), data, 8 / 255, provenance)


def _is_export(path: Path) -> bool:
    folder = path.absolute().parent.parent
    return ExportPaths.below(folder.parent.parent, folder.name, path.stem).info.exists()


def open_of_board(file: Path, *, data_dir: str | Path | None = None) -> EvalTarget:
    """Opens an entry of a leaderboard that holds its weights, and the data it was measured on.

    Args:
        file: The entry's ``.json``.
        data_dir: As for `load_data`.

    Raises:
        DeatError: See `deat_rb.leaderboard.weights.open_entry`; or the data cannot be had, or are others.
    """
    from deat_rb.leaderboard.datasets import load_entry_data
    from deat_rb.leaderboard.weights import open_entry

    entry, model = open_entry(file)
    data = load_entry_data(entry, None if data_dir is None else Path(data_dir))
    if data.fingerprint != entry.data_sha256:
        raise DeatError(f"{file} was measured on other data (SHA-256 {str(entry.data_sha256)[:12]}...) than those at "
                        f"hand ({data.fingerprint[:12]}...)")  # fmt: skip
    provenance = {"entry": entry.key, "weights_sha256": str(entry.weights_sha256), **_data_facts(data)}
    return EvalTarget(model, data, parse_fraction(entry.eps), provenance)


def open_named(
    target: str,
    *,
    dataset: str | None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    model_dir: str | Path = "models",
    norm: str = "Linf",
) -> EvalTarget:
    """Opens a network that has a name instead of a file.

    Args:
        target: ``robustbench:NAME`` or ``robustbench:DATASET/NAME``, where DATASET says for which of RobustBench's data
            sets it was trained if that is not the one it is evaluated on; ``torchvision:NAME`` or ``timm:NAME``, with
            the weights that come with it; or ``package.module:function``, which is called and returns the network.
        dataset: As for `load_data`.
        data_dir: As for `load_data`.
        image_size: As for `load_data`; by default, for torchvision and timm, the size they were trained for.
        model_dir: As for `robustbench.load_model`.
        norm: Of RobustBench's threat model.

    Raises:
        DeatError: The network or the data cannot be had, or do not fit each other.
    """
    if dataset is None:
        raise DeatError(f"{target} does not say on which data it is to be evaluated: give --dataset")
    kind, _, name = target.partition(":")
    provenance = {"model": target}
    if kind == "robustbench":
        zoo, slash, bare = name.rpartition("/")
        zoo = zoo if slash else dataset
        model = load_zoo_model(bare, dataset=zoo, norm=norm, model_dir=model_dir)
        file = zoo_file(bare, dataset=zoo, norm=norm, model_dir=model_dir)
        provenance |= {"weights": file.name, "weights_sha256": sha256_file(file)}
    elif kind in PRETRAINED:
        model, (height, _) = load_pretrained(target)
        image_size = image_size or (height if dataset == "folder" else None)
    else:
        model = load_from_factory(target)
    data = load_data(dataset, data_dir=data_dir, image_size=image_size)
    _check_takes(model, data, target)
    return EvalTarget(model, data, 8 / 255, provenance | _data_facts(data))


def _check_takes(model: nn.Module, data: Dataset, source: str) -> None:
    trial_logits(model, torch.zeros(2, *data.test.shape), source=source, min_classes=len(data.classes),
                 advice="use other data or another model")  # fmt: skip


def _data_facts(data: Dataset) -> dict[str, str]:
    return {"dataset": data.name, "data_sha256": data.fingerprint}


def open_target(
    target: str | Path,
    *,
    arch: str | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    model_dir: str | Path | None = None,
    norm: str = "Linf",
    trust_code: bool = False,
) -> EvalTarget:
    """Opens what `deat-rb eval` was given: a run directory, a board's entry, a checkpoint file, or a network's name.

    Args:
        target: A run directory or the ``.json`` of an entry of a leaderboard, which say everything themselves; another
            file, see `open_checkpoint`; or a name with a colon in it that is no file, see `open_named`.
        arch: Of a checkpoint.
        dataset: Of a checkpoint or a named network.
        data_dir: Of those; of a run only if its data have been moved.
        image_size: Of a checkpoint or a named network.
        num_classes: Of a checkpoint.
        model_dir: Of RobustBench's zoo.
        norm: Of the zoo's threat model.
        trust_code: Of a run; see `load_model`.

    Raises:
        DeatError: See `open_run`, `open_of_board`, `open_checkpoint` and `open_named`.
    """
    path = Path(target)
    given = {"--arch": arch, "--num-classes": num_classes, "--dataset": dataset, "--image-size": image_size}
    named = ":" in str(target) and not path.exists()
    of_board = path.suffix == ".json" and not named
    for flag, value in given.items():
        if value is not None and (path.is_dir() or of_board):
            kind = "entry" if of_board else "run"
            raise DeatError(f"{flag} {value} is for checkpoints: the {kind} {path} says its network and data itself")
        if value is not None and named and flag in ("--arch", "--num-classes"):
            raise DeatError(f"{flag} {value} is for checkpoints: {target} says its network itself")
    if model_dir is not None and not (named and str(target).startswith("robustbench:")):
        raise DeatError(f"--model-dir {model_dir} is for robustbench:NAME, which {target} is not")
    if path.is_dir():
        return open_run(path, data_dir=data_dir, trust_code=trust_code)
    if of_board:
        return open_of_board(path, data_dir=data_dir)
    if named:
        return open_named(
            str(target),
            dataset=dataset,
            data_dir=data_dir,
            image_size=image_size,
            model_dir=model_dir or "models",
            norm=norm,
        )
    return open_checkpoint(
        path, arch=arch, dataset=dataset, data_dir=data_dir, image_size=image_size, num_classes=num_classes
    )
