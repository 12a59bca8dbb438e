"""Independent measurements (forward passes, gradients, attacks) for the sanity checks.

They share no code with the attacks that are checked: PGD is from torchattacks, Square from pyautoattack.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deat_rb.attacks.autoattack import fit_to_tiles
from deat_rb.utils import seeding

DIRECTIONS = 8
"""Number of random directions per example in which gradients are compared with finite differences."""


class Probe:
    """A model in eval mode with frozen parameters, and the first few evaluation examples.

    Attributes:
        images: Images in [0, 1], (N, C, H, W), on the model's device.
        labels: Labels, (N,), on the same device.
        eps: Radius, in [0, 1] pixel units.
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
        """Return the logits (N, K) of images (N, C, H, W), computed in batches."""
        with torch.no_grad():
            return torch.cat([self.model(part.clone()) for part in images.split(self.batch_size)]).float()

    def correct(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return which images (N, C, H, W) of the examples ``rows`` are classified correctly, (N,) bool."""
        labels = self.labels if rows is None else self.labels[rows]
        return self.logits(images).argmax(dim=1) == labels

    @cached_property
    def clean(self) -> Tensor:
        """Logits (N, K) of the clean images."""
        return self.logits(self.images)

    @cached_property
    def clean_correct(self) -> Tensor:
        """Which clean images are classified correctly, (N,) bool."""
        return self.clean.argmax(dim=1) == self.labels

    @cached_property
    def _first_pass(self) -> tuple[Tensor, Tensor] | None:
        return self._gradient(self.images, lambda logits, rows: _cross_entropy(logits, self.labels[rows]))

    @property
    def gradient(self) -> Tensor | None:
        """Gradient (N, C, H, W) of the cross-entropy at the images; None if the logits have none."""
        return None if self._first_pass is None else self._first_pass[1]

    @property
    def differentiated(self) -> Tensor | None:
        """Logits (N, K) of the forward pass that computed `gradient`; None if they have no gradient."""
        return None if self._first_pass is None else self._first_pass[0]

    def _gradient(self, images: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return logits and gradient of ``loss(logits, rows)``, where ``rows`` (B,) are the indices of a batch."""
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
        """Project ``adv`` into the eps-ball around ``images``, both (N, C, H, W), and into [0, 1]."""
        delta = adv - images
        if self.norm == "Linf":
            return (images + delta.clamp(-eps, eps)).clamp(0, 1)
        return (images + delta * (eps / lengths(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)

    def distances(self, adv: Tensor, images: Tensor) -> Tensor:
        """Return the distances between ``adv`` and ``images``, both (N, C, H, W), as (N,)."""
        delta = (adv - images).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "Linf" else torch.linalg.vector_norm(delta, dim=1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the unit step of steepest ascent for a gradient (N, C, H, W)."""
        gradient = gradient.nan_to_num()
        return gradient.sign() if self.norm == "Linf" else gradient / lengths(gradient).clamp_min(1e-30)

    def noisy(self, kind: str) -> Tensor:
        """Return the images with ``uniform`` or ``gaussian`` noise of size eps."""
        numbers = seeding.generator(self.seed, "checks", kind)
        noise = torch.empty(self.images.shape)
        noise = noise.uniform_(-1, 1, generator=numbers) if kind == "uniform" else noise.normal_(generator=numbers)
        size = 1.0 if self.norm == "Linf" else 1 / math.sqrt(noise[0].numel())
        return self.projected(self.images + self.eps * size * noise.to(self.images.device), self.images, self.eps)

    def pgd(self, rows: Tensor, *, eps: float, steps: int, loss: str = "ce", start: str = "start") -> Tensor:
        """Return whether any iterate of `run_pgd` was misclassified, (N,) bool."""
        return self.run_pgd(rows, eps=eps, steps=steps, loss=loss, start=start)[1]

    def run_pgd(
        self, rows: Tensor, *, eps: float, steps: int, loss: str = "ce", start: str = "start"
    ) -> tuple[Tensor, Tensor]:
        """Attack the examples ``rows`` (N,) with torchattacks' PGD or PGDL2 and steps of eps / 4.

        Args:
            rows: Indices of the examples.
            eps: Radius, in [0, 1] pixel units.
            steps: Number of steps.
            loss: ``ce`` or ``margin``.
            start: Key of the random start's seed.

        Returns:
            The first misclassified iterate or else the last one (N, C, H, W), and whether any was misclassified, (N,)
            bool.
        """
        import torchattacks

        images, misclassified = self.images[rows].clone(), torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if self.gradient is None:
            return images, ~self.correct(images, rows) if len(rows) else misclassified
        for part in torch.arange(len(rows), device=rows.device).split(self.batch_size) if len(rows) else ():
            recorder = _IterateRecorder(self.model, images[part], self.labels[rows[part]], loss)
            kind = torchattacks.PGD if self.norm == "Linf" or eps == 0 else torchattacks.PGDL2
            with seeding.preserved(), contextlib.redirect_stdout(io.StringIO()):
                seeding.seed_global(self.seed, "checks", start, int(part[0]))
                attack: Any = kind(recorder, eps=eps, alpha=eps / 4, steps=steps, random_start=eps > 0)
                attack.set_device(images.device)
                last = attack(images[part], recorder.targets)
            with torch.no_grad():
                recorder(last)
            images[part], misclassified[part] = recorder.iterate, recorder.misclassified
        return images, misclassified

    def square(self, rows: Tensor, queries: int) -> Tensor:
        """Attack the examples ``rows`` (N,) with Square (Andriushchenko et al. 2020), which needs no gradients.

        Returns:
            Which of them are misclassified, (N,) bool.
        """
        from pyautoattack.square import SquareAttack

        attack = SquareAttack(self.model, norm=self.norm, n_queries=queries, eps=self.eps, seed=self.seed,
                              device=self.images.device)  # fmt: skip
        perturb = fit_to_tiles(attack) if self.norm == "L2" else attack.perturb
        misclassified = [torch.zeros(0, dtype=torch.bool, device=rows.device)]
        for part in rows.split(self.batch_size) if len(rows) else ():
            with torch.no_grad():
                adv = perturb(self.images[part].clone(), self.labels[part].clone())
            adv = self.projected(adv, self.images[part], self.eps)
            misclassified.append(~self.correct(adv, part))
        return torch.cat(misclassified)

    def agreement(self, count: int) -> Tensor:
        """Compare gradients with finite differences, which measure the actual change of the function.

        At a random point in each eps-ball, the margin to the strongest wrong class is differentiated in `DIRECTIONS`
        random directions, by backpropagation and by central differences with a step of eps / 4.

        Args:
            count: Number of examples, starting with the first.

        Returns:
            The agreement of the two vectors of derivatives for each example, (count,): 2 a.b / (a.a + b.b), which is 1
            if they are equal, 0 if they are unrelated, of very different size or NaN, and -1 if they are opposite.
        """
        numbers = seeding.generator(self.seed, "checks", "directions")
        eps = max(self.eps, 1 / 255)  # below this, differences of float32 logits are dominated by rounding
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
        by_gradient, by_difference = [], []
        for _ in range(DIRECTIONS):
            signs = torch.randint(0, 2, images.shape, generator=numbers).to(images) * 2 - 1
            above, below = (self.logits(images + way * size * signs) for way in (1, -1))
            by_difference.append((difference(above) - difference(below)) / (2 * size))
            by_gradient.append((passed[1] * signs).flatten(1).sum(dim=1))
        # Apple's GPUs have no float64.
        a, b = (torch.stack(each).cpu().double() for each in (by_gradient, by_difference))
        return (2 * (a * b).sum(dim=0) / (a**2 + b**2).sum(dim=0)).nan_to_num()


class _IterateRecorder(nn.Module):
    """A model that records, for each example of an attack, the first misclassified iterate, or else the last one.

    For the ``margin`` loss it returns two logits, of the true and the strongest wrong class, divided by their absolute
    difference: their cross-entropy's gradient has the margin's direction and does not vanish far from the boundary.

    Attributes:
        targets: Labels to pass to the attack, (N,).
        iterate: The recorded images, (N, C, H, W).
        misclassified: Which examples were misclassified, (N,) bool.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.loss = loss
        self.targets = labels if loss == "ce" else torch.zeros_like(labels)
        self.iterate = images
        self.misclassified = torch.zeros_like(labels, dtype=torch.bool)
        self.training = False
        self._outputs: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; examples that were already misclassified keep their earlier outputs, without a gradient."""
        if images.requires_grad:
            images.register_hook(
                lambda gradient: gradient.nan_to_num().contiguous()
            )  # torchattacks needs finite, contiguous gradients
        rows = (~self.misclassified).nonzero().flatten()
        if self._outputs is not None and len(rows) == 0:
            return self._outputs + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        logits: Tensor = self.model(images[rows])
        labels = self.labels[rows]
        self.iterate = self.iterate.index_copy(0, rows, images[rows].detach())
        self.misclassified[rows] = logits.detach().argmax(dim=1) != labels
        logits = logits.float()
        if self.loss == "margin":
            pair = torch.stack((_at(logits, labels), _wrong(logits, labels).amax(dim=1)), dim=1)
            logits = pair / (pair[:, :1] - pair[:, 1:]).abs().detach().clamp_min(1e-12)
        if self._outputs is None:
            self._outputs = logits.new_zeros(len(images), logits.shape[1])
        outputs = self._outputs.index_copy(0, rows, logits)
        self._outputs = outputs.detach()
        return outputs


def lengths(delta: Tensor) -> Tensor:
    """Return the L2 norms of perturbations (N, C, H, W) as (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms.view(-1, 1, 1, 1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margins (N,) of logits (N, K): the true class's logit minus the largest other logit."""
    return _at(logits, labels) - _wrong(logits, labels).amax(dim=1)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
