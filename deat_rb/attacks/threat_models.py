"""The threat model: how far an adversarial image may be from its clean one.

Training knows Linf; an evaluation knows L2 as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import parse_fraction

ROUNDING = 1e-6
"""How far outside of the ball an image may be that was projected onto it."""


@dataclass(frozen=True)
class Linf:
    """The ball of all images that differ by at most ``eps`` in every value, within [0, 1].

    The arithmetic is, operation for operation, that of torchattacks' PGD, so that both give the same bits.

    Attributes:
        eps: The radius, in [0, 1] pixel units.
    """

    eps: float

    def uniform_start(self, images: Tensor) -> Tensor:
        """Draws a start from U(-eps, eps) around ``images`` (N, C, H, W)."""
        return (images + seeding.uniform_like(images, self.eps)).clamp(0, 1)

    def ascend(self, adv: Tensor, images: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """One step of size ``alpha`` along the steepest direction, then the projection (Equation 3).

        Args:
            adv: Where the step begins, (N, C, H, W).
            images: The clean images, (N, C, H, W).
            gradient: The loss's gradient at ``adv``, (N, C, H, W).
            alpha: The step size, in [0, 1] pixel units.
        """
        stepped = gradient.sign().mul_(alpha).add_(adv)
        return stepped.sub_(images).clamp_(-self.eps, self.eps).add_(images).clamp_(0, 1)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Brings ``adv`` back into the ball around ``images`` and into [0, 1]."""
        delta = (adv - images).clamp(-self.eps, self.eps)
        return (images + delta).clamp(0, 1)

    def step(self, gradient: Tensor, alpha: float) -> Tensor:
        """The steepest step of size ``alpha``, without any projection, (N, C, H, W)."""
        return alpha * gradient.sign()

    def contains(self, adv: Tensor, images: Tensor) -> Tensor:
        """Says which of ``adv`` are finite, in [0, 1] and within eps + 1e-6 of ``images``; (N,) bool."""
        inside = ((adv - images).abs() <= self.eps + ROUNDING) & (adv >= 0) & (adv <= 1)
        return inside.flatten(1).all(dim=1)

    def start(self, images: Tensor, numbers: torch.Generator) -> Tensor:
        """Draws `uniform_start` from a generator, on its device: a CPU generator gives every device the same start."""
        noise = torch.empty(images.shape, dtype=images.dtype, device=numbers.device)
        noise.uniform_(-self.eps, self.eps, generator=numbers)
        return (images + noise.to(images.device)).clamp(0, 1)

    def noise(self, images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
        """Adds ``gaussian`` noise of standard deviation eps or ``uniform`` noise of U(-eps, eps), within the ball."""
        return self.project(images + self.eps * _draw(images, numbers, kind), images)


@dataclass(frozen=True)
class L2:
    """The ball of all images at a Euclidean distance of at most ``eps``, within [0, 1].

    As in torchattacks' PGDL2, the projection goes onto the ball and then into [0, 1].

    Attributes:
        eps: The radius, in [0, 1] pixel units: the distance between a black and a white pixel is 1.
    """

    eps: float

    def step(self, gradient: Tensor, alpha: float) -> Tensor:
        """The steepest step of length ``alpha``, (N, C, H, W); zeros where the gradient is zero."""
        return alpha * _unit(gradient)

    def ascend(self, adv: Tensor, images: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """One `step` of length ``alpha``, then the projection; arguments as for `Linf`."""
        return self.project(adv + self.step(gradient, alpha), images)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Brings ``adv`` back into the ball around ``images`` and into [0, 1]."""
        delta = adv - images
        factor = (self.eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1)
        return (images + delta * factor).clamp(0, 1)

    def contains(self, adv: Tensor, images: Tensor) -> Tensor:
        """Says which of ``adv`` are finite, in [0, 1] and within eps of ``images`` but for rounding; (N,) bool."""
        near = _norms((adv - images).double()).flatten() <= self.eps * (1 + ROUNDING) + ROUNDING
        return near & ((adv >= 0) & (adv <= 1)).flatten(1).all(dim=1)

    def start(self, images: Tensor, numbers: torch.Generator) -> Tensor:
        """Draws a start as torchattacks' PGDL2 does: any direction, a length of U(0, eps)."""
        direction = torch.empty(images.shape, dtype=images.dtype, device=numbers.device).normal_(generator=numbers)
        length = torch.empty((len(images), 1, 1, 1), dtype=images.dtype, device=numbers.device)
        length.uniform_(0, self.eps, generator=numbers)
        return (images + (_unit(direction) * length).to(images.device)).clamp(0, 1)

    def noise(self, images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
        """Adds ``gaussian`` or ``uniform`` noise of an expected length of about eps, within the ball."""
        values = images[0].numel()
        scale = self.eps / math.sqrt(values if kind == "gaussian" else values / 3)
        return self.project(images + scale * _draw(images, numbers, kind), images)


THREATS: dict[str, type[Linf] | type[L2]] = {"Linf": Linf, "L2": L2}


def threat_model(norm: str, eps: float) -> Linf | L2:
    """Finds the ball ``Linf`` or ``L2`` of a radius.

    Raises:
        DeatError: If there is no such norm.
    """
    return THREATS[check_norm(norm)](eps)


def check_norm(norm: str) -> str:
    """Spells the name of a norm, given in any case.

    Raises:
        DeatError: If it is neither ``Linf`` nor ``L2``.
    """
    spelled = {name.lower(): name for name in THREATS}.get(str(norm).lower())
    if spelled is None:
        raise DeatError(f"there is no norm '{norm}' here: known are {', '.join(THREATS)}")
    return spelled


def check_radius(eps: str | float, name: str = "eps", *, norm: str = "Linf") -> float:
    """Gives back the radius of an evaluation, which unlike that of a training may be 0, and in L2 over 1.

    Args:
        eps: A number or a text such as ``8/255``, in [0, 1] pixel units.
        name: What to call it in the message.
        norm: ``Linf`` or ``L2``.

    Raises:
        DeatError: If it is no such radius.
    """
    value = parse_fraction(eps)
    if norm == "Linf" and not 0 <= value <= 1:
        raise DeatError(
            f"{name} = {value:g} is outside [0, 1]; images are in [0, 1], so give a size in that unit, such as 8/255"
        )
    if not (math.isfinite(value) and value >= 0):
        raise DeatError(f"{name} = {value:g} is no length of 0 or more; give one in pixel units of [0, 1], such as 0.5")
    return value


def _draw(images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
    """Standard normal or U(-1, 1) numbers in the shape of ``images``."""
    values = torch.empty(images.shape, dtype=images.dtype, device=numbers.device)
    drawn = values.normal_(generator=numbers) if kind == "gaussian" else values.uniform_(-1, 1, generator=numbers)
    return drawn.to(images.device)


def _norms(delta: Tensor) -> Tensor:
    """Euclidean lengths, (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norms


def _unit(gradient: Tensor) -> Tensor:
    """Brings every gradient to the length 1, however small it is; zeros stay zeros."""
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return scaled / _norms(scaled).clamp_min(tiny)
