"""A stand-in for a GPU: tensors on the meta device, whose copies from and to host memory are recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Transfers(TorchDispatchMode):
    """Records the copies between host and device, for each of which the host would wait; what it reads is zeros."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "copy" not in str(func):
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        source = given[-1]
        target = given[0].device if len(given) > 1 else torch.device(kwargs.get("device") or source.device)
        if {source.device.type, target.type} != {"cpu", "meta"}:
            return func(*args, **kwargs)
        self.names.append(f"{source.device.type} to {target.type}")
        if target.type == "meta":
            return func(*args, **kwargs)
        return torch.zeros(source.shape, dtype=source.dtype)
