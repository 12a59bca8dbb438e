"""Inner maximization: PGD with the losses, starts and early stop (FAT) of all attacks in the paper's tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from deat_rb.attacks import losses
from deat_rb.attacks.base import NEEDS_LABELS, AttackMode, CraftStats, StatelessAttack
from deat_rb.attacks.threat_models import DEFAULT_EPS, L2, Linf, check_norm, threat_model
from deat_rb.utils import seeding
from deat_rb.utils.devices import full_float32
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.units import check_eps, check_weight, is_whole_number, parse_scalar

Objective = Callable[[Tensor, Tensor], Tensor]

LOSSES = ("ce", "kl", "margin")

STARTS = ("uniform", "normal", "none")


class PGD(StatelessAttack):
    """Projected gradient descent (Madry et al. 2018; the paper's Equation 3), as used in training.

    In Linf with ``loss="ce"`` and ``start="uniform"``, in eval mode, it is bit-identical to `torchattacks.PGD`. In L2
    the steps and projections are those of `torchattacks.PGDL2`.

    Args:
        model: Takes images in [0, 1], shape (N, C, H, W), and returns logits (N, K).
        eps: Radius, in [0, 1] pixel units; by default 8/255, in L2 0.5.
        alpha: Step size, in the same unit; by default 2/255, in L2 eps/4.
        steps: Number of steps; 0 returns the start.
        loss: The loss to maximize: ``ce``, ``kl`` (TRADES: the KL divergence from the clean images' prediction, which
            is computed once) or ``margin`` (Carlini and Wagner).
        norm: ``Linf`` or ``L2``.
        start: ``uniform`` in [-eps, eps], ``normal`` (0.001 * N(0, 1), as in TRADES and MART) or ``none``. In L2
            ``uniform`` is a random direction with a length of U(0, eps), as in torchattacks' PGDL2.
        clamp_start: Whether the start is clamped to [0, 1] before the first gradient is computed, as in Madry et al.;
            the public code of TRADES and MART does not clamp it. The adversarial examples are always in [0, 1].
        start_scale: Radius of the uniform start in units of eps; N-FGSM (de Jorge et al. 2022) uses 2.
        project: Whether every iterate is projected onto the eps-ball; N-FGSM keeps it in [0, 1] only, so that its
            adversarial examples may be further away than eps.
        tau: Early stop of friendly adversarial training (Zhang et al. 2020): the maximum number of steps that an
            example takes after it is first misclassified; None for no limit.
        omega: Standard deviation of normal noise added after every step, before the projection (FAT's public code).
        attack_mode: The model's mode during the attack, ``train`` or ``eval``; by default its current mode. In eval
            mode the attack is as strong as torchattacks' at every batch size; in train mode it matches the paper's
            training code.

    Raises:
        DeatError: If an argument is invalid.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float | str | None = None,
        alpha: float | str | None = None,
        steps: int = 10,
        loss: str = "ce",
        norm: str = "Linf",
        start: str = "uniform",
        clamp_start: bool = True,
        start_scale: float = 1.0,
        project: bool = True,
        tau: int | None = None,
        omega: float = 0.0,
        attack_mode: AttackMode | None = None,
    ) -> None:
        super().__init__("PGD", model, attack_mode)
        if loss not in LOSSES:
            raise DeatError(f"there is no attack loss '{loss}': {did_you_mean(str(loss), LOSSES)}")
        if start not in STARTS:
            raise DeatError(f"there is no start '{start}': {did_you_mean(str(start), STARTS)}")
        if not is_whole_number(steps) or steps < 0:
            raise DeatError(f"steps = {steps} is not a non-negative whole number")
        self.norm = check_norm(norm)
        self.eps = check_eps(parse_scalar(DEFAULT_EPS[self.norm] if eps is None else eps), norm=self.norm)
        if alpha is None:
            alpha = 2 / 255 if self.norm == "Linf" else self.eps / 4
        alpha = parse_scalar(alpha)
        if not (math.isfinite(alpha) and alpha > 0):
            raise DeatError(f"alpha = {alpha:g} is not a positive number; give a step size such as 2/255")
        if alpha > 1 and self.norm == "Linf":
            raise DeatError(f"alpha = {alpha:.10g} is above 1; images are in [0, 1], so give a step size such as 2/255")
        if not (isinstance(start_scale, int | float) and math.isfinite(start_scale) and start_scale > 0):
            raise DeatError(f"start_scale = {start_scale} is not a positive number; N-FGSM uses 2")
        if tau is not None and not (is_whole_number(tau) and tau >= 0):
            raise DeatError(
                f"tau = {tau} is not a non-negative whole number; it limits the steps after a misclassification"
            )
        check_weight("omega", omega, "FAT uses 0.001")
        self.alpha = alpha
        self.steps = int(steps)
        self.loss = loss
        self.start = start
        self.clamp_start = clamp_start
        self.start_scale = start_scale
        self.project = project
        self.tau = tau
        self.omega = omega
        self.loss_scale: float | Tensor = 1.0
        self.fixed_size = False

    @property
    def threat(self) -> Linf | L2:
        """The threat model of a step: the eps-ball, or all images in [0, 1] without projection."""
        return threat_model(self.norm, self.eps if self.project else math.inf)

    @property
    def gradient_radius(self) -> float:
        """The distance from the clean image within which the gradients are computed, in [0, 1] pixel units."""
        start = max(self.start_scale, 1.0) * self.eps
        return start if self.project else start + max(self.steps - 1, 0) * self.alpha

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate adversarial examples; see `craft`."""
        return self.craft(inputs, labels)[0]

    def craft(self, images: Tensor, labels: Tensor | None, adv: Tensor | None = None) -> tuple[Tensor, CraftStats]:
        """Generate adversarial examples in the model's current mode.

        Args:
            images: In [0, 1], (N, C, H, W).
            labels: (N,); not needed for ``loss="kl"`` without ``tau``.
            adv: First iterate, (N, C, H, W), instead of ``start``.

        Returns:
            The adversarial examples (N, C, H, W) and the attack's statistics.
        """
        images = images.detach().to(self.device)
        if labels is not None:
            labels = labels.to(self.device)
        elif self.loss == "kl" and self.tau is None:
            labels = images.new_zeros(len(images), dtype=torch.long)
        else:
            raise DeatError(NEEDS_LABELS)
        clean = None
        if self.loss == "kl" and self.steps > 0:
            with self._full_precision(images, 0):
                clean = self._clean_logits(images)
        adv = self.initialize(images) if adv is None else adv
        if self.tau is not None:
            adv, stats = self._early_stopped(images, labels, clean, adv)
        else:
            adv, stats = self._all_steps(images, labels, clean, adv)
        if clean is not None:
            stats.forwards = stats.forwards + 1
        return (adv if self.clamp_start else adv.clamp(0, 1)), stats

    def initialize(self, images: Tensor) -> Tensor:
        """Draw the first iterate around ``images`` (N, C, H, W), within [0, 1] if ``clamp_start``."""
        if self.start == "none":
            return images
        noise = (
            self.threat.training_noise(images, self.start_scale * self.eps)
            if self.start == "uniform"
            else seeding.normal_like(images, 0.001)
        )
        return (images + noise).clamp(0, 1) if self.clamp_start else images + noise

    def _step_noise(self, images: Tensor) -> Tensor | None:
        """Draw the noise of one step, for the whole batch."""
        return seeding.normal_like(images, self.omega) if self.omega else None

    def _all_steps(
        self, images: Tensor, labels: Tensor, clean: Tensor | None, adv: Tensor
    ) -> tuple[Tensor, CraftStats]:
        threat = self.threat
        overflows = Overflows(self.loss_scale)
        gradient: Tensor | None = None
        unit: float | Tensor = 1.0
        for step in range(self.steps):
            with self._full_precision(images, step):
                _, gradient, unit = self._gradient(adv, labels, clean)
            gradient = overflows.masked(gradient)
            adv = threat.ascend(adv, images, gradient, self.alpha, self._step_noise(images))
        l_x = images.new_zeros(()) if gradient is None else times(threat.total_dual_norm(gradient), unit)
        return adv, CraftStats(l_x, self.steps, self.steps, overflows.count, gradient)

    def _early_stopped(
        self, images: Tensor, labels: Tensor, clean: Tensor | None, adv: Tensor
    ) -> tuple[Tensor, CraftStats]:
        """Run PGD with FAT's early stop per example, using masks and no host sync.

        On a CPU in eval mode, where reading a mask costs nothing and examples do not affect each other, stopped
        examples are dropped from the batch, unless `fixed_size`: a compiled model would be compiled for each size. In
        train mode they are kept, since BatchNorm uses the whole batch.
        """
        threat = self.threat
        leave = images.device.type == "cpu" and not self.model.training and not self.fixed_size
        moving = torch.ones_like(labels, dtype=torch.bool)
        patience = torch.full_like(labels, self.tau or 0)
        l_x = images.new_zeros(len(images))
        passes = images.new_zeros(())
        overflows = Overflows(self.loss_scale)
        rows: Tensor | None = None  # all

        def chosen(whole: Tensor) -> Tensor:
            return whole if rows is None else whole[rows]

        def replaced(whole: Tensor, part: Tensor) -> Tensor:
            return part if rows is None else whole.index_copy(0, rows, part)

        for step in range(self.steps):
            if leave:
                rows = moving.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
            passes = passes + moving.sum() / len(images)
            current, still = chosen(adv), chosen(labels)
            with self._full_precision(images, step):
                logits, gradient, unit = self._gradient(current, still, None if clean is None else chosen(clean))
            gradient = overflows.masked(gradient)
            wrong = logits.argmax(dim=1) != still
            go_on = chosen(moving) & ~(wrong & (chosen(patience) == 0))
            noise = self._step_noise(images)
            stepped = threat.ascend(
                current, chosen(images), gradient, self.alpha, None if noise is None else chosen(noise)
            )
            norms = times(threat.dual_norms(gradient), unit)
            adv = replaced(adv, torch.where(go_on[:, None, None, None], stepped, current))
            l_x = replaced(l_x, torch.where(go_on, norms, chosen(l_x)))
            patience = replaced(patience, chosen(patience) - (wrong & go_on).to(patience.dtype))
            moving = replaced(moving, go_on)
        return adv, CraftStats(l_x.sum(), forwards=passes, backwards=passes, overflows=overflows.count)

    def _full_precision(self, images: Tensor, step: int) -> AbstractContextManager[object]:
        """Return a context without autocast and TF32 for the first step on KL if the start is near the clean images.

        KL and its gradient nearly vanish there, and half precision does not resolve images that are 0.001 apart, so the
        gradient's signs would be noise; TF32 gets 4 to 8 % of them wrong. After one step the images are alpha apart.
        """
        if step > 0 or self.loss != "kl" or self.start == "uniform":
            return nullcontext()
        return full_float32(images.device)

    def _clean_logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.get_logits(images.clone())  # a model may change its input in place
        return logits

    def _gradient(self, adv: Tensor, labels: Tensor, clean: Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
        """Compute the input gradient with one forward and one backward pass.

        Returns:
            The logits (N, K) at ``adv``; the gradient (N, C, H, W); and the factor that converts it to the gradient of
            each example's own loss. Cross-entropy is averaged and KL summed, as in torchattacks' PGD and TPGD, so that
            the signs match theirs.
        """
        adv = adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.get_logits(adv)
            unit = 1.0
            if self.loss == "ce":
                objective = losses.cross_entropy(logits, labels).mean()
                unit = float(len(adv))
            elif self.loss == "margin":
                objective = losses.margin(logits, labels).sum()
            else:
                assert clean is not None
                objective = losses.kl_divergence(logits, clean).sum()
            scaled = times(objective, self.loss_scale)
            (gradient,) = torch.autograd.grad(scaled, adv)
        return logits.detach(), gradient, unit / self.loss_scale


def times(values: Tensor, factor: float | Tensor) -> Tensor:
    """Return ``values * factor``, without multiplying if the factor is the number 1."""
    return values if isinstance(factor, float) and factor == 1 else values * factor


class Overflows:
    """Masking of gradients that overflowed under fp16's loss scale, without a host sync.

    An example whose gradient has NaN or Inf is not perturbed further in that step, and its gradient counts as zero. If
    the scale is a tensor, it is then halved, but not below 1, for all later steps.

    Args:
        scale: The loss scale; if it is a number, gradients are not changed.

    Attributes:
        count: Number of gradients masked.
    """

    def __init__(self, scale: float | Tensor) -> None:
        self.scale = scale
        self.count: float | Tensor = 0.0

    def masked(self, gradient: Tensor) -> Tensor:
        """Return the gradient (N, C, H, W), with zeros for the examples whose gradient overflowed."""
        if not isinstance(self.scale, Tensor):
            return gradient
        finite = gradient.isfinite().flatten(1).all(dim=1)
        self.count = self.count + (~finite).sum()
        halved = (self.scale / 2).clamp_min(1)
        self.scale.copy_(torch.where(finite.all(), self.scale, halved))
        return torch.where(finite[:, None, None, None], gradient, 0.0)
