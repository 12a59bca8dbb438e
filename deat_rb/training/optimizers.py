"""Optimizers: SGD and AdamW, weight decay by kind of parameter, and gradient clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, AdamW, Optimizer

from deat_rb.training.lr import set_rate
from deat_rb.training.options import OptimConfig

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Normalization layers; the first is the base class of BatchNorm and InstanceNorm."""


def build_optimizer(model: nn.Module, optim: OptimConfig, device: torch.device, *, recorded: bool = False) -> Optimizer:
    """Return the optimizer of a model's parameters, which are on ``device``.

    On a GPU, and if steps are ``recorded``, it is the fused version, which unscales without a device sync, and its
    learning rate is a tensor, which a CUDA graph reads in each run; see `deat_rb.training.lr.set_rate`. Its state is
    initialized with zeros here: if the loss scaler skipped the first step on overflow, fused SGD would leave it
    uninitialized.
    """
    decayed, exempt = _by_decay(model, optim.no_decay)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    fused = device.type == "cuda" or recorded
    rate = torch.tensor(optim.lr, device=decayed[0].device) if fused else optim.lr
    shared: dict[str, Any] = {"lr": rate, "weight_decay": optim.weight_decay, "fused": fused}
    optimizer: Optimizer
    if optim.optimizer == "adamw":
        optimizer = AdamW(groups, betas=(optim.momentum, 0.999), capturable=device.type == "cuda", **shared)
    else:
        optimizer = SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, **shared)
    set_rate(optimizer, optim.lr)
    for parameter in (*decayed, *exempt):
        if optim.optimizer == "adamw":
            step = torch.zeros((), device=parameter.device if fused else "cpu")
            optimizer.state[parameter] = {
                "step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
            }  # fmt: skip
        elif optim.momentum:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if optim.grad_clip is not None:
        optimizer.register_step_pre_hook(ClipGradients(optim.grad_clip))
    return optimizer


def _by_decay(model: nn.Module, no_decay: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with weight decay and those without, each in the order of ``model.parameters()``."""
    exempt: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Attention has an in_proj_bias, and an LSTM a bias_ih_l0.
            is_norm, is_bias = isinstance(module, NORMS), name.endswith("bias") or name.startswith("bias_")
            if (is_norm and "norm" in no_decay) or (is_bias and "bias" in no_decay):
                exempt.add(parameter)
    parameters = list(model.parameters())
    return [p for p in parameters if p not in exempt], [p for p in parameters if p in exempt]


class ClipGradients:
    """Hook before an optimizer step: scale the gradients so that their total L2 norm is at most ``max_norm``.

    It does not synchronize with the device. Non-finite gradients become NaN.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Scale the gradients; the arguments are those of an optimizer's step hook."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        clip_grads_with_norm_(parameters, self.max_norm, norm if scale is None else norm / scale)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state by name and number of the parameter, such as ``momentum_buffer.0``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}.{index}": tensor
        for index, parameter in enumerate(parameters)
        for name, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor)
    }
