"""The threat model: how far an adversarial image may be from its clean one.

Only Linf so far. An L2 threat is another class with the same three methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from deat_rb import randomness
from deat_rb.errors import DeatError


def parse_fraction(text: str | float) -> float:
    """Reads ``8/255``, ``0.03`` or a number.

    Args:
        text: What the user typed, in units of the image range [0, 1].

    Raises:
        DeatError: If it is neither a number nor a fraction of numbers.
    """
    if isinstance(text, int | float):
        return float(text)
    top, slash, bottom = text.strip().partition("/")
    try:
        value = float(top)
        if slash:
            value /= float(bottom)
    except ZeroDivisionError:
        raise DeatError(f"'{text}' divides by zero; write a fraction such as 8/255 or a number such as 0.03") from None
    except ValueError:
        raise DeatError(f"'{text}' is not a number; write a fraction such as 8/255 or a number such as 0.03") from None
    return value


def format_fraction(value: float) -> str:
    """Writes a size as people do: ``8/255`` where it is a whole number of 255ths, else as a decimal."""
    parts = value * 255
    if round(parts) > 0 and abs(parts - round(parts)) < 1e-9:
        return f"{round(parts)}/255"
    return f"{value:.6g}"


def check_eps(eps: float, name: str = "eps") -> float:
    """Gives back an admissible eps.

    Args:
        eps: The radius, in [0, 1] pixel units.
        name: What to call it in the message.

    Raises:
        DeatError: If it is not in (0, 1].
    """
    if not (math.isfinite(eps) and 0 < eps <= 1):
        raise DeatError(
            f"{name} = {eps:g} is outside (0, 1]; images are in [0, 1], so give a size in that unit, such as 8/255"
        )
    return float(eps)


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
        return (images + randomness.uniform_like(images, self.eps)).clamp(0, 1)

    def ascend(self, adv: Tensor, images: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """One step of size ``alpha`` along the steepest direction, then the projection (Equation 3).

        Args:
            adv: Where the step begins, (N, C, H, W).
            images: The clean images, (N, C, H, W).
            gradient: The loss's gradient at ``adv``, (N, C, H, W).
            alpha: The step size, in [0, 1] pixel units.
        """
        return self.project(adv + alpha * gradient.sign(), images)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Brings ``adv`` back into the ball around ``images`` and into [0, 1]."""
        delta = (adv - images).clamp(-self.eps, self.eps)
        return (images + delta).clamp(0, 1)
