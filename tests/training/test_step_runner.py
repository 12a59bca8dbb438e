"""Recorded training steps: with a stand-in for CUDA graphs on a CPU, they equal other steps bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torchattacks
from tape import TapeGraphs
from torch import Tensor, nn
from torch.optim import Optimizer
from training_problems import Positioned, begin, images_and_labels, made
from transfers import Transfers

import deat_rb
from deat_rb.methods.losses import weighted
from deat_rb.methods.registry import known_methods
from deat_rb.training.cuda_graphs import choose_graphs
from deat_rb.training.engine import Engine
from deat_rb.training.lr import rate_of, set_rate
from deat_rb.training.metrics import BatchStats, EpochAccumulator
from deat_rb.training.nonfinite import Snapshot
from deat_rb.training.optimizers import build_optimizer, optimizer_tensors
from deat_rb.training.options import OptimConfig
from deat_rb.training.place import Place
from deat_rb.training.step_runner import StepRunner, unknown_parts
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding
from deat_rb.utils.devices import check_cuda_graphs
from deat_rb.utils.errors import DeatError

T = TypeVar("T")
NEVER = 10**9


def replay_rate(rate: float, share: float) -> float:
    return rate + share / 100


def trained(
    method: str, *, recorded: bool, precision: Any = "fp32", optim: OptimConfig | None = None, **options: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]], TapeGraphs]:
    """Two epochs of five full batches and a short one, of which the second has one step more."""
    model = made()
    trainer = deat_rb.create(method, model, **options)
    trainer.steps = min(trainer.steps, 3)
    engine, tape = Engine("cpu", precision), TapeGraphs()
    engine.graphs, engine.full_batch = tape, 6
    engine.prepare(model)
    optimizer = build_optimizer(model, optim or OptimConfig(lr=0.1), engine.device, recorded=True)
    optimizer.register_step_post_hook(trainer.after_step)
    runner = StepRunner(trainer, engine, optimizer)
    runner.warm_ups = 2 if recorded else NEVER
    seen = []
    for epoch in range(2):
        sums = EpochAccumulator()
        for batch in range(6):
            images, labels = engine.to_device(*images_and_labels(6 if batch < 5 else 4, seed=10 * epoch + batch))
            rate = 0.02 * (batch + 1) + 0.1 * epoch
            trainer.progress = epoch + batch / 6
            trainer.set_replay_lr(partial(replay_rate, rate))
            set_rate(optimizer, rate)
            seeding.seed_global(0, "batch", epoch, batch)
            begin(trainer, images, epoch, batch, engine)
            sums.add(runner(images, labels, len(labels)))
            seen.append({"lr": rate_of(optimizer)} | sums.read())
        if trainer.schedule.guided:
            trainer.steps += 1
    state = model.state_dict() | trainer.tensors()
    state |= optimizer_tensors(optimizer)
    return state, seen, tape


@pytest.mark.slow
@pytest.mark.parametrize("method", known_methods())
def test_recorded_steps_are_those_that_are_not_recorded(method: str) -> None:
    weights, seen, tape = trained(method, recorded=True)
    expected, expected_seen, _ = trained(method, recorded=False)
    assert seen == expected_seen
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    # Of five full batches, two warm up, once per number of steps.
    assert (tape.recorded, tape.repeated) == ((2, 6) if deat_rb.create(method, made()).schedule.guided else (1, 8))


@pytest.mark.parametrize(("method", "options"), [("free-3", {"lr_per_replay": True}), ("pgd-2", {}), ("m-deat", {})])
def test_recorded_steps_follow_the_learning_rate_and_fp16s_scales(method: str, options: dict[str, Any]) -> None:
    for precision in ("fp32", "fp16"):
        weights, seen, tape = trained(method, recorded=True, precision=precision, **options)
        expected, expected_seen, _ = trained(method, recorded=False, precision=precision, **options)
        assert seen == expected_seen
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        assert tape.repeated >= 6


def test_recorded_steps_perturb_the_weights_after_the_warmup() -> None:
    """The graph of the first epoch does not perturb them, that of the second does."""
    weights, seen, tape = trained("trades", recorded=True, steps=2, awp=0.05, awp_warmup=1)
    expected, expected_seen, _ = trained("trades", recorded=False, steps=2, awp=0.05, awp_warmup=1)
    assert seen == expected_seen
    assert seen[-1]["backwards"] > seen[5]["backwards"]
    assert (tape.recorded, tape.repeated) == (2, 6)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_recorded_steps_of_adamw_with_clipped_gradients() -> None:
    optim = OptimConfig(optimizer="adamw", lr=0.01, momentum=0.9, grad_clip=0.5, no_decay=("norm", "bias"))
    weights, seen, tape = trained("pgd-2", recorded=True, optim=optim)
    expected, expected_seen, _ = trained("pgd-2", recorded=False, optim=optim)
    assert seen == expected_seen
    assert tape.repeated == 8
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_recorded_batch_is_rolled_back() -> None:
    """FGSM-PGI's rows of the batch, after a batch that was not recorded."""
    model, images_per_epoch = made(), 28
    trainer = deat_rb.create("fgsm-pgi", model)
    engine, tape = Engine("cpu"), TapeGraphs()
    engine.graphs, engine.full_batch = tape, 6
    optimizer = build_optimizer(model, OptimConfig(lr=0.01), engine.device, recorded=True)
    state: Any = SimpleNamespace(trainer=trainer, optimizer=optimizer, engine=engine, average=None)
    runner = StepRunner(trainer, engine, optimizer)
    for number in range(7):  # four full batches and a short one, then a full one and a bad one
        positions = torch.arange(images_per_epoch)[6 * (number % 5) :][:6]
        images, labels = images_and_labels(len(positions), seed=number)
        bad = number == 6
        if bad:
            images[0] = torch.nan
            before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
        snapshot = Snapshot(state)
        place = Place(1 + number // 5, 2, number % 5, len(positions), 4, positions, images_per_epoch)
        trainer.begin_batch(images, place, engine)
        runner(images, labels, len(images))
        if bad:
            assert tape.repeated > 2
            assert trainer.tensors()["momentum"].isnan().any()
            snapshot.restore()
            for name, tensor in before.items():
                assert torch.equal(trainer.tensors()[name], tensor), name


def test_rows_are_copied_for_the_next_batch_of_a_snapshot_only() -> None:
    """A fit that skips batches, and one that does not: FGSM-PGI copied every batch's rows from then on."""
    trainer = deat_rb.create("fgsm-pgi", made())
    data = Positioned([images_and_labels(6, seed=number) for number in range(3)])
    trainer.fit(data, epochs=1, lr=0.01, on_nonfinite="skip")
    copies = count_calls(trainer, "_stored")
    trainer.fit(data, epochs=1, lr=0.01)
    assert len(copies) == 3, "only those of the steps themselves"


def count_calls(trainer: Any, name: str) -> list[Any]:
    """The arguments of each call of a method from now on."""
    calls, method = list[Any](), getattr(trainer, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return method(*args)

    setattr(trainer, name, counted)
    return calls


def runner_of(model: nn.Module, trainer: Trainer) -> StepRunner:
    engine = Engine()
    engine.graphs, engine.full_batch = TapeGraphs(any_code=True), 6
    return StepRunner(trainer, engine, build_optimizer(model, OptimConfig(), engine.device, recorded=True))


def test_a_change_that_a_graph_cannot_see_records_anew() -> None:
    model = made()
    trainer = deat_rb.create("pgd-2", model)
    runner = runner_of(model, trainer)
    images, labels = images_and_labels(6)

    def recordings(batches: int = 3) -> int:
        for _ in range(batches):
            runner(images, labels, 6)
        return runner.recordings

    assert recordings() == 1
    assert recordings() == 1
    trainer.crafter.alpha /= 2
    assert recordings() == 2
    model[4].eval()
    assert recordings() == 3
    model[0].weight.requires_grad_(False)
    assert recordings() == 4
    runner.optimizer.param_groups[0]["weight_decay"] = 0.1
    assert recordings() == 5
    trainer.steps = 3
    assert recordings() == 6
    vars(model[1])["momentum"] = 0.2
    assert recordings() == 7
    runner(images[:4], labels[:4], 4)  # a short batch does not
    assert recordings(1) == 7


def test_statistics_are_not_overwritten_by_the_next_step() -> None:
    model = made()
    runner = runner_of(model, deat_rb.create("pgd-2", model))
    kept: list[BatchStats] = []
    for number in range(5):
        kept.append(runner(*images_and_labels(6, seed=number), 6))
    assert len({float(stats.loss) for stats in kept}) == 5


class Looking(nn.Module):
    """A network that reads a value in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits if float(logits.detach().sum()) < 1e9 else 0 * logits


def test_a_step_that_cannot_be_recorded_is_refused_in_a_sentence() -> None:
    model = Looking()
    runner = runner_of(model, deat_rb.create("pgd-2", model))
    for _ in range(2):
        runner(*images_and_labels(6), 6)
    with pytest.raises(DeatError, match=r"cannot be recorded as a CUDA graph \(.*\); use --cuda-graphs off"):
        runner(*images_and_labels(6), 6)


def test_a_step_that_waits_for_the_device_in_its_warm_up_is_not_recorded() -> None:
    class Waiting(TapeGraphs):
        def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
            return function(), False

    told: list[str] = []
    for any_code in (False, True):
        model = made()
        runner = runner_of(model, deat_rb.create("pgd-2", model))
        runner.engine.graphs, runner.warn = Waiting(any_code), told.append
        for _ in range(4):
            runner(*images_and_labels(6), 6)
        assert runner.recordings == 0
    assert told == [
        "--cuda-graphs on has no effect: the training step waits for the device, so that it cannot be recorded"
    ]


def test_a_compiled_step_is_recorded_although_compiling_waits_for_the_device() -> None:
    class WaitsOnce(TapeGraphs):
        waits = 0

        def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
            self.waits += 1
            return function(), self.waits > 1

    for compiled, recordings in ((True, 1), (False, 0)):
        model = made()
        runner = runner_of(model, deat_rb.create("pgd-2", model))
        runner.engine.graphs, runner.engine.compiled = WaitsOnce(), compiled
        for _ in range(4):
            runner(*images_and_labels(6), 6)
        assert runner.recordings == recordings


class Still(Optimizer):
    """Updates nothing; torch's fused optimizers do not run on the meta device."""

    def step(self, closure: Any = None) -> Any:
        pass


class Unwatched:
    """Runs what should be recorded each time anew; on the meta device, where there are no addresses to record."""

    any_code = True

    def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
        return function(), True

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        result = function()
        return lambda: None, result


@pytest.mark.parametrize(("method", "options"), [("free-3", {"lr_per_replay": True}), ("pgd-2", {}), ("m-deat", {})])
def test_a_recorded_step_copies_nothing_from_the_host(method: str, options: dict[str, Any]) -> None:
    model = made().to("meta")
    trainer, engine = deat_rb.create(method, model, **options), Engine("meta")
    engine.graphs = Unwatched()
    optimizer = Still(model.parameters(), {"lr": torch.zeros((), device="meta")})
    runner = StepRunner(trainer, engine, optimizer)
    images, labels = (part.to("meta") for part in images_and_labels(6))
    with Transfers() as transfers:
        for _ in range(5):
            trainer.set_replay_lr(partial(replay_rate, 0.1))
            set_rate(optimizer, 0.1)
            runner(images, labels, 6)
    assert runner.recordings == 1
    assert transfers.names == []
    # The rate of the last of three replays, two thirds into the batch.
    assert rate_of(optimizer) == pytest.approx(0.1 + 0.02 / 3 if options else 0.1)


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def test_unknown_parts_are_named() -> None:
    class OwnPGD(deat_rb.PGD):
        pass

    def found(trainer: Trainer) -> str | None:
        return unknown_parts(trainer, build_optimizer(trainer.model, OptimConfig(grad_clip=1.0), torch.device("cpu")))

    for method in known_methods():
        assert found(deat_rb.create(method, made())) is None
    assert found(deat_rb.create("trades", deat_rb.build_model("wrn-10-1", dataset="digits"))) is None
    assert found(deat_rb.AttackTrainer(torchattacks.PGD(made()))) == "the attack PGD"
    assert "OwnPGD" in str(found(deat_rb.AttackTrainer(OwnPGD(made()))))
    own = SurrogateLoss("own", own_loss)
    for loss in (own, weighted(own, torch.ones(4))):
        assert "own_loss" in str(found(deat_rb.AttackTrainer(deat_rb.PGD(made()), loss=loss)))
    assert found(deat_rb.create("pgd-2", Looking())) == "the module Looking of the model"
    hooked = made()
    hooked[0].register_forward_hook(lambda *_: None)
    assert found(deat_rb.create("pgd-2", hooked)) == "a hook of the module Conv2d of the model"


@pytest.mark.parametrize(
    ("setting", "device", "ranks", "any_code"),
    [
        ("auto", "cuda", 1, False),
        ("on", "cuda", 1, True),
        ("off", "cuda", 1, None),
        ("auto", "cuda", 2, None),
        ("auto", "cpu", 1, None),
    ],
)
def test_where_steps_are_recorded(
    setting: str, device: str, ranks: int, any_code: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    graphs = choose_graphs(setting, torch.device(device), ranks)
    assert (graphs and graphs.any_code) == any_code


def test_by_default_code_of_the_users_is_not_recorded() -> None:
    for any_code, recordings in ((False, 0), (True, 1)):
        model = nn.Sequential(made(), Own())
        runner = runner_of(model, deat_rb.create("pgd-2", model))
        runner.engine.graphs = TapeGraphs(any_code)
        for _ in range(3):
            runner(*images_and_labels(6), 6)
        assert runner.recordings == recordings


class Own(nn.Module):
    """Changes nothing."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cpu", 1, "--cuda-graphs on needs a CUDA GPU, but the device is cpu; use --cuda-graphs auto"),
        ("cuda", 2, "--cuda-graphs on needs a single rank, not 2; use --cuda-graphs auto"),
    ],
)
def test_graphs_are_refused_where_they_cannot_be(device: str, ranks: int, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        check_cuda_graphs("on", torch.device(device), ranks)
    if device == "cpu":
        with pytest.raises(DeatError, match=message):
            deat_rb.create("pgd-2", made()).fit([images_and_labels(6)], epochs=1, cuda_graphs="on")


@pytest.mark.parametrize("method", ["m+trades", "free-2"])
def test_fit_with_recorded_steps_trains_as_without(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an average of the weights, whose update is part of the step, and a batch that is skipped."""
    data = [images_and_labels(6 if number < 5 else 4, seed=number) for number in range(6)]
    data[4][0][0, 0, 0, 0] = float("nan")
    results = []
    for recorded in (True, False):
        tape = TapeGraphs()
        monkeypatch.setattr("deat_rb.training.fit.choose_graphs", lambda *_, tape=tape: tape)
        monkeypatch.setattr("deat_rb.training.step_runner.WARM_UPS", 2 if recorded else NEVER)
        model = made()
        history = deat_rb.create(method, model).fit(data, epochs=2, lr=0.05, ema=0.9, on_nonfinite="skip")
        rows = [(row.loss, row.l_x, row.train_acc, row.lr, row.skipped, row.steps) for row in history.rows]
        results.append((rows, model.state_dict()))
        assert tape.recorded == (0 if not recorded else 2 if method == "m+trades" else 1)
    assert results[0][0] == results[1][0]
    assert results[0][0][0][4] == 1
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())
