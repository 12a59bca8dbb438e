"""Trial forward passes, which check that a model accepts given images and returns usable logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError

ADVICE = "use images that the model was built for"


def trial_logits(
    model: nn.Module,
    images: Tensor,
    *,
    source: str = "the model",
    num_classes: int | None = None,
    advice: str = ADVICE,
) -> Tensor:
    """Return the logits (N, K) of a forward pass without gradients, in the model's current mode.

    The model gets a copy of the images. Torch's random state is restored, but BatchNorm's statistics are not: in train
    mode, call this within `deat_rb.utils.module_state.preserve_state`.

    Args:
        model: Any network.
        images: (N, C, H, W), on the model's device.
        source: Name of the model in error messages.
        num_classes: K, if known; otherwise 2 or more.
        advice: Hint at the end of the error message.

    Raises:
        DeatError: The forward pass fails, changes its input in place, or does not return floating-point logits with
            one row per image and the expected number of columns.
    """
    shape = "x".join(map(str, images.shape[1:]))
    copy = images.clone()
    version = copy._version  # counts in-place operations, including those that change no value here
    try:
        with torch.no_grad(), seeding.preserved():
            logits = model(copy)
    except Exception as error:  # any exception: the forward pass is user code
        raise DeatError(f"{source} does not accept {images.dtype} images of {shape} on {images.device} "
                        f"({type(error).__name__}: {first_line(error)}): {advice}") from error  # fmt: skip
    if copy._version != version or not torch.equal(copy, images):
        raise DeatError(f"{source} changes its input in place (as x.sub_(...) and Normalize(inplace=True) do): write "
                        "its forward without in-place operations on the images")  # fmt: skip
    if not isinstance(logits, Tensor):
        raise DeatError(f"{source} returns a {type(logits).__name__} for {len(images)} images of {shape}, not a "
                        f"tensor of logits: {advice}")  # fmt: skip
    if not logits.is_floating_point():
        raise DeatError(f"{source} returns {logits.dtype} logits: return floating-point logits")
    wanted = f"({len(images)}, {num_classes or 'K'})" + ("" if num_classes else " with K >= 2")
    columns = logits.shape[1] if logits.ndim == 2 else 0
    if columns < 2 or len(logits) != len(images) or columns != (num_classes or columns):
        raise DeatError(f"{source} returns logits of shape {tuple(logits.shape)} for {len(images)} images of {shape}, "
                        f"not {wanted}: {advice}")  # fmt: skip
    return logits


def check_weights_exist(model: nn.Module, purpose: str) -> None:
    """Check that a model is a module whose parameters exist and can take part in automatic differentiation.

    Args:
        model: Any object.
        purpose: Purpose of the model, such as ``training``, for the message.

    Raises:
        DeatError: The model is not a `torch.nn.Module`, has lazy layers, or was created inside `torch.inference_mode`.
    """
    if not isinstance(model, nn.Module):
        raise DeatError(f"the model must be a torch.nn.Module that returns logits, not a {type(model).__name__}")
    tensors = (*model.parameters(), *model.buffers())
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise DeatError(f"the model has lazy layers without weights: forward one batch through it before {purpose}")
    if any(tensor.is_inference() for tensor in tensors):
        raise DeatError(
            f"the model was created inside torch.inference_mode(), which rules out {purpose}: create it outside"
        )


def check_not_meta(model: nn.Module) -> None:
    """Check that a model's weights have values, not only shapes.

    Raises:
        DeatError: A tensor of the model is on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise DeatError("the model has no weights, only their shapes (device meta): load weights, or move it with "
                        "model.to_empty(device=...) and initialize it")  # fmt: skip


def check_trainable(model: nn.Module, *, source: str) -> None:
    """Check that all parameters of a network are initialized and that its state dict can be saved.

    Raises:
        DeatError: The network has lazy layers, or its state dict contains complex, sparse or quantized tensors or
            objects that are not tensors (`get_extra_state`).
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if torch.nn.parameter.is_lazy(tensor)]
    if lazy:
        raise DeatError(f"{source} has lazy layers ({lazy[0]} has no shape yet): run a batch of images through it "
                        "before returning it, or use layers with explicit sizes")  # fmt: skip
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise DeatError(f"{source} has a {type(value).__name__} under '{name}' in its state dict, but only tensors "
                            "can be saved: return a tensor from get_extra_state, or remove it")  # fmt: skip
        if value.is_complex() or value.is_quantized or value.layout != torch.strided:
            kind = "complex" if value.is_complex() else "quantized" if value.is_quantized else "sparse"
            raise DeatError(f"{source} has the {kind} tensor '{name}', but only dense real tensors can be saved: store "
                            "real and imaginary parts, or dense values")  # fmt: skip


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__
