"""Models: architectures by name with normalization as a layer, loading of weights, and pretrained networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.utils.lazy import attach

if TYPE_CHECKING:
    from deat_rb.models.spec import ModelSpec, NormalizedModel, build_model

__all__ = [
    "ModelSpec",
    "NormalizedModel",
    "build_model",
]

_MODULE_OF = {
    "ModelSpec": "spec",
    "NormalizedModel": "spec",
    "build_model": "spec",
}

if not TYPE_CHECKING:  # a type checker reports unknown names
    __getattr__, __dir__ = attach(__name__, _MODULE_OF)
