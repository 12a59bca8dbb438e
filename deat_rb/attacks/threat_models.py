"""Threat models: the Linf and L2 balls around an image, their random starts, steps and projections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import parse_scalar

ROUNDING = 1e-6
"""Rounding tolerance when checking whether a projected image is in the ball."""


@dataclass(frozen=True)
class Linf:
    """Linf ball: images in [0, 1] that differ by at most ``eps`` in every value.

    The operations and their order match torchattacks' PGD, so that the results are bit-identical.

    Attributes:
        eps: The radius, in [0, 1] pixel units.
    """

    eps: float

    @staticmethod
    def training_noise(images: Tensor, radius: float) -> Tensor:
        """Draw noise from U(-radius, radius) for a training batch, in the shape of ``images`` (N, C, H, W)."""
        return seeding.uniform_like(images, radius)

    @staticmethod
    def dual_norms(gradient: Tensor) -> Tensor:
        """Return the L1 norm of each gradient, the norm dual to Linf, (N,)."""
        return gradient.abs().flatten(1).sum(dim=1)

    @staticmethod
    def total_dual_norm(gradient: Tensor) -> Tensor:
        """Return the sum of the gradients' L1 norms over the batch, a 0-d tensor."""
        return gradient.abs().sum()

    def ascend(
        self, adv: Tensor, images: Tensor, gradient: Tensor, alpha: float, noise: Tensor | None = None
    ) -> Tensor:
        """Take one steepest-ascent step of size ``alpha`` and project (Equation 3).

        Args:
            adv: The current iterate, (N, C, H, W).
            images: The clean images, (N, C, H, W).
            gradient: The loss's gradient at ``adv``, (N, C, H, W).
            alpha: The step size, in [0, 1] pixel units.
            noise: Added after the step and before the projection, (N, C, H, W).
        """
        stepped = gradient.sign().mul_(alpha).add_(adv)
        if noise is not None:
            stepped.add_(noise)
        return stepped.sub_(images).clamp_(-self.eps, self.eps).add_(images).clamp_(0, 1)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Project ``adv`` onto the ball around ``images`` and onto [0, 1]."""
        delta = (adv - images).clamp(-self.eps, self.eps)
        return (images + delta).clamp(0, 1)

    def step(self, gradient: Tensor, alpha: float) -> Tensor:
        """Return the steepest step of size ``alpha``, without projection, (N, C, H, W)."""
        return alpha * gradient.sign()

    def contains(self, adv: Tensor, images: Tensor) -> Tensor:
        """Return which of ``adv`` are finite, in [0, 1] and within eps + 1e-6 of ``images``; (N,) bool."""
        inside = ((adv - images).abs() <= self.eps + ROUNDING) & (adv >= 0) & (adv <= 1)
        return inside.flatten(1).all(dim=1)

    def start(self, images: Tensor, numbers: torch.Generator) -> Tensor:
        """Draw a uniform start on the generator's device; a CPU generator gives the same start on every device."""
        noise = torch.empty(images.shape, dtype=images.dtype, device=numbers.device)
        noise.uniform_(-self.eps, self.eps, generator=numbers)
        return (images + noise.to(images.device)).clamp(0, 1)

    def noise(self, images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
        """Add ``gaussian`` noise of standard deviation eps or ``uniform`` noise of U(-eps, eps), and project."""
        return self.project(images + self.eps * _draw(images, numbers, kind), images)


@dataclass(frozen=True)
class L2:
    """L2 ball: images in [0, 1] at a Euclidean distance of at most ``eps``.

    As in torchattacks' PGDL2, the projection is onto the ball and then onto [0, 1].

    Attributes:
        eps: The radius, in [0, 1] pixel units: the distance between a black and a white pixel is 1.
    """

    eps: float

    def step(self, gradient: Tensor, alpha: float) -> Tensor:
        """Return the steepest step of length ``alpha``, (N, C, H, W); zeros where the gradient is zero."""
        return alpha * _unit(gradient)

    @staticmethod
    def training_noise(images: Tensor, radius: float) -> Tensor:
        """Draw noise for a training batch as torchattacks' PGDL2: random directions and lengths of U(0, radius)."""
        lengths = seeding.uniform_like(images[:, :1, :1, :1], radius).abs()
        return _unit(seeding.normal_like(images, 1.0)) * lengths

    @staticmethod
    def dual_norms(gradient: Tensor) -> Tensor:
        """Return the L2 norm of each gradient, the norm dual to L2, (N,)."""
        return _norms(gradient).flatten()

    @staticmethod
    def total_dual_norm(gradient: Tensor) -> Tensor:
        """Return the sum of the gradients' L2 norms over the batch, a 0-d tensor."""
        return _norms(gradient).sum()

    def ascend(
        self, adv: Tensor, images: Tensor, gradient: Tensor, alpha: float, noise: Tensor | None = None
    ) -> Tensor:
        """Take one `step` of length ``alpha`` and project; arguments as for `Linf`."""
        stepped = adv + self.step(gradient, alpha)
        return self.project(stepped if noise is None else stepped + noise, images)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Project ``adv`` onto the ball around ``images`` and onto [0, 1]."""
        delta = adv - images
        factor = (self.eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1)
        return (images + delta * factor).clamp(0, 1)

    def contains(self, adv: Tensor, images: Tensor) -> Tensor:
        """Return which of ``adv`` are finite, in [0, 1] and within eps of ``images`` up to rounding; (N,) bool."""
        lengths = _norms((adv - images).cpu().double()).flatten()  # Apple's GPUs have no float64
        near = (lengths <= self.eps * (1 + ROUNDING) + ROUNDING).to(adv.device)
        return near & ((adv >= 0) & (adv <= 1)).flatten(1).all(dim=1)

    def start(self, images: Tensor, numbers: torch.Generator) -> Tensor:
        """Draw a start as torchattacks' PGDL2 does: in a random direction, at a distance drawn from U(0, eps)."""
        direction = torch.empty(images.shape, dtype=images.dtype, device=numbers.device).normal_(generator=numbers)
        length = torch.empty((len(images), 1, 1, 1), dtype=images.dtype, device=numbers.device)
        length.uniform_(0, self.eps, generator=numbers)
        return (images + (_unit(direction) * length).to(images.device)).clamp(0, 1)

    def noise(self, images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
        """Add ``gaussian`` or ``uniform`` noise with an expected length of about eps, projected onto the ball."""
        values = images[0].numel()
        scale = self.eps / math.sqrt(values if kind == "gaussian" else values / 3)
        return self.project(images + scale * _draw(images, numbers, kind), images)


DEFAULT_EPS = {"Linf": 8 / 255, "L2": 0.5}
"""Default radius by norm: those of RobustBench's CIFAR-10."""

THREATS: dict[str, type[Linf] | type[L2]] = {"Linf": Linf, "L2": L2}


def threat_model(norm: str, eps: float) -> Linf | L2:
    """Return the threat model ``Linf`` or ``L2`` with a given radius.

    Raises:
        DeatError: If the norm is unknown.
    """
    return THREATS[check_norm(norm)](eps)


def check_norm(norm: str) -> str:
    """Return the canonical name of a norm, which may be given in any case.

    Raises:
        DeatError: If it is neither ``Linf`` nor ``L2``.
    """
    spelled = {name.lower(): name for name in THREATS}.get(str(norm).lower())
    if spelled is None:
        raise DeatError(f"unknown norm '{norm}': choose one of {', '.join(THREATS)}")
    return spelled


def check_radius(eps: str | float, name: str = "eps", *, norm: str = "Linf") -> float:
    """Validate the radius of an evaluation, which unlike a training radius may be 0, and above 1 in L2.

    Args:
        eps: A number or a string such as ``8/255``, in [0, 1] pixel units.
        name: Name of the option, for error messages.
        norm: ``Linf`` or ``L2``.

    Raises:
        DeatError: If ``eps`` is not a valid radius.
    """
    value = parse_scalar(eps)
    if norm == "Linf" and not 0 <= value <= 1:
        raise DeatError(
            f"{name} = {value:.10g} is outside [0, 1]; images are in [0, 1], so give a radius such as 8/255"
        )
    if not (math.isfinite(value) and value >= 0):
        raise DeatError(
            f"{name} = {value:g} is not a finite, non-negative radius; give one in [0, 1] pixel units, such as 0.5"
        )
    return value


def _draw(images: Tensor, numbers: torch.Generator, kind: str) -> Tensor:
    """Draw standard normal or U(-1, 1) noise in the shape of ``images``."""
    values = torch.empty(images.shape, dtype=images.dtype, device=numbers.device)
    drawn = values.normal_(generator=numbers) if kind == "gaussian" else values.uniform_(-1, 1, generator=numbers)
    return drawn.to(images.device)


def _norms(delta: Tensor) -> Tensor:
    """Return Euclidean lengths, (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norms


def _unit(gradient: Tensor) -> Tensor:
    """Scale every gradient to length 1, however small it is; zeros stay zeros."""
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return scaled / _norms(scaled).clamp_min(tiny)
