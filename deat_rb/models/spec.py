"""Networks: RobustBench's own architectures and anyone else's, with the normalisation inside as a layer (law 1)."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deat_rb.data.normalization import NORMALIZATION
from deat_rb.models.names import PREACTRESNET18, canonical_arch
from deat_rb.utils import compat, seeding
from deat_rb.utils.errors import DeatError, did_you_mean

_wide_resnet, _resnet = compat.architectures()

DATASETS = {
    "digits": (10, NORMALIZATION["digits"]),
    "cifar10": (10, NORMALIZATION["cifar10"]),
    "cifar100": (100, NORMALIZATION["cifar100"]),
}
"""Number of classes, and mean and standard deviation per channel; all three are 32x32 RGB."""


class NormalizedModel(nn.Module):
    """A network behind its normalisation: takes images in [0, 1].

    Its buffers ``mu`` and ``sigma``, of shape (1, C, 1, 1), are named as in RobustBench's models.
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, -1, 1, 1))
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images (N, C, H, W) in [0, 1]; returns logits (N, K)."""
        logits: Tensor = self.net((images - self.mu) / self.sigma)
        return logits


class ModelSpec(BaseModel):
    """All that is needed to build a network, as it stands in a run's ``config.json``.

    Attributes:
        arch: ``preactresnet18``, ``wrn-D-W``, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``.
        num_classes: K.
        image_size: Height and width.
        channels: C.
        mean: Per channel, in [0, 1].
        std: Likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arch: str = Field(max_length=200)
    num_classes: int = Field(ge=2, le=10**6)
    image_size: int = Field(default=32, ge=1, le=10**4)
    channels: int = Field(default=3, ge=1, le=10**3)
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="before")
    @classmethod
    def _spell_arch(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("arch"), str):
            return {**fields, "arch": canonical_arch(fields["arch"])}
        return fields

    @model_validator(mode="after")
    def _check_channels(self) -> ModelSpec:
        if not len(self.mean) == len(self.std) == self.channels:
            raise DeatError(f"mean {self.mean} and std {self.std} need one number for each of {self.channels} channels")
        return self

    def build(self) -> NormalizedModel:
        """Builds the network with fresh weights, drawn from torch's global generator.

        Raises:
            DeatError: The architecture does not exist or cannot take these images.
        """
        net = _build_net(self)
        _check_shapes(net, self)
        return NormalizedModel(net, self.mean, self.std)

    def build_on_meta(self) -> NormalizedModel:
        """Builds the network without its weights, on the meta device: whatever its size, that takes no memory.

        It is not tried on images, as `build` does.

        Raises:
            DeatError: The architecture does not exist.
        """
        with torch.device("meta"), _NumbersOnCpu():
            return NormalizedModel(_build_net(self), self.mean, self.std)


class _NumbersOnCpu(TorchFunctionMode):
    """Lets networks read numbers out of small tensors as they are built, as ViTs do for each block's drop rate."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        more = {"device": "cpu"} if func in (torch.linspace, torch.arange, torch.tensor) else {}
        return func(*args, **{**more, **(kwargs or {})})


def model_spec(
    arch: str,
    *,
    dataset: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ModelSpec:
    """Describes a network; ``dataset`` (digits, cifar10, cifar100) gives what is not given otherwise.

    Without a data set, images are 32x32 RGB and the normalisation is mean 0 and standard deviation 1.

    Raises:
        DeatError: A value is not allowed, or the number of classes is unknown.
    """
    if dataset is not None:
        if dataset not in DATASETS:
            raise DeatError(
                f"nothing is known of data set '{dataset}' ({did_you_mean(dataset, DATASETS)}): "
                "give num_classes, mean and std instead"
            )
        classes, (known_mean, known_std) = DATASETS[dataset]
        num_classes = classes if num_classes is None else num_classes
        mean, std = mean or known_mean, std or known_std
    if num_classes is None:
        raise DeatError(f"how many classes shall {arch} tell apart? Give dataset or num_classes")
    channels = channels or len(mean or std or (0.0,) * 3)
    try:
        return ModelSpec(
            arch=arch,
            num_classes=num_classes,
            image_size=32 if image_size is None else image_size,
            channels=channels,
            mean=mean or (0.0,) * channels,
            std=std or (1.0,) * channels,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DeatError(f"{field} = {first['input']}: {message}" if field else message) from None


def build_model(
    arch: str,
    *,
    dataset: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> NormalizedModel:
    """Builds a network with fresh weights; the arguments are those of `model_spec`.

    Example:
        >>> model = build_model("wrn-34-10", dataset="cifar10")

    Raises:
        DeatError: The architecture does not exist, cannot take these images, or a value is not allowed.
    """
    return model_spec(
        arch, dataset=dataset, num_classes=num_classes, image_size=image_size, channels=channels, mean=mean, std=std
    ).build()


def _build_net(spec: ModelSpec) -> nn.Module:
    kind, colon, name = spec.arch.partition(":")
    if not colon:
        network, arguments, options = robustbench_class(spec)
        return network(*arguments, **options)
    build = {"timm": _build_timm, "torchvision": _build_torchvision}.get(kind)
    try:
        return build(name, spec) if build else _build_custom(kind, name, spec)
    except DeatError:
        raise
    except Exception as error:  # somebody else's code
        raise DeatError(f"architecture '{spec.arch}' cannot be built: {error}") from error


def robustbench_class(spec: ModelSpec) -> tuple[type[nn.Module], tuple[Any, ...], dict[str, int]]:
    """Finds RobustBench's class of a network, and the arguments that make it.

    Raises:
        DeatError: It is not RobustBench's, or does not take these images: its networks are silently wrong at 64x64.
    """
    if ":" in spec.arch:
        raise DeatError(
            f"architecture '{spec.arch}' is not one of RobustBench's, which are {PREACTRESNET18} and wrn-D-W"
        )
    if (spec.image_size, spec.channels) != (32, 3):
        raise DeatError(
            f"architecture '{spec.arch}' takes 3x32x32 images, not {_shape(spec)}: RobustBench made it for CIFAR; "
            "timm:NAME and torchvision:NAME have networks for other sizes"
        )
    if spec.arch == PREACTRESNET18:
        return _resnet.PreActResNet, (_resnet.PreActBlock, [2, 2, 2, 2]), {"num_classes": spec.num_classes}
    depth, width = map(int, spec.arch.split("-")[1:])
    return _wide_resnet.WideResNet, (), {"depth": depth, "widen_factor": width, "num_classes": spec.num_classes}


def _build_timm(name: str, spec: ModelSpec) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise DeatError(f"timm has no model '{name}': {_few(did_you_mean(name, timm.list_models()))}")
    create: Callable[..., nn.Module] = timm.create_model
    options = {"num_classes": spec.num_classes, "in_chans": spec.channels}
    try:
        return create(name, img_size=spec.image_size, **options)
    except TypeError:  # only networks that are made for one size, such as ViTs, are told which
        return create(name, **options)


def _build_torchvision(name: str, spec: ModelSpec) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # those that classify: of others the backbone would be downloaded
    if name not in known:
        raise DeatError(f"torchvision has no model '{name}' that classifies images: {_few(did_you_mean(name, known))}")
    net: nn.Module = models.get_model(name, weights=None, num_classes=spec.num_classes)
    return net


def _build_custom(module_name: str, factory_name: str, spec: ModelSpec) -> nn.Module:
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DeatError(
            f"architecture '{spec.arch}' cannot be imported ({error}): give package.module:factory of "
            "something on the Python path"
        ) from error
    net = factory(num_classes=spec.num_classes)
    if not isinstance(net, nn.Module):
        raise DeatError(f"architecture '{spec.arch}' gave a {type(net).__name__} where a torch.nn.Module is needed")
    return net


def _few(sentence: str) -> str:
    return sentence if len(sentence) < 200 else "its documentation lists them"


def _shape(spec: ModelSpec) -> str:
    return f"{spec.channels}x{spec.image_size}x{spec.image_size}"


def _check_shapes(net: nn.Module, spec: ModelSpec) -> None:
    """Lets a copy classify two black images, evaluating and training: some networks return wrong shapes silently."""
    if ":" not in spec.arch:
        return  # RobustBench's take one size only, which was looked at
    images = torch.zeros(2, spec.channels, spec.image_size, spec.image_size)
    trial = copy.deepcopy(net)
    for training in (False, True):
        try:
            with torch.no_grad(), seeding.preserved():
                logits = trial.train(training)(images)
        except Exception as error:  # somebody else's code
            raise DeatError(f"architecture '{spec.arch}' does not take {_shape(spec)} images: {error}") from error
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (2, spec.num_classes):
            raise DeatError(
                f"architecture '{spec.arch}' does not suit {_shape(spec)} images of {spec.num_classes} "
                f"classes: for 2 of them it returns {found}, not {(2, spec.num_classes)}"
            )
