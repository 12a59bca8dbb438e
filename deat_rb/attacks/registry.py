"""Registry of evaluation attacks: builds the attack for a name that `deat_rb.attacks.names` has parsed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.attacks import losses
from deat_rb.attacks.functional import AttackOutput, CountingModel, fgsm, pgd_on_batches
from deat_rb.attacks.names import AUTOATTACK, PREFIX, TorchAttack, parse_torchattack, steps_and_restarts
from deat_rb.attacks.types import Attack, AttackContext, AttackStage, Batch, Parameters
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError

LOSSES = {"pgd": ("ce", losses.cross_entropy), "cw": ("margin", losses.margin)}


def build_attack(name: str, context: AttackContext) -> Attack:
    """Build the attack for a name returned by `parse_attacks`, other than ``natural``.

    Raises:
        DeatError: If the attack cannot run in this context.
    """
    if name in AUTOATTACK or name == "square":
        from deat_rb.attacks import autoattack

        return autoattack.build(name, context)
    if name.startswith(PREFIX):
        return _torchattack(name, parse_torchattack(name), context)
    if name.startswith("noise-"):
        return _noise(name, context)
    return _white_box(name, context)


def _noise(name: str, context: AttackContext) -> Attack:
    kind = name.removeprefix("noise-")

    def craft(model: CountingModel, batch: Batch) -> AttackOutput:
        numbers = seeding.generator(context.seed, "evaluate", name, batch.number)
        adv = context.ball.noise(batch.images, numbers, kind)[batch.chosen]
        with torch.no_grad():
            return AttackOutput(adv, model(adv).argmax(dim=1) != batch.labels[batch.chosen])

    return Attack(name, (AttackStage("", craft, calls=1),), {"eps": context.eps})


def _white_box(name: str, context: AttackContext) -> Attack:
    if name == "fgsm":
        part = AttackStage("", lambda model, batch: _fgsm(model, batch, context), calls=2)
        return Attack(name, (part,), _white_box_parameters(context, context.eps, 1, "ce", "none"))
    kind, steps, restarts = steps_and_restarts(name)
    attack = white_box(f"{kind}-{steps}", context, alpha=context.eps / 4)
    parts = tuple(attack(start, f"start-{start + 1}" if restarts > 1 else "") for start in range(restarts))
    parameters = _white_box_parameters(context, context.eps / 4, steps, LOSSES[kind][0], "uniform")
    return Attack(name, parts, parameters | ({"restarts": restarts} if restarts > 1 else {}))


def white_box(name: str, context: AttackContext, *, alpha: float) -> Callable[[int, str], AttackStage]:
    """Return a function that builds the stage of ``pgd-N`` or ``cw-N`` for a restart, given its index and label."""
    kind, steps, _ = steps_and_restarts(name)
    loss = LOSSES[kind][1]

    def part(restart: int, label: str) -> AttackStage:
        def chosen(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            key = (batch.number, restart) if restart else (batch.number,)
            start = context.ball.start(batch.images, seeding.generator(context.seed, "evaluate", name, *key))
            return batch.images[batch.chosen], batch.labels[batch.chosen], start[batch.chosen]

        def craft_all(model: CountingModel, batches: Iterable[Batch], size: int) -> Iterator[AttackOutput]:
            examples = map(chosen, batches)
            return pgd_on_batches(model, examples, size=size, threat=context.ball, alpha=alpha, steps=steps, loss=loss)

        def craft(model: CountingModel, batch: Batch) -> AttackOutput:
            return next(craft_all(model, [batch], len(batch.rows)))

        return AttackStage(label, craft, calls=steps + 1, craft_all=craft_all)

    return part


def _fgsm(model: CountingModel, batch: Batch, context: AttackContext) -> AttackOutput:
    images, labels = batch.images[batch.chosen], batch.labels[batch.chosen]
    return fgsm(model, images, labels, eps=context.eps, loss=losses.cross_entropy, threat=context.ball)


def _white_box_parameters(context: AttackContext, alpha: float, steps: int, loss: str, start: str) -> Parameters:
    return {"eps": context.eps, "alpha": alpha, "steps": steps, "loss": loss, "start": start}


def _torchattack(name: str, attack_name: TorchAttack, context: AttackContext) -> Attack:
    """Build an attack of torchattacks; it receives whole batches, with the global generators seeded."""
    attack_name.check_norm(context.norm)
    settings = attack_name.settings(
        eps=context.eps, max_epsilon=context.eps, norm=context.norm, seed=context.seed, n_classes=context.num_classes
    )

    def craft(model: CountingModel, batch: Batch) -> AttackOutput:
        import torchattacks

        key = ("evaluate", name, batch.number)
        hook = model.register_forward_pre_hook(_make_gradient_contiguous)
        try:
            with _seeded(context.seed, *key), contextlib.redirect_stdout(io.StringIO()):
                attack: Any = getattr(torchattacks, attack_name.name)(model, **settings)
                attack.set_device(context.device)
                adv = attack(batch.images.clone(), batch.labels.clone()).detach()[batch.chosen]
        except Exception as error:  # third-party code, and argument values that only it can validate
            first = str(error).partition("\n")[0]
            raise DeatError(f"{name} failed ({type(error).__name__}: {first}): change its arguments or "
                            "omit it") from error  # fmt: skip
        finally:
            hook.remove()
        with torch.no_grad():
            return AttackOutput(adv, model(adv).argmax(dim=1) != batch.labels[batch.chosen])

    steps = settings.get("steps")
    parameters = {key: value if isinstance(value, bool | int | float | str) else repr(value)
                  for key, value in settings.items()}  # fmt: skip
    return Attack(name, (AttackStage("", craft, calls=steps + 1 if isinstance(steps, int) else 0),), parameters)


def _make_gradient_contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Make the images' gradient contiguous: that of a model in channels_last has strides that PGDL2 cannot flatten."""
    if inputs[0].requires_grad:
        inputs[0].register_hook(Tensor.contiguous)


@contextmanager
def _seeded(seed: int, *key: str | int) -> Iterator[None]:
    """Seed the global generators, and restore their states on exit."""
    with seeding.preserved():
        seeding.seed_global(seed, *key)
        yield
