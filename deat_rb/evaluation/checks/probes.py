"""A model under suspicion: what the checks measure on it, with passes and attacks of their own.

They share no code with the attacks that they are to catch out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from deat_rb.utils import seeding

DIRECTIONS = 8


class Probe:
    """A model, in eval mode and with its parameters frozen, and a few of the examples it was evaluated on.

    Attributes:
        images: In [0, 1], (N, C, H, W), on the model's device.
        labels: (N,), there.
        eps: The radius, in [0, 1] pixel units.
        norm: ``Linf`` or ``L2``.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        norm: str,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.eps = eps
        self.norm = norm
        self.batch_size = batch_size
        self.seed = seed

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W), a batch at a time."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in images.split(self.batch_size)]).float()

    def correct(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Says which images (N, C, H, W), made of the examples ``rows``, are still classified correctly; (N,) bool."""
        labels = self.labels if rows is None else self.labels[rows]
        return self.logits(images).argmax(dim=1) == labels

    @cached_property
    def clean(self) -> Tensor:
        """The logits (N, K) of the images as they are."""
        return self.logits(self.images)

    @cached_property
    def clean_correct(self) -> Tensor:
        """Which images are classified correctly as they are, (N,) bool."""
        return self.clean.argmax(dim=1) == self.labels

    @cached_property
    def _first_pass(self) -> tuple[Tensor, Tensor] | None:
        return self._gradient(self.images, lambda logits, rows: _cross_entropy(logits, self.labels[rows]))

    @property
    def gradient(self) -> Tensor | None:
        """The cross-entropy's gradient (N, C, H, W) at the images; None if the logits have none."""
        return None if self._first_pass is None else self._first_pass[1]

    @property
    def differentiated(self) -> Tensor | None:
        """The logits (N, K) that the model gave when it was asked for that gradient."""
        return None if self._first_pass is None else self._first_pass[0]

    def _gradient(self, images: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Logits and gradient of ``loss(logits, rows)``, ``rows`` being the numbers (B,) of a batch's examples."""
        outputs, gradients = [], []
        for rows in torch.arange(len(images), device=images.device).split(self.batch_size):
            part = images[rows].clone().requires_grad_()
            with torch.enable_grad():
                logits = self.model(part)
                if not logits.requires_grad:
                    return None
                (gradient,) = torch.autograd.grad(loss(logits, rows).sum(), part, allow_unused=True)
            if gradient is None:
                return None
            outputs.append(logits.detach().float())
            gradients.append(gradient)
        return torch.cat(outputs), torch.cat(gradients)

    def projected(self, adv: Tensor, images: Tensor, eps: float) -> Tensor:
        """Brings ``adv`` to within eps of ``images``, both (N, C, H, W), and into [0, 1]."""
        delta = adv - images
        if self.norm == "Linf":
            return (images + delta.clamp(-eps, eps)).clamp(0, 1)
        return (images + delta * (eps / lengths(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)

    def distances(self, adv: Tensor, images: Tensor) -> Tensor:
        """How far each of ``adv`` is from its image, (N,); both are (N, C, H, W)."""
        delta = (adv - images).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "Linf" else torch.linalg.vector_norm(delta, dim=1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of unit size along which a loss with this gradient (N, C, H, W) rises most."""
        gradient = gradient.nan_to_num()
        return gradient.sign() if self.norm == "Linf" else gradient / lengths(gradient).clamp_min(1e-30)

    def noisy(self, kind: str) -> Tensor:
        """The images under ``uniform`` or ``gaussian`` noise of size eps."""
        numbers = seeding.generator(self.seed, "checks", kind)
        noise = torch.empty(self.images.shape)
        noise = noise.uniform_(-1, 1, generator=numbers) if kind == "uniform" else noise.normal_(generator=numbers)
        size = 1.0 if self.norm == "Linf" else 1 / math.sqrt(noise[0].numel())
        return self.projected(self.images + self.eps * size * noise.to(self.images.device), self.images, self.eps)

    def pgd(self, rows: Tensor, *, eps: float, steps: int, loss: str = "ce", start: str | None = "start") -> Tensor:
        """Whether an iterate of `run_pgd` was misclassified, (N,) bool."""
        return self.run_pgd(rows, eps=eps, steps=steps, loss=loss, start=start)[1]

    def run_pgd(
        self, rows: Tensor, *, eps: float, steps: int, loss: str = "ce", start: str | None = "start"
    ) -> tuple[Tensor, Tensor]:
        """Attacks the examples ``rows`` (N,) by projected gradient descent with steps of eps / 4.

        Args:
            rows: The numbers of the examples.
            eps: Radius, in [0, 1] pixel units.
            steps: How many.
            loss: ``ce`` or ``margin``.
            start: The name of the random start; None begins at the images.

        Returns:
            Where each went (N, C, H, W), or was first misclassified, and whether it was, (N,) bool.
        """
        images, labels = self.images[rows], self.labels[rows]
        broken = torch.zeros_like(labels, dtype=torch.bool)
        left = torch.arange(len(rows), device=images.device)
        adv = images
        if start is not None:
            numbers = seeding.generator(self.seed, "checks", start)
            noise = torch.empty(self.images.shape).uniform_(-eps, eps, generator=numbers)
            adv = self.projected(adv + noise.to(adv.device)[rows], images, eps)
        objective = _cross_entropy if loss == "ce" else _margin
        for _ in range(steps):
            if len(left) == 0:
                break
            passed = self._gradient(adv[left], partial(_of_rows, objective, labels[left]))
            if passed is None:
                break
            logits, gradient = passed
            broken[left] = logits.argmax(dim=1) != labels[left]
            stepped = self.projected(adv[left] + eps / 4 * self.steepest(gradient), images[left], eps)
            adv = adv.index_copy(0, left, stepped)
            left = left[~broken[left]]
        if len(left):
            broken[left] = ~self.correct(adv[left], rows[left])
        return adv, broken

    def square(self, rows: Tensor, queries: int) -> Tensor:
        """Attacks the examples ``rows`` (N,) by Square (Andriushchenko et al. 2020), which needs no gradient.

        Returns:
            Which of them it broke, (N,) bool.
        """
        from pyautoattack.square import SquareAttack

        attack = SquareAttack(self.model, norm=self.norm, n_queries=queries, eps=self.eps, seed=self.seed,
                              device=self.images.device)  # fmt: skip
        broken = [torch.zeros(0, dtype=torch.bool, device=rows.device)]
        for part in rows.split(self.batch_size) if len(rows) else ():
            with torch.no_grad():
                adv = attack.perturb(self.images[part].clone(), self.labels[part].clone())
            adv = self.projected(adv, self.images[part], self.eps)
            broken.append(~self.correct(adv, part))
        return torch.cat(broken)

    def agreement(self, count: int) -> Tensor:
        """Holds the gradient against finite differences, which see what the function really does.

        At a random point of each ball the margin to the strongest wrong class is differentiated in `DIRECTIONS` random
        directions, by backpropagation and by central differences over a quarter of eps to either side.

        Args:
            count: Of how many examples, from the first on.

        Returns:
            For each how well the two sets of numbers agree, (count,): 2 a.b / (a.a + b.b), which is 1 where they are
            equal, 0 where they are unrelated, of quite different size or not numbers, and -1 where they are opposite.
        """
        numbers = seeding.generator(self.seed, "checks", "directions")
        eps = max(self.eps, 1 / 255)  # below, differences of float32 logits are rounding
        size = eps / 4 if self.norm == "Linf" else eps / 4 / math.sqrt(self.images[0].numel())
        labels = self.labels[:count]
        noise = torch.empty(self.images[:count].shape).uniform_(-4 * size, 4 * size, generator=numbers)
        images = (self.images[:count] + noise.to(labels.device)).clamp(min(size, 0.5), max(1 - size, 0.5))
        others = _wrong(self.logits(images), labels).argmax(dim=1)

        def difference(logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
            return _at(logits, others[rows]) - _at(logits, labels[rows])

        passed = self._gradient(images, difference)
        if passed is None:
            return torch.zeros(len(labels), device=labels.device)
        expected, found = [], []
        for _ in range(DIRECTIONS):
            signs = torch.randint(0, 2, images.shape, generator=numbers).to(images) * 2 - 1
            above, below = (self.logits(images + way * size * signs) for way in (1, -1))
            found.append((difference(above) - difference(below)) / (2 * size))
            expected.append((passed[1] * signs).flatten(1).sum(dim=1))
        told, seen = torch.stack(expected).double(), torch.stack(found).double()
        return (2 * (told * seen).sum(dim=0) / (told**2 + seen**2).sum(dim=0)).nan_to_num()


def lengths(delta: Tensor) -> Tensor:
    """The L2 norm of each of (N, C, H, W), as (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms.view(-1, 1, 1, 1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the right class is ahead in logits (N, K), (N,); negative where it is not."""
    return -_margin(logits, labels)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return _wrong(logits, labels).amax(dim=1) - _at(logits, labels)


def _of_rows(objective: Callable[[Tensor, Tensor], Tensor], labels: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    return objective(logits, labels[rows])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
