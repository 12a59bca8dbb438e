"""Trained networks in RobustBench's form, and RobustBench made to know them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb import compat
from deat_rb.errors import DeatError
from deat_rb.evaluation.report import Report
from deat_rb.files import load_tensors, read_json, sha256_file, write_together
from deat_rb.models import (
    PREACTRESNET18,
    ModelSpec,
    bare_names,
    check_weights,
    load_weights,
    model_spec,
    robustbench_class,
)
from deat_rb.runs import RunDirectory
from deat_rb.threat import format_fraction

NAME = re.compile(r"[A-Z][A-Za-z-]*[0-9]{4}[A-Z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", re.ASCII)
SPELLED = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "scikit-learn's digits", "folder": "a folder"}
UNKNOWN = "nan"
"""An accuracy that was not measured. RobustBench reads the field with ``float``: it crashes on None or "None"."""
FULL_TEST_SET = 10_000
PAPER = {
    "link": "https://arxiv.org/abs/2103.03076",
    "name": "Gradient-Guided Dynamic Efficient Adversarial Training",
    "authors": "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan",
    "venue": "arXiv, Mar 2021",
}
PAPERS_OWN = re.compile(r"m\+|m-deat|deat-")


@dataclass(frozen=True)
class ExportPaths:
    """What an export consists of.

    Attributes:
        weights: ``models/<dataset>/Linf/<name>.pt``, a state dict.
        info: ``model_info/<dataset>/Linf/<name>.json``.
        source: ``pull_request/<dataset>/Linf/<name>.py``: the class and the zoo entry that RobustBench lacks.
        unknown: The fields of ``info`` that no evaluation of the run has a figure for.
    """

    weights: Path
    info: Path
    source: Path
    unknown: tuple[str, ...]

    @classmethod
    def below(cls, folder: Path, dataset: str, name: str, unknown: tuple[str, ...] = ()) -> ExportPaths:
        """Names the files of an export below ``folder``."""
        weights, info, source = (
            folder / kind / dataset / "Linf" / f"{name}.{suffix}"
            for kind, suffix in (("models", "pt"), ("model_info", "json"), ("pull_request", "py"))
        )
        return cls(weights, info, source, unknown)


def export(
    run: str | Path,
    *,
    model_name: str,
    output: str | Path,
    as_dataset: str | None = None,
    link: str | None = None,
    name: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    additional_data: bool = False,
    reported: float | None = None,
    external: float | None = None,
    unreliable: bool | None = None,
    footnote: str | None = None,
    overwrite: bool = False,
) -> ExportPaths:
    """Writes a run's selected network in RobustBench's form. Either all files are written or none.

    Accuracies come from the run's ``eval.json``; those it does not have are "nan". ``reported`` is the lowest of its
    robust accuracies unless given. Of methods that the paper introduces, link, name, authors and venue are the paper's;
    of others they are empty unless given.

    Args:
        run: The run directory.
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>``, with a suffix for variants: ``Wang2021Gradient_R18``.
        output: The folder below which the files go.
        as_dataset: Which of RobustBench's data sets the run's data stand for, if they are not one.
        link: Of the paper.
        name: The paper's title.
        authors: The paper's, with commas.
        venue: The paper's, with the year.
        additional_data: Whether other training images were used, too.
        reported: Robust accuracy that the authors report, in percent.
        external: Best known robust accuracy, in percent, which decides RobustBench's ranking.
        unreliable: Whether AutoAttack's figure is not to be relied on.
        footnote: Added to what the export says by itself.
        overwrite: Whether an export of that name may be replaced.

    Raises:
        DeatError: RobustBench has no such data set or architecture, the name is malformed or taken, the evaluation is
            of other weights, or the files cannot be written.
    """
    if NAME.fullmatch(model_name) is None:
        raise DeatError(f"model name '{model_name}' does not have RobustBench's form <FirstAuthor><Year><Word>, "
                        "with a suffix after _ for variants: Wang2021Gradient_R18")  # fmt: skip
    opened = RunDirectory.open(Path(run))
    spec, config = opened.model_spec, opened.config
    dataset = _dataset(config.dataset, as_dataset, spec)
    model = spec.build()
    load_weights(model, load_tensors(opened.selected_weights_path), source=str(opened.selected_weights_path))
    figures, n_examples = _figures(opened)
    credit = PAPER if PAPERS_OWN.match(config.method) else dict.fromkeys(PAPER, "")
    given = {"link": link, "name": name, "authors": authors, "venue": venue}
    info: dict[str, Any] = {
        **{field: credit[field] if text is None else text for field, text in given.items()},
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": spelled_architecture(spec),
        "eps": format_fraction(config.eps),
        **figures,
        **({} if reported is None else {"reported": _percent(reported)}),
        **({} if external is None else {"external": _percent(external)}),
        **({} if unreliable is None else {"unreliable": unreliable}),
    }
    notes = (
        f"Trained with deat-rb, method {config.method}.",
        _stand_in_note(config, dataset),
        f"Accuracies on {n_examples} test images." if 0 < n_examples < FULL_TEST_SET else "",
        footnote,
    )
    info["footnote"] = " ".join(note for note in notes if note)
    unknown = tuple(field for field, value in info.items() if value == UNKNOWN)
    paths = ExportPaths.below(Path(output), dataset, model_name, unknown)
    contents = {
        paths.weights: robustbench_weights(model),
        paths.source: model_source(model_name, dataset, spec).encode(),
        paths.info: json.dumps(info, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    for path in contents:
        if path.exists() and not overwrite:
            raise DeatError(f"{path} exists: choose another model name or allow it to be overwritten")
    try:
        for path in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write below {output}: {error.strerror or error}") from error
    write_together(contents)
    return paths


def _dataset(trained_on: str, as_dataset: str | None, spec: ModelSpec) -> str:
    if as_dataset is None and trained_on not in compat.DATASETS:
        raise DeatError(f"RobustBench has no data set '{trained_on}': say with as_dataset which of "
                        f"{', '.join(compat.DATASETS)} it stands for")  # fmt: skip
    dataset = as_dataset or trained_on
    compat.check_dataset(dataset)
    if dataset == "imagenet":
        raise DeatError("dataset imagenet has 224x224 images in RobustBench, and what can be exported takes 32x32: "
                        "export as cifar10 or cifar100")  # fmt: skip
    if spec.num_classes != compat.DATASETS[dataset]:
        raise DeatError(f"a network of {spec.num_classes} classes cannot stand for {dataset}, which has "
                        f"{compat.DATASETS[dataset]}")  # fmt: skip
    return dataset


def _stand_in_note(config: Any, dataset: str) -> str:
    if config.dataset == dataset:
        return ""
    folder = f" named {Path(config.data_dir).name}" if config.dataset == "folder" and config.data_dir else ""
    return f"Trained and evaluated on {SPELLED.get(config.dataset, config.dataset)}{folder}, not on {SPELLED[dataset]}."


def _figures(run: RunDirectory) -> tuple[dict[str, str], int]:
    """Reads the evaluation: the accuracies as RobustBench writes them, and on how many images (0 without one)."""
    figures = dict.fromkeys(("clean_acc", "reported", "autoattack_acc"), UNKNOWN)
    file = run.path / "eval.json"
    if not file.exists():
        return figures, 0
    report = Report.load(file)
    weights = report.provenance.get("weights_sha256")
    if weights not in (None, sha256_file(run.selected_weights_path)):
        raise DeatError(f"{file} is an evaluation of other weights than the run has selected: evaluate again")
    accuracies = {attack: 100 * result.accuracy for attack, result in report.results.items()}
    figures["clean_acc"] = _percent(accuracies.pop("natural"))
    of_linf = report.norm == "Linf" and report.precision == "fp32"
    if accuracies and of_linf and format_fraction(report.eps) == format_fraction(run.config.eps):
        figures["reported"] = _percent(min(accuracies.values()))
        if "autoattack" in accuracies:
            figures["autoattack_acc"] = _percent(accuracies["autoattack"])
    return figures, report.n_examples


def _percent(accuracy: float) -> str:
    if not 0 <= accuracy <= 100:
        raise DeatError(f"accuracy {accuracy:g} is not in percent, from 0 to 100")
    return f"{accuracy:.2f}"


def spelled_architecture(spec: ModelSpec) -> str:
    """A network's name in RobustBench's tables, such as WideResNet-34-10.

    Raises:
        DeatError: RobustBench has no such network.
    """
    robustbench_class(spec)
    return "PreActResNet-18" if spec.arch == PREACTRESNET18 else f"WideResNet-{spec.arch.removeprefix('wrn-')}"


def robustbench_weights(model: nn.Module) -> bytes:
    """The state dict as RobustBench's own classes have it: mu and sigma beside the network's bare names."""
    file = io.BytesIO()
    torch.save({name.removeprefix("net."): tensor.clone() for name, tensor in model.state_dict().items()}, file)
    return file.getvalue()


def model_source(model_name: str, dataset: str, spec: ModelSpec) -> str:
    """Python that RobustBench's model zoo takes in by a pull request: a class of its own architecture, and a row."""
    if spec.arch == PREACTRESNET18:
        module, base, names = "resnet", "PreActResNet", "PreActBlock, PreActResNet"
        arguments = f"PreActBlock, [2, 2, 2, 2], num_classes={spec.num_classes}"
    else:
        module, base, names = "wide_resnet", "WideResNet", "WideResNet"
        depth, width = spec.arch.split("-")[1:]
        arguments = f"depth={depth}, widen_factor={width}, num_classes={spec.num_classes}"
    class_name = f"{model_name.replace('-', '_')}Net"
    return f'''"""What a pull request adds to RobustBench for {model_name}.

The class and the entry of `linf` go into robustbench/model_zoo/{dataset}.py; the .pt file is uploaded, and its Google
Drive ID becomes the entry's; the .json file goes into model_info/{dataset}/Linf/.
"""

from collections import OrderedDict

import torch

from robustbench.model_zoo.architectures.{module} import {names}


class {class_name}({base}):

    def __init__(self):
        super().__init__({arguments})
        self.register_buffer('mu', torch.tensor({list(spec.mean)}).view(1, 3, 1, 1))
        self.register_buffer('sigma', torch.tensor({list(spec.std)}).view(1, 3, 1, 1))

    def forward(self, x):
        return super().forward((x - self.mu) / self.sigma)


linf = OrderedDict([
    ('{model_name}', {{
        'model': {class_name},
        'gdrive_id': 'ID of the uploaded file',
    }}),
])
'''


def exported_spec(
    weights: str | Path, *, arch: str | None = None, num_classes: int | None = None, image_size: int = 32
) -> ModelSpec:
    """Describes a network in RobustBench's form: its architecture from the JSON, its sizes from the tensors.

    Where the tensors have no normalisation, mean and standard deviation are 0 and 1.

    Args:
        weights: ``models/<dataset>/Linf/<name>.pt`` of an export.
        arch: Instead of what the JSON says, as for `build_model`.
        num_classes: Instead of the classifier's rows.
        image_size: Height and width.

    Raises:
        DeatError: It is damaged, lies in no export, or the architecture is not that of the tensors.
    """
    weights = Path(weights).absolute()
    tensors = bare_names(load_tensors(weights))
    arch = _architecture_beside(weights) if arch is None else arch
    classifier = tensors.get("linear.weight", tensors.get("fc.weight"))
    if num_classes is None and (classifier is None or classifier.ndim != 2):
        raise DeatError(f"{weights} has no classifier linear.weight or fc.weight with a row for each class: it is no "
                        f"{arch} of RobustBench's")  # fmt: skip
    mean, std = (_numbers(tensors, name, weights) for name in ("mu", "sigma"))
    if num_classes is None and classifier is not None:
        num_classes = len(classifier)
    spec = model_spec(arch, num_classes=num_classes, image_size=image_size, mean=mean, std=std)
    check_weights(spec.outline(), tensors, source=str(weights))  # whatever size the JSON claims, it costs no memory
    return spec


def _numbers(tensors: Mapping[str, Tensor], name: str, source: Path) -> tuple[float, ...] | None:
    """The normalisation's mean or standard deviation, where there is one."""
    found = tensors.get(name)
    if found is None:
        return None
    if found.numel() not in (1, 3) or not found.is_floating_point():
        raise DeatError(f"{source} has a tensor {name} that is no number for each channel: save it as (1, C, 1, 1)")
    return tuple(found.flatten().tolist())


def known_architecture(spelled: str) -> str | None:
    """Finds which network a ``model_info`` means; RobustBench spells PreActResNet-18 as ResNet-18, too.

    Returns:
        As `deat_rb.models.canonical_arch` takes it, or None.
    """
    text = re.sub(r"[\s_]+", "-", spelled.strip().lower()) if spelled.isascii() else ""
    if re.fullmatch(r"(pre-?act(ivation)?-?)?resnet-?18", text):
        return PREACTRESNET18
    wide = re.fullmatch(r"(?:wide-?resnet|wrn)-?(\d{1,3})-(\d{1,3})", text)
    return None if wide is None else f"wrn-{wide[1]}-{wide[2]}"


def _architecture_beside(weights: Path) -> str:
    folder = weights.parent.parent
    info = ExportPaths.below(folder.parent.parent, folder.name, weights.stem).info
    if not info.exists():
        raise DeatError(f"nothing says of which architecture {weights} is: build_model(...) and load_weights take any")
    content = read_json(info)
    architecture = content.get("architecture") if isinstance(content, dict) else None
    known = known_architecture(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise DeatError(f"{info} is of architecture {str(architecture)[:80]!r}, and known are PreActResNet-18 and "
                        "WideResNet-D-W of RobustBench's: deat-rb submit takes others by --arch")  # fmt: skip
    return known


def register(folder: str | Path) -> tuple[str, ...]:
    """Makes `robustbench.load_model` know all exports below ``folder``; nothing that lies there is executed.

    Example:
        >>> register("exported")
        ('Wang2021Gradient_R18',)
        >>> robustbench.load_model("Wang2021Gradient_R18", model_dir="exported/models", threat_model="Linf")

    Returns:
        The names.

    Raises:
        DeatError: There are no exports, one is damaged, or RobustBench has another model of that name. None is
            registered then.
    """
    found = sorted(Path(folder).glob("model_info/*/Linf/*.json"))
    if not found:
        raise DeatError(f"there are no exports below {folder}: it needs model_info/<dataset>/Linf/<name>.json")
    entries = []
    for info in found:
        dataset, name = info.parts[-3], info.stem
        compat.check_dataset(dataset)
        if NAME.fullmatch(name) is None:
            raise DeatError(f"{info} is not named as RobustBench's models are: <FirstAuthor><Year><FirstWordOfTitle>")
        spec = exported_spec(ExportPaths.below(Path(folder), dataset, name).weights)
        entries.append((name, dataset, _factory(spec)))
    compat.add_to_zoo(entries)
    return tuple(name for name, _, _ in entries)


def _factory(spec: ModelSpec) -> Callable[[], nn.Module]:
    """Makes what the class of the pull request makes, with names in the state dict as RobustBench has them."""
    network, arguments, options = robustbench_class(spec)
    base: Any = network

    class Exported(base):
        def __init__(self) -> None:
            super().__init__(*arguments, **options)
            for name, values in (("mu", spec.mean), ("sigma", spec.std)):
                self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

        def forward(self, images: Tensor) -> Any:
            return super().forward((images - self.mu) / self.sigma)

    return Exported
