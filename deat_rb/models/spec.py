"""Model specifications: architectures by name, built with the normalization as their first layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from deat_rb.data.normalization import NORMALIZATION
from deat_rb.models.check import check_trainable, first_line, trial_logits
from deat_rb.models.names import PREACTRESNET18, PREACTRESNET18_BN, RESNET18, canonical_arch, suggest
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.libraries import import_timm
from deat_rb.utils.module_state import preserve_state

_wide_resnet, _resnet = compat.architectures()

DATASETS = {
    "digits": (10, NORMALIZATION["digits"]),
    "cifar10": (10, NORMALIZATION["cifar10"]),
    "cifar100": (100, NORMALIZATION["cifar100"]),
}
"""Number of classes, and (mean, standard deviation) per channel; the images of all three are 3x32x32."""


class NormalizedModel(nn.Module):
    """A network with its normalization as a layer, for images in [0, 1].

    The buffers ``mu`` and ``sigma``, of shape (1, C, 1, 1), are named as in RobustBench.

    Attributes:
        classes: Class names in the order of the logits, set by `deat_rb.load_model`; empty if unknown.
    """

    mu: Tensor
    sigma: Tensor
    classes: tuple[str, ...] = ()
    constant_buffers = ("mu", "sigma")
    """Buffers that training does not change, so that ranks need not average them."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, -1, 1, 1))
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.net((images - self.mu) / self.sigma)
        return logits


class ModelSpec(BaseModel):
    """Everything needed to build a network, as stored in a run's ``config.json``.

    Attributes:
        arch: ``preactresnet18``, ``preactresnet18-bn``, ``resnet18``, ``wrn-D-W``, ``timm:NAME``, ``torchvision:NAME``
            or ``package.module:factory``.
        num_classes: Number of classes K.
        image_size: Height and width.
        channels: Number of channels C.
        mean: Mean per channel of images in [0, 1].
        std: Standard deviation per channel of images in [0, 1].
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
            raise DeatError(f"mean {self.mean} and std {self.std} must have one number per channel, {self.channels}")
        return self

    def build(self) -> NormalizedModel:
        """Build the network with random weights, drawn from torch's global generator.

        Raises:
            DeatError: The architecture does not exist, does not accept images of this shape, or cannot be saved.
        """
        model = NormalizedModel(_build_net(self), self.mean, self.std)
        _check_model(model, self)
        return model


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
    """Return the specification of a network; ``dataset`` (digits, cifar10, cifar100) sets the defaults.

    Without a dataset, images are 3x32x32 and the normalization is mean 0 and standard deviation 1.

    Raises:
        DeatError: A value is invalid, or the number of classes is unknown.
    """
    if dataset is not None:
        if dataset not in DATASETS:
            raise DeatError(
                f"unknown dataset '{dataset}' ({did_you_mean(dataset, DATASETS)}): give num_classes, mean and std"
            )
        classes, (known_mean, known_std) = DATASETS[dataset]
        num_classes = classes if num_classes is None else num_classes
        mean, std = mean or known_mean, std or known_std
    if num_classes is None:
        raise DeatError(f"num_classes is required for {arch} when no dataset is given")
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
    """Build a network with random weights; the arguments are those of `model_spec`.

    Examples:
        >>> model = build_model("wrn-34-10", dataset="cifar10")

    Raises:
        DeatError: The architecture does not exist or does not accept images of this shape, or a value is invalid.
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
    except Exception as error:  # any exception: third-party code
        raise DeatError(f"architecture '{spec.arch}' cannot be built: {first_line(error)}") from error


def check_image_size(arch: str, image_size: int | None, *, source: str, required: bool) -> None:
    """Check that an image size fits RobustBench's networks, and that it is given for networks that accept several.

    Args:
        arch: As for `build_model`.
        image_size: Height and width, if given.
        source: Name of the network in error messages.
        required: Whether the size must be given because the dataset, such as a folder, does not determine it.

    Raises:
        DeatError: The size is missing or does not fit.
    """
    if ":" not in arch:
        robustbench_class(model_spec(arch, num_classes=2, image_size=image_size))
    elif image_size is None and required:
        raise DeatError(f"{source} accepts images of several sizes ({arch}): give --image-size, the size that it was "
                        "trained on")  # fmt: skip


def robustbench_class(spec: ModelSpec) -> tuple[type[nn.Module], tuple[Any, ...], dict[str, int]]:
    """Return RobustBench's class for an architecture with its positional and keyword arguments.

    Raises:
        DeatError: The architecture is not from RobustBench, or the images are not 3x32x32 (RobustBench's networks
            return wrong shapes at 64x64 without an error).
    """
    if ":" in spec.arch:
        raise DeatError(
            f"architecture '{spec.arch}' is not from RobustBench: choose {PREACTRESNET18}, {PREACTRESNET18_BN}, "
            f"{RESNET18} or wrn-D-W"
        )
    if (spec.image_size, spec.channels) != (32, 3):
        shape = f"{spec.channels}x{spec.image_size}x{spec.image_size}"
        raise DeatError(
            f"architecture '{spec.arch}' takes 3x32x32 images, not {shape}: "
            "RobustBench's networks are for CIFAR; use timm:NAME or torchvision:NAME for other sizes"
        )
    classes = {"num_classes": spec.num_classes}
    if spec.arch == PREACTRESNET18:
        return _resnet.PreActResNet, (_resnet.PreActBlock, [2, 2, 2, 2]), classes
    if spec.arch == PREACTRESNET18_BN:
        return _resnet.PreActResNet, (_resnet.PreActBlockV2, [2, 2, 2, 2]), {**classes, "bn_before_fc": True}
    if spec.arch == RESNET18:
        return _resnet.ResNet, (_resnet.BasicBlock, [2, 2, 2, 2]), classes
    depth, width = map(int, spec.arch.split("-")[1:])
    return _wide_resnet.WideResNet, (), {"depth": depth, "widen_factor": width, **classes}


def _build_timm(name: str, spec: ModelSpec) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        raise DeatError(f"timm has no model '{name}': {suggest(name, timm.list_models())}")
    create: Callable[..., nn.Module] = timm.create_model
    options = {"num_classes": spec.num_classes, "in_chans": spec.channels}
    try:
        return create(name, img_size=spec.image_size, **options)
    except TypeError:  # only networks with a fixed image size, such as ViTs, accept img_size
        return create(name, **options)


def _build_torchvision(name: str, spec: ModelSpec) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # classifiers only: a detector would download its backbone
    if name not in known:
        raise DeatError(f"torchvision has no image classifier '{name}': {suggest(name, known)}")
    net: nn.Module = models.get_model(name, weights=None, num_classes=spec.num_classes)
    return net


def _build_custom(module_name: str, factory_name: str, spec: ModelSpec) -> nn.Module:
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DeatError(
            f"architecture '{spec.arch}' cannot be imported ({error}): give package.module:factory of a module on the "
            "Python path (PYTHONPATH=. adds the current folder)"
        ) from error
    net = factory(num_classes=spec.num_classes)
    if not isinstance(net, nn.Module):
        raise DeatError(f"architecture '{spec.arch}' returned a {type(net).__name__}, not a torch.nn.Module")
    return net


def _check_model(model: NormalizedModel, spec: ModelSpec) -> None:
    """Run a trial forward pass in eval and train mode, leaving weights, statistics and modes unchanged."""
    if ":" not in spec.arch:
        return  # RobustBench's networks accept only one size, which `robustbench_class` checks
    source = f"architecture '{spec.arch}'"
    check_trainable(model.net, source=source)
    images = torch.zeros(2, spec.channels, spec.image_size, spec.image_size)
    for training in (False, True):
        with preserve_state(model):
            trial_logits(model.train(training), images, source=source, num_classes=spec.num_classes,
                         advice="choose another --arch or --image-size")  # fmt: skip
