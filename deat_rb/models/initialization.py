"""Initial weights of a network: from a checkpoint or a library's pretrained weights, with a new last layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deat_rb.models.names import PRETRAINED
from deat_rb.models.pretrained import library_weights
from deat_rb.models.spec import ModelSpec, NormalizedModel, model_spec
from deat_rb.models.weights import load_weights, with_new_head
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import load_state_dict, sha256_tensors
from deat_rb.utils.text import counted


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights to initialize a network with.

    Attributes:
        tensors: The state dict.
        source: Origin of the weights, for messages.
        new_head: Whether a last layer for a different number of classes is replaced by a new one.
        notes: Notes for the user, such as which of a file's state dicts was loaded.
    """

    tensors: dict[str, Tensor]
    source: str
    new_head: bool = False
    notes: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Return the SHA-256 of the state dict."""
        return sha256_tensors(self.tensors)

    def load_into(
        self, model: NormalizedModel, spec: ModelSpec, *, is_given: bool = False
    ) -> tuple[tuple[str, ...], ModelSpec]:
        """Load the weights and, if the file has one, its normalization into a model.

        Args:
            model: The model.
            spec: Its specification.
            is_given: Whether the user gave the specification's normalization, which must then be the file's.

        Returns:
            The notes for the user, and the specification with the model's normalization.

        Raises:
            DeatError: The weights are for a different architecture, number of classes or normalization.
        """
        tensors, notes = self.tensors, self.notes
        replaced: tuple[str, ...] = ()
        if self.new_head:
            tensors, replaced = with_new_head(model, tensors, spec.num_classes)
        before = model.mu.clone(), model.sigma.clone()
        load_weights(model, tensors, source=self.source)
        if not all(map(torch.equal, before, (model.mu, model.sigma))):
            if is_given:
                raise DeatError(f"{self.source} already contains a mean and standard deviation: omit --mean and --std")
            mean, std = (tuple(each.flatten().tolist()) for each in (model.mu, model.sigma))
            spec = model_spec(**{**spec.model_dump(), "mean": mean, "std": std})
            numbers = [", ".join(f"{number:.4g}" for number in each) for each in (mean, std)]
            notes = (*notes, f"the normalization is that of {self.source}: mean {numbers[0]}; std {numbers[1]}")
        if replaced:
            names = ", ".join(name.removeprefix("net.") for name in replaced)
            notes = (*notes, f"the last layer of {self.source} is for other classes; {names} are new")
        elif self.new_head:
            notes = (*notes, f"the last layer of {self.source} has {spec.num_classes} classes as well and is kept")
        return notes, spec


def initial_weights(
    arch: str,
    *,
    init_from: str | None = None,
    new_head: bool = False,
    pretrained: bool = False,
    file: str | None = None,
    weights_key: str | None = None,
) -> InitialWeights | None:
    """Read or download the initial weights.

    Args:
        arch: The architecture.
        init_from: Path of a checkpoint.
        new_head: Whether its last layer is replaced if it is for a different number of classes.
        pretrained: Whether to use the library's weights of a ``timm:NAME`` or ``torchvision:NAME``, with a new last
            layer.
        file: Path of the library's weights, which are then not downloaded.
        weights_key: Key of the state dict in a file with several.

    Returns:
        The weights, or None for random ones.

    Raises:
        DeatError: The weights cannot be read or downloaded.
    """
    path = file if pretrained else init_from
    if path is not None:
        weights = load_state_dict(path, weights_key)
        notes = (weights.note,) if weights.note else ()
        return InitialWeights(weights.tensors, path, new_head or pretrained, notes)
    return InitialWeights(library_weights(arch), arch, new_head=True) if pretrained else None


def check_initialization(
    arch: str,
    *,
    init_from: str | None,
    new_head: bool,
    pretrained: bool,
    weights: str | None,
    weights_key: str | None,
    freeze: str | None,
) -> None:
    """Check that options about the initial weights do not conflict.

    Raises:
        DeatError: They conflict, or ``freeze`` is not a regular expression.
    """
    if pretrained and arch.partition(":")[0] not in PRETRAINED:
        raise DeatError(f"--pretrained is for --arch timm:NAME and torchvision:NAME, not {arch}: give a checkpoint "
                        "with --init-from")  # fmt: skip
    if pretrained and init_from is not None:
        raise DeatError(f"--pretrained and --init-from {init_from} are mutually exclusive: give only one")
    if weights is not None and not pretrained:
        raise DeatError(f"--weights {weights} requires --pretrained, whose download it replaces: add --pretrained, or "
                        "load a checkpoint with --init-from")  # fmt: skip
    if new_head and init_from is None:
        raise DeatError("--new-head replaces the last layer of a checkpoint: give the checkpoint with --init-from")
    if weights_key is not None and init_from is None and weights is None:
        raise DeatError(f"--weights-key {weights_key} requires --init-from: give the checkpoint that has these "
                        "weights, or omit --weights-key")  # fmt: skip
    if freeze is not None:
        try:
            re.compile(freeze)
        except re.error as error:
            raise DeatError(f"--freeze '{freeze}' is not a regular expression: {error}") from None


def freeze_parameters(model: nn.Module, pattern: str) -> str:
    """Freeze the parameters whose names begin with a match of a regular expression; return their number as text.

    The model is put in train mode, except for BatchNorm layers all of whose parameters are frozen: in eval mode they
    use and keep their running statistics. `fit` and attacks in train mode leave them so.

    Args:
        model: A `NormalizedModel`; names are those of its network, such as ``layer1.0.conv1.weight``.
        pattern: The regular expression.

    Raises:
        DeatError: No parameter matches, or all do.
    """
    named = {name.removeprefix("net."): parameter for name, parameter in model.named_parameters()}
    frozen = [parameter for name, parameter in named.items() if re.match(pattern, name)]
    if not frozen or len(frozen) == len(named):
        few = ", ".join([*named][:3])
        which = "all parameters" if frozen else "no parameter"
        raise DeatError(f"--freeze '{pattern}' matches {which} of the network "
                        f"({few}, ..., {[*named][-1]}): give a regular expression "
                        "that matches the beginning of some of the names, not of all")  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.train()
    kept = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine
            and not any(parameter.requires_grad for parameter in module.parameters())]  # fmt: skip
    for module in kept:
        module.eval()
    count, total = (sum(parameter.numel() for parameter in some) for some in (frozen, named.values()))
    statistics = f"; {counted(len(kept), 'BatchNorm layer')} with fixed statistics" if kept else ""
    return f"{count:,} of {total:,} parameters{statistics}"
