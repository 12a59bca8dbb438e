"""Calling never teaches (law 2): what a call to an attack may not change, and how it is given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Gives every module of ``model`` its own train or eval mode back, whatever happens in between."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Asks for no gradient of a parameter in between: what does not need one is not computed, compiled or not."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Gives back buffers, modes, gradients and ``requires_grad`` as they were, whatever happens in between.

    Attacks that run in train mode move BatchNorm's running statistics, some of torchattacks' call ``backward()``, and
    its own bookkeeping puts every module into the same mode.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        with preserve_modes(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient, required in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
