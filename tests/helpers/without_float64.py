"""Tensors of a device without float64, such as Apple's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class WithoutFloat64(Tensor):
    """A tensor that refuses to become float64, as do all results computed from it, until it is moved by ``cpu()``."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        compute: Any = super().__torch_function__
        result = compute(func, types, args, kwargs)
        if func is Tensor.cpu:
            return result.as_subclass(Tensor)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result
