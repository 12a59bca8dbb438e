"""Trained networks in RobustBench's form, and RobustBench made to know them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.models.names import PREACTRESNET18
from deat_rb.models.spec import ModelSpec, model_spec, robustbench_class
from deat_rb.models.weights import check_weights, strip_wrappers
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json
from deat_rb.utils.safe_load import load_tensors

NAME = re.compile(r"[A-Z][A-Za-z-]*[0-9]{4}[A-Z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", re.ASCII)

SPELLED = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "scikit-learn's digits", "folder": "a folder"}

UNKNOWN = "nan"
"""An accuracy that was not measured. RobustBench reads the field with ``float``: it crashes on None or "None"."""


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
    tensors = strip_wrappers(load_tensors(weights))
    arch = _architecture_beside(weights) if arch is None else arch
    classifier = tensors.get("linear.weight", tensors.get("fc.weight"))
    if num_classes is None and (classifier is None or classifier.ndim != 2):
        raise DeatError(f"{weights} has no classifier linear.weight or fc.weight with a row for each class: it is no "
                        f"{arch} of RobustBench's")  # fmt: skip
    mean, std = (_numbers(tensors, name, weights) for name in ("mu", "sigma"))
    if num_classes is None and classifier is not None:
        num_classes = len(classifier)
    spec = model_spec(arch, num_classes=num_classes, image_size=image_size, mean=mean, std=std)
    with seeding.preserved():
        check_weights(spec.build(), tensors, source=str(weights))
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
        As `deat_rb.models.names.canonical_arch` takes it, or None.
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
