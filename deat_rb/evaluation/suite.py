"""The attacks of an evaluation: what each name of `deat_rb.evaluation.attacklist` does to a batch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deat_rb import losses, randomness
from deat_rb.errors import DeatError
from deat_rb.evaluation.attacklist import AUTOATTACK, PREFIX, TorchAttack, parse_torchattack, steps_and_restarts
from deat_rb.evaluation.whitebox import Counted, Crafted, fgsm, pgd
from deat_rb.threat import L2, Linf, threat_model

LOSSES = {"pgd": ("ce", losses.cross_entropy), "cw": ("margin", losses.margin)}
Parameters = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Terms:
    """What all attacks of an evaluation have in common.

    Attributes:
        norm: ``Linf`` or ``L2``.
        eps: The radius, in [0, 1] pixel units.
        seed: Of everything random.
        num_classes: K.
        device: Where the batches are.
    """

    norm: str
    eps: float
    seed: int
    num_classes: int
    device: torch.device

    @property
    def ball(self) -> Linf | L2:
        """The threat model."""
        return threat_model(self.norm, self.eps)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, on the device.

    Attributes:
        images: (N, C, H, W), in [0, 1].
        labels: (N,).
        chosen: (N,) bool: which of them are to be attacked; random numbers are drawn for all, so that none depends on
            who else is attacked.
        number: Which batch of the part this is, from 0 on.
        rows: (N,) int64, on the CPU: which examples of the evaluation these are.
    """

    images: Tensor
    labels: Tensor
    chosen: Tensor
    number: int
    rows: Tensor


@dataclass(frozen=True)
class Part:
    """What an attack does in one go through the examples; the next part attacks what this one left.

    Attributes:
        name: Which part; empty where the attack has but one.
        craft: Makes, of the chosen examples of a batch, adversarial images.
        calls: How often it forwards a batch at most, for the display; 0 where that is not known.
        packed: Whether the batches are made of what is left, as AutoAttack's are, or are the same for every part.
    """

    name: str
    craft: Callable[[Counted, Batch], Crafted]
    calls: int = 0
    packed: bool = False


@dataclass(frozen=True, eq=False)
class Attack:
    """One attack.

    Attributes:
        name: As `parse_attacks` spells it.
        parts: In their order.
        parameters: Its settings, for the report.
        notes: What a reader of its figure should know beforehand.
        warnings: What the attack warns of while it runs, each sentence once.
    """

    name: str
    parts: tuple[Part, ...]
    parameters: Parameters
    notes: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


def build_attack(name: str, terms: Terms) -> Attack:
    """Makes the attack of a name that `parse_attacks` gave, other than ``natural``.

    Raises:
        DeatError: It cannot run on these terms.
    """
    if name in AUTOATTACK or name == "square":
        from deat_rb.evaluation import autoattack

        return autoattack.build(name, terms)
    if name.startswith(PREFIX):
        return _torchattack(name, parse_torchattack(name), terms)
    if name.startswith("noise-"):
        return _noise(name, terms)
    return _white_box(name, terms)


def _noise(name: str, terms: Terms) -> Attack:
    kind = name.removeprefix("noise-")

    def craft(model: Counted, batch: Batch) -> Crafted:
        numbers = randomness.generator(terms.seed, "evaluate", name, batch.number)
        adv = terms.ball.noise(batch.images, numbers, kind)[batch.chosen]
        with torch.no_grad():
            return Crafted(adv, model(adv).argmax(dim=1) != batch.labels[batch.chosen])

    return Attack(name, (Part("", craft, calls=1),), {"eps": terms.eps})


def _white_box(name: str, terms: Terms) -> Attack:
    if name == "fgsm":
        part = Part("", lambda model, batch: _fgsm(model, batch, terms), calls=2)
        return Attack(name, (part,), _white_box_parameters(terms, terms.eps, 1, "ce", "none"))
    kind, steps, restarts = steps_and_restarts(name)
    attack = white_box(f"{kind}-{steps}", terms, alpha=terms.eps / 4)
    parts = tuple(attack(start, f"start-{start + 1}" if restarts > 1 else "") for start in range(restarts))
    parameters = _white_box_parameters(terms, terms.eps / 4, steps, LOSSES[kind][0], "uniform")
    return Attack(name, parts, parameters | ({"restarts": restarts} if restarts > 1 else {}))


def white_box(name: str, terms: Terms, *, alpha: float) -> Callable[[int, str], Part]:
    """Makes the parts of ``pgd-N`` or ``cw-N`` with steps of ``alpha``: one for each number and name of a start."""
    kind, steps, _ = steps_and_restarts(name)
    loss = LOSSES[kind][1]

    def part(restart: int, label: str) -> Part:
        def craft(model: Counted, batch: Batch) -> Crafted:
            key = (batch.number, restart) if restart else (batch.number,)
            start = terms.ball.start(batch.images, randomness.generator(terms.seed, "evaluate", name, *key))
            chosen = batch.chosen
            return pgd(
                model,
                batch.images[chosen],
                batch.labels[chosen],
                start=start[chosen],
                eps=terms.eps,
                alpha=alpha,
                steps=steps,
                loss=loss,
                threat=terms.ball,
            )

        return Part(label, craft, calls=steps + 1)

    return part


def _fgsm(model: Counted, batch: Batch, terms: Terms) -> Crafted:
    images, labels = batch.images[batch.chosen], batch.labels[batch.chosen]
    return fgsm(model, images, labels, eps=terms.eps, loss=losses.cross_entropy, threat=terms.ball)


def _white_box_parameters(terms: Terms, alpha: float, steps: int, loss: str, start: str) -> Parameters:
    return {"eps": terms.eps, "alpha": alpha, "steps": steps, "loss": loss, "start": start}


def _torchattack(name: str, asked: TorchAttack, terms: Terms) -> Attack:
    """One of torchattacks' own, which is given whole batches, as its users give them, and torch's seeded generator."""
    settings = asked.settings(
        eps=terms.eps, max_epsilon=terms.eps, norm=terms.norm, seed=terms.seed, n_classes=terms.num_classes
    )

    def craft(model: Counted, batch: Batch) -> Crafted:
        import torchattacks

        key = ("evaluate", name, batch.number)
        try:
            with _seeded(terms.seed, *key), contextlib.redirect_stdout(io.StringIO()):
                attack: Any = getattr(torchattacks, asked.name)(model, **settings)
                attack.set_device(terms.device)
                adv = attack(batch.images.clone(), batch.labels.clone()).detach()[batch.chosen]
        except Exception as error:  # somebody else's code, and values of arguments that only it can judge
            first = str(error).partition("\n")[0]
            raise DeatError(f"{name} cannot be run here ({type(error).__name__}: {first}): give other arguments, or "
                            "leave it out") from error  # fmt: skip
        with torch.no_grad():
            return Crafted(adv, model(adv).argmax(dim=1) != batch.labels[batch.chosen])

    steps = settings.get("steps")
    parameters = {key: value if isinstance(value, bool | int | float | str) else repr(value)
                  for key, value in settings.items()}  # fmt: skip
    return Attack(name, (Part("", craft, calls=steps + 1 if isinstance(steps, int) else 0),), parameters)


@contextmanager
def _seeded(seed: int, *key: str | int) -> Iterator[None]:
    """Seeds the global generators of torch and NumPy, and gives them back as they were."""
    before = np.random.get_state()
    number = randomness.derive(seed, *key)
    with randomness.preserved():
        torch.manual_seed(number)
        np.random.seed(number % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)
