"""RobustBench's format: paths, names, metadata and weights of an exported model."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import DEFAULT_EPS
from deat_rb.models.names import PREACTRESNET18, PREACTRESNET18_BN, RESNET18, canonical_arch
from deat_rb.models.spec import ModelSpec, model_spec, robustbench_class
from deat_rb.models.weights import check_weights, detect_variant, strip_wrappers
from deat_rb.utils import compat, seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import format_fraction

NAME = re.compile(r"[A-Z][A-Za-z-]*[0-9]{4}[A-Z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", re.ASCII)

SPELLED = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "scikit-learn's digits", "folder": "a folder"}

_SPELLED_ARCH = {PREACTRESNET18: "PreActResNet-18", PREACTRESNET18_BN: "PreActResNet-18", RESNET18: "ResNet-18"}

_SOURCE = {
    PREACTRESNET18: ("PreActResNet", "PreActBlock", ""),
    PREACTRESNET18_BN: ("PreActResNet", "PreActBlockV2", ", bn_before_fc=True"),
    RESNET18: ("ResNet", "BasicBlock", ""),
}
"""RobustBench's class, block and further arguments of each architecture."""


UNKNOWN_DATA = "It is unknown whether additional training data were used: false stands for unknown."
"""Footnote of an export; RobustBench's ``additional_data`` is true or false."""

NOTES = {
    "method": "Trained with deat-rb, method {method}.",
    "data": "Trained and evaluated on {own}, not on {dataset}.",
    "subset": "Accuracies on {count} test images.",
    "eps": "Evaluated at eps {eps} instead of {usual}.",
    "autoattack": "AutoAttack was not run: its accuracy of {accuracy} stands for unknown.",
    "checks": "Failed checks of the evaluation: {checks}.",
    "additional data": UNKNOWN_DATA,
}
"""Sentences that exports write into the footnote, about their evaluation and their form; a board writes its own."""


def eps_note(eps: str, norm: str) -> str:
    """Return the sentence about a radius other than that of RobustBench's CIFAR leaderboards, or an empty one."""
    usual = format_fraction(DEFAULT_EPS[norm])
    return "" if eps == usual else NOTES["eps"].format(eps=eps, usual=usual)


def split_footnote(footnote: str) -> tuple[str | None, str]:
    """Return the training method that an export's footnote names, and the footnote without the sentences in `NOTES`."""
    found = {name: re.compile(_sentence(template)) for name, template in NOTES.items()}
    method = found["method"].search(footnote)
    for pattern in found.values():
        footnote = pattern.sub("", footnote)
    return None if method is None else method["method"], footnote.strip()


def _sentence(template: str) -> str:
    return re.sub(r"\\{(\w+)\\}", r"(?P<\1>.{1,400}?)", re.escape(template)) + "( |$)"


@dataclass(frozen=True)
class ExportPaths:
    """Paths of an export's files.

    Attributes:
        weights: ``models/<dataset>/<norm>/<name>.pt``, a state dict.
        info: ``model_info/<dataset>/<norm>/<name>.json``.
        source: ``pull_request/<dataset>/<norm>/<name>.py``: the class and entry for RobustBench's model zoo.
        unknown: Fields of ``info`` whose values are placeholders for unknown ones.
        notes: Sentences for the user.
    """

    weights: Path
    info: Path
    source: Path
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def below(cls, folder: Path, dataset: str, name: str, norm: str = "Linf") -> ExportPaths:
        """Return the paths of an export below ``folder``; ``norm`` is ``Linf`` or ``L2``."""
        weights, info, source = (
            folder / kind / dataset / norm / f"{name}.{suffix}"
            for kind, suffix in (("models", "pt"), ("model_info", "json"), ("pull_request", "py"))
        )
        return cls(weights, info, source)

    @classmethod
    def beside(cls, weights: Path) -> ExportPaths:
        """Return the paths of the export that ``weights`` would belong to."""
        threat = weights.absolute().parent
        return cls.below(threat.parent.parent.parent, threat.parent.name, weights.stem, threat.name)


def spelled_architecture(spec: ModelSpec) -> str:
    """Return an architecture's name in RobustBench's tables, such as WideResNet-34-10.

    Raises:
        DeatError: RobustBench has no such architecture.
    """
    robustbench_class(spec)
    return _SPELLED_ARCH.get(spec.arch) or f"WideResNet-{spec.arch.removeprefix('wrn-')}"


def check_export_dataset(dataset: str) -> str:
    """Return a RobustBench dataset under which networks can be exported.

    Raises:
        DeatError: RobustBench has no such dataset, or its images are larger than those of the networks exported.
    """
    compat.check_dataset(dataset)
    if dataset not in SPELLED:
        raise DeatError(f"dataset {dataset} has 224x224 images in RobustBench, but exported networks accept 32x32: "
                        "export as cifar10 or cifar100")  # fmt: skip
    return dataset


def robustbench_weights(model: nn.Module) -> bytes:
    """Return the bytes of a `torch.save` file with the state dict and normalization under RobustBench's names."""
    file = io.BytesIO()
    torch.save({name.removeprefix("net."): tensor.clone() for name, tensor in model.state_dict().items()}, file)
    return file.getvalue()


def model_source(model_name: str, dataset: str, spec: ModelSpec, norm: str = "Linf") -> str:
    """Return the Python source for a pull request to RobustBench: the model's class and its entry in the zoo."""
    if spec.arch in _SOURCE:
        base, block, options = _SOURCE[spec.arch]
        module, names = "resnet", f"{block}, {base}"
        arguments = f"{block}, [2, 2, 2, 2], num_classes={spec.num_classes}{options}"
    else:
        module, base, names = "wide_resnet", "WideResNet", "WideResNet"
        depth, width = spec.arch.split("-")[1:]
        arguments = f"depth={depth}, widen_factor={width}, num_classes={spec.num_classes}"
    threat = norm.lower()
    class_name = f"{model_name.replace('-', '_')}Net"
    return f'''"""Pull request to RobustBench for {model_name}.

The class and the entry of `{threat}` go into robustbench/model_zoo/{dataset}.py; the .pt file is uploaded, and its
Google Drive ID becomes the entry's; the .json file goes into model_info/{dataset}/{norm}/.
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


{threat} = OrderedDict([
    ('{model_name}', {{
        'model': {class_name},
        'gdrive_id': 'ID of the uploaded file',
    }}),
])
'''


def exported_spec(
    weights: str | Path, *, arch: str | None = None, num_classes: int | None = None, image_size: int = 32
) -> ModelSpec:
    """Return the specification of an exported model: architecture from the JSON, sizes from the tensors.

    Without normalization tensors, mean and standard deviation are 0 and 1.

    Args:
        weights: ``models/<dataset>/<norm>/<name>.pt`` of an export.
        arch: Architecture as for `build_model`; by default the JSON's.
        num_classes: Number of classes; by default the classifier's number of rows.
        image_size: Height and width.

    Raises:
        DeatError: The file is damaged or not part of an export, or the architecture does not match the tensors.
    """
    weights = Path(weights).absolute()
    content = load_tensors(weights)
    tensors = strip_wrappers(content)
    arch = detect_variant(_architecture_beside(weights) if arch is None else canonical_arch(arch), tensors)
    classifier = tensors.get("linear.weight", tensors.get("fc.weight"))
    if num_classes is None and (classifier is None or classifier.ndim != 2):
        raise DeatError(f"{weights} has no classifier linear.weight or fc.weight with one row per class: it is not "
                        f"RobustBench's {arch}")  # fmt: skip
    mean, std = (_numbers(tensors, name, weights) for name in ("mu", "sigma"))
    if num_classes is None and classifier is not None:
        num_classes = len(classifier)
    spec = model_spec(arch, num_classes=num_classes, image_size=image_size, mean=mean, std=std)
    with seeding.preserved():
        check_weights(spec.build(), content, source=str(weights))
    return spec


def _numbers(tensors: Mapping[str, Tensor], name: str, source: Path) -> tuple[float, ...] | None:
    """Return the mean or standard deviation of the normalization of three channels, or None."""
    found = tensors.get(name)
    if found is None:
        return None
    if found.numel() not in (1, 3) or not found.is_floating_point():
        raise DeatError(f"{source} has a tensor {name} that is not one number per channel: save it as (1, C, 1, 1)")
    return tuple(found.flatten().expand(3).tolist())


def known_architecture(spelled: str) -> str | None:
    """Return the canonical name of an architecture in a ``model_info``, or None if it is unknown.

    RobustBench also calls PreActResNet-18 ResNet-18; `deat_rb.models.weights.detect_variant` distinguishes them.
    """
    text = re.sub(r"[\s_]+", "-", spelled.strip().lower()) if spelled.isascii() else ""
    if re.fullmatch(r"(pre-?act(ivation)?-?)?resnet-?18", text):
        return PREACTRESNET18
    wide = re.fullmatch(r"(?:wide-?resnet|wrn)-?(\d{1,3})-(\d{1,3})", text)
    return None if wide is None else f"wrn-{wide[1]}-{wide[2]}"


def _architecture_beside(weights: Path) -> str:
    info = ExportPaths.beside(weights).info
    if not info.exists():
        raise DeatError(
            f"{weights} is not part of an export, so its architecture is unknown: use build_model(...) and load_weights"
        )
    content = read_json(info)
    architecture = content.get("architecture") if isinstance(content, dict) else None
    known = known_architecture(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise DeatError(f"{info} names the architecture {str(architecture)[:80]!r}, not ResNet-18, PreActResNet-18 or "
                        "WideResNet-D-W: give others to deat-rb submit with --arch")  # fmt: skip
    return known
