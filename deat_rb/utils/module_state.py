"""Context managers that restore a model's modes, buffers, gradients and ``requires_grad`` flags."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deat_rb.utils.errors import DeatError

T = TypeVar("T", Tensor | None, nn.Parameter | None)


def load_tensors_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a plain dict of a model's tensors.

    What `torch.nn.Module.state_dict` returns also has the versions of the modules, without which some refuse to load.

    Raises:
        RuntimeError: A name is unknown or a shape is wrong.
    """
    state = model.state_dict()
    state.update(tensors)
    model.load_state_dict(state)


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers on exit, without a device sync."""
    saved = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in saved:
                buffers[name] = buffer.copy_(value)


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Disable parameter gradients inside the context, so that neither autograd nor a compiled graph computes them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _State:
    """Snapshot of a model's modes, buffers, other tensor attributes, gradients and ``requires_grad`` flags."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        self.parameters = [(module._parameters, dict(module._parameters)) for module in model.modules()]
        self.attributes = [(vars(module), _tensors(vars(module))) for module in model.modules()]
        self.flags = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
        tensors = [
            *model.buffers(),
            *(tensor for _, saved in self.attributes for tensor in saved.values()),
            *(gradient for _, gradient, _ in self.flags if gradient is not None),
        ]
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Restore changed values; unchanged tensors are not written."""
        for module, training in self.modes:
            module.training = training
        for current_buffers, saved_buffers in self.buffers:
            _restore_entries(current_buffers, saved_buffers)
        for current_parameters, saved_parameters in self.parameters:
            _restore_entries(current_parameters, saved_parameters)
        for current, saved in self.attributes:
            for name in _tensors(current).keys() - saved.keys():
                del current[name]
            current.update(saved)
        for parameter, gradient, required in self.flags:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for tensor, value in self.values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


_lock = threading.Lock()
_users: dict[int, tuple[_State, Counter[int]]] = {}
"""State and number of entries per thread of each model inside `preserve_state`, by the model's id."""


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes, gradients and ``requires_grad`` on exit, also after an exception.

    Attacks in train mode update BatchNorm's running statistics, some torchattacks attacks call ``backward()``, and
    torchattacks sets all modules to the same mode. Buffers, parameters and other tensor attributes that ``forward``
    replaces are restored by module and name. Several threads may attack the same model in eval mode: the last one to
    exit restores the state found by the first.
    """
    thread = threading.get_ident()
    with _lock:
        state = _State(model)
        before, entered = _users.setdefault(id(model), (state, Counter()))
        entered[thread] += 1
    try:
        yield
    finally:
        with _lock:
            entered[thread] -= 1
            active = +entered
            if not active:
                del _users[id(model)]
                before.restore()
            elif set(active) == {thread}:
                state.restore()


def _tensors(attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


def _restore_entries(current: dict[str, T], saved: dict[str, T]) -> None:
    for name in set(current.keys()).difference(saved):  # those of ScriptModules cannot be iterated over
        del current[name]
    for name, tensor in saved.items():
        if name not in current or current[name] is not tensor:
            current[name] = tensor


def require_autograd(purpose: str, *, grad_mode: bool = False) -> None:
    """Check that autograd is enabled.

    Args:
        purpose: What needs gradients, for the error message.
        grad_mode: Whether to raise inside `torch.no_grad` as well.

    Raises:
        DeatError: Called inside `torch.inference_mode`, or with ``grad_mode`` inside `torch.no_grad`.
    """
    if torch.is_inference_mode_enabled():
        raise DeatError(
            f"{purpose} needs gradients, which torch.inference_mode() disables: call it outside inference_mode "
            "(in Lightning: Trainer(inference_mode=False))"
        )
    if grad_mode and not torch.is_grad_enabled():
        raise DeatError(f"{purpose} needs gradients, which torch.no_grad() disables: call it outside no_grad")
