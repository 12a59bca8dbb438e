"""How full an evaluation's batches are: PGD attacking batches together, as it does, and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

from torch import Tensor, nn

from benchmarks.evaluation import EvalTarget
from benchmarks.timing import Notify, Side, alternate, device_clock
from deat_rb import evaluate
from deat_rb.evaluation.frozen_model import PreparedModel

ATTACKS = ("pgd-100", "pgd-20x5")


@dataclass(frozen=True)
class Fill:
    """The forward passes of a stage of an attack.

    Attributes:
        stage: The attack, and the stage if it has several.
        together: Whether batches are attacked together.
        batch_size: Most images per forward pass.
        calls: Number of forward passes.
        images: Images in all of them.
        seconds: Seconds per round of the whole attack; empty if it was not timed.
        differing: Number of examples whose verdict differs from that of the other way.
        equal: Whether that has to be 0: on a GPU, rounding depends on the number of images in a pass.
    """

    stage: str
    together: bool
    batch_size: int
    calls: int
    images: int
    seconds: list[float]
    differing: int
    equal: bool

    @property
    def fill(self) -> float:
        """Mean number of images per forward pass, relative to the batch size."""
        return self.images / (self.calls * self.batch_size)


@dataclass
class _Recorder:
    """Sizes of the forward passes by stage, as `evaluate`'s progress names them."""

    sizes: dict[str, list[int]] = field(default_factory=dict)
    _since: list[int] = field(default_factory=list)

    def seen(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Record a forward pass; a hook of the model."""
        self._since.append(len(inputs[0]))

    def __call__(self, stage: str, done: int, total: int, correct: int) -> None:
        """Assign the passes since the last call to a stage."""
        self.sizes.setdefault(stage, []).extend(self._since)
        self._since.clear()


def measure(
    target: EvalTarget,
    *,
    batch_size: int,
    repeats: int,
    autoattack: bool,
    attacks: Sequence[str] = ATTACKS,
    notify: Notify = lambda text: None,
) -> list[Fill]:
    """Count and time the forward passes of attacks.

    Args:
        target: The model and the images.
        batch_size: Images per batch.
        repeats: Number of rounds.
        autoattack: Whether to run AutoAttack as well, once: its stages attack their batches one by one.
        attacks: The attacks to run in both ways.
        notify: Called with the name of the next measurement.
    """
    found = []
    for attack in attacks:
        ways = {name: _Way(target, attack, batch_size, name == "together") for name in ("together", "one by one")}
        sides = {f"{attack}: {name}": Side(way.run) for name, way in ways.items()}
        times = alternate(sides, repeats, warm_up=False, clock=device_clock(target.device), notify=notify)
        differing = int((ways["together"].verdicts != ways["one by one"].verdicts).sum())
        for name, way in reversed(ways.items()):
            found += way.rows(times[f"{attack}: {name}"], differing)
    if autoattack:
        notify("autoattack: once")
        way = _Way(target, "autoattack", batch_size, together=False)
        way.run()
        found += way.rows([], 0)
    return found


class _Way:
    """An attack whose batches are attacked together or one by one."""

    def __init__(self, target: EvalTarget, attack: str, batch_size: int, together: bool) -> None:
        self.target = target
        self.attack = attack
        self.batch_size = batch_size
        self.together = together
        self.recorder = _Recorder()
        self.verdicts = Tensor()

    def run(self) -> None:
        """Run the attack."""
        self.recorder = _Recorder()
        target = self.target
        hook = target.model.register_forward_pre_hook(self.recorder.seen)
        try:
            with mock.patch.object(PreparedModel, "is_independent", self.together):
                report = evaluate(
                    target.model, target.images, target.labels, attacks=[self.attack], eps=target.eps,
                    batch_size=self.batch_size, progress=self.recorder, keep_adversarial=False,
                )  # fmt: skip
        finally:
            hook.remove()
        self.verdicts = report.verdicts[self.attack]

    def rows(self, seconds: list[float], differing: int) -> list[Fill]:
        """Return the rows of the attack's stages, after `run`."""
        sizes = {stage: each for stage, each in self.recorder.sizes.items() if stage != "natural"}
        row = partial(Fill, together=self.together, batch_size=self.batch_size, seconds=seconds, differing=differing,
                      equal=self.target.device.type == "cpu")  # fmt: skip
        return [row(stage, calls=len(each), images=sum(each)) for stage, each in sizes.items()]
