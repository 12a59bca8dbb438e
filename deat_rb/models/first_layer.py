"""The first layer of a network: the only layer that receives the images, after their normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._NormBase,)


class _ReachedError(Exception):
    """Raised in a forward pass that has computed the output of a layer, to end it there."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def find_first_layer(model: nn.Module, images: Tensor) -> str:
    """Return the name of the convolution or linear layer that alone receives a network's images.

    Operations without parameters, such as the normalization, may stand before it. The network is run twice, in eval
    mode; its weights, buffers and modes do not change, and no value is read.

    Args:
        model: The network.
        images: A few images, (N, C, H, W), on the network's device.

    Raises:
        DeatError: The network does not begin with such a layer, or uses its images or that layer again later.
    """
    inputs = images.detach().clone().requires_grad_()
    with preserve_modes(model), torch.enable_grad():
        model.eval()
        name, reason = _examine(model, inputs)
        if reason is None and _passed_by(model, model.get_submodule(name), inputs):
            reason = f"the images also reach the logits on another way than through '{name}'"
    if reason is not None:
        raise DeatError(
            f"the network has no first layer that could be separated from the others: {reason}; use another network "
            "or method"
        )
    return name


def _examine(model: nn.Module, inputs: Tensor) -> tuple[str, str | None]:
    """Return the name of the first layer that a network uses, and the reason why it is unsuitable, if any."""
    called: list[tuple[str, nn.Module, Tensor | None]] = []

    def noted(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            called.append((name, module, output.sum() if isinstance(output, Tensor) else None))

        return note

    handles = [
        module.register_forward_hook(noted(name))
        for name, module in model.named_modules()
        if isinstance(module, (*LAYERS, *NORMS))
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        return "", "it uses no convolution or linear layer"
    name, layer, total = called[0]
    if not isinstance(layer, LAYERS):
        return name, f"it begins with the {type(layer).__name__} '{name}'"
    if sum(module is layer for _, module, _ in called) > 1:
        return name, f"it uses '{name}' more than once"
    own = set(layer.parameters())
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in own]
    if total is None or not total.requires_grad:
        return name, f"the output of '{name}' has no gradient"
    of_images, *of_others = torch.autograd.grad(total, [inputs, *others], allow_unused=True)
    if of_images is None:
        return name, f"the output of '{name}' does not depend on the images"
    if any(gradient is not None for gradient in of_others):
        return name, f"other parameters are used before '{name}'"
    return name, None


def _passed_by(model: nn.Module, layer: nn.Module, inputs: Tensor) -> bool:
    """Return whether the logits depend on the images also on a way that does not lead through a layer."""
    handle = layer.register_forward_hook(lambda module, _, output: output.detach())
    try:
        logits: Tensor = model(inputs)
    finally:
        handle.remove()
    return logits.requires_grad and torch.autograd.grad(logits.sum(), inputs, allow_unused=True)[0] is not None


def output_of(layer: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the output of a layer for images (N, C, H, W); the network's ``forward`` is run only as far as there.

    Raises:
        DeatError: The network did not use the layer.
    """

    def stop(module: nn.Module, _: Any, output: Tensor) -> None:
        raise _ReachedError(output)

    handle = layer.register_forward_hook(stop)
    try:
        forward(images)
    except _ReachedError as reached:
        return reached.output
    finally:
        handle.remove()
    raise DeatError(f"the network did not use its first layer, a {type(layer).__name__}, in this forward pass")


@contextmanager
def output_gradients(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the gradient of a layer's output.

    Yields:
        A list that the backward pass of a forward pass within the context appends the gradient to.
    """
    gradients: list[Tensor] = []

    def watch(module: nn.Module, _: Any, output: Tensor) -> None:
        # Unlike retain_grad, a hook gets the gradient of the layer's own output even if that is changed in place later.
        output.register_hook(gradients.append)

    handle = layer.register_forward_hook(watch)
    try:
        yield gradients
    finally:
        handle.remove()
