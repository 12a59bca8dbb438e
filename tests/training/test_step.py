"""The training step on the device: no look at a value, overflows in fp16, layout of gradients, BatchNorm's counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_problems import begin, images_and_labels, loader, made
from transfers import Transfers

import deat_rb
from deat_rb.methods.registry import known_methods
from deat_rb.training.engine import ATTACK_SCALE, Engine
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.training.nonfinite import NonFiniteFlags
from deat_rb.training.optimizers import build_optimizer
from deat_rb.training.options import OptimConfig
from deat_rb.training.trainer import Trainer
from deat_rb.utils.devices import full_float32


def taking_steps(method: str, model: nn.Module) -> Trainer:
    """A trainer in whose first epoch the attack takes at most two steps, and two where the number of steps is free."""
    trainer = deat_rb.create(method, model)
    if trainer.steps > 2 or (trainer.steps == 1 and trainer.schedule.guided):
        trainer.steps = 2
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("method", known_methods())
def test_no_method_looks_at_a_value(method: str) -> None:
    """A tensor on the meta device has no values: whatever reads one raises, as it would wait for a GPU."""
    model = made().to("meta")
    trainer = taking_steps(method, model)
    engine = Engine("meta")
    trainer.set_device(engine.device)
    images, labels = (part.to("meta") for part in images_and_labels(8))
    sums, flags = EpochAccumulator(), NonFiniteFlags()
    with engine.prepared(model):
        optimizer = build_optimizer(model, OptimConfig(lr=0.1), engine.device)
        for batch in range(2):
            begin(trainer, images, 0, batch, engine)
            with engine.training_batch(model, 8), Transfers() as transfers:
                stats = trainer.training_step(images, labels, optimizer, engine)
                flags.note(stats, model, batch)
                sums.add(stats)
            assert transfers.names == [], "copies from and to the host wait, too"
    assert (sums.examples, sums.batches) == (16, 2)
    with pytest.raises(RuntimeError, match="meta tensors"):
        sums.read()


class Kernels(TorchDispatchMode):
    """Records the names of the operations."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels(method: str) -> list[str]:
    model = made()
    trainer = taking_steps(method, model)
    engine = Engine()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1), engine.device)
    images, labels = images_and_labels(8)
    recorded = Kernels()
    with engine.prepared(model), engine.training_batch(model, 8), recorded:
        trainer.training_step(images, labels, optimizer, engine)
    return recorded.names


@pytest.mark.parametrize("method", ["pgd-2", "m+trades", "free-2"])
def test_counting_the_batches_takes_one_kernel_per_update(method: str) -> None:
    """Two attack passes and one or two of the update go through two BatchNorms."""
    names = kernels(method)
    assert sum("_foreach_add_.Scalar" in name for name in names) == (2 if method == "free-2" else 1)


@pytest.mark.parametrize("method", ["pgd-3", "free-2", "m+trades", "fat-3"])
def test_batches_are_counted_as_torch_does(method: str) -> None:
    counts = []
    for counting in (False, True):
        model = made()
        trainer, engine = taking_steps(method, model), Engine()
        optimizer = build_optimizer(model, OptimConfig(lr=0.1), engine.device)
        images, labels = images_and_labels(8)
        if counting:
            with engine.training_batch(model, 8):
                trainer.training_step(images, labels, optimizer, engine)
        else:
            trainer.training_step(images, labels, optimizer, engine)
        counts.append({name: int(value) for name, value in model.state_dict().items() if "num_batches" in name})
    assert counts[0] == counts[1]
    assert all("num_batches_tracked" not in vars(module) for module in model.modules())


def test_the_average_of_the_weights_has_the_counters_of_the_last_update() -> None:
    model = made()
    before = int(model.state_dict()["1.num_batches_tracked"])
    deat_rb.create("pgd-2", model).fit(loader(3), epochs=1, lr=0.05, ema=0.9)
    assert int(model.state_dict()["1.num_batches_tracked"]) == before + 3 * 3


class Idle(TorchDispatchMode):
    """Records the operations that do nothing: with a factor or divisor 1, and zeros that are not read."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.factors: list[str] = []
        self.zeros: dict[int, tuple[str, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ("mul", "div") and not isinstance(args[1], Tensor) and args[1] == 1:
            self.factors.append(str(func))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "copy_" and self._address(given[0]) in self.zeros:
            part = given.pop(0)  # what is overwritten is not read
            assert part.numel() < self.zeros[self._address(part)][1].numel(), "all zeros are overwritten"
        for tensor in given if not func.is_view and name != "zeros_like" else ():
            self.zeros.pop(self._address(tensor), None)
        output = func(*args, **(kwargs or {}))
        if name in ("zeros", "zeros_like", "new_zeros"):
            self.zeros[self._address(output)] = name, output
        return output

    def _address(self, tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", known_methods())
def test_no_kernel_of_a_step_does_nothing(method: str) -> None:
    model, idle, sums = made(), Idle(), EpochAccumulator()
    trainer, engine = taking_steps(method, model), Engine()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1), engine.device)
    images, labels = images_and_labels(8)
    with engine.prepared(model):
        for batch in range(2):
            with engine.training_batch(model, 8), idle:
                begin(trainer, images, 0, batch, engine)
                sums.add(trainer.training_step(images, labels, optimizer, engine))
    assert idle.factors == []
    assert [name for name, _ in idle.zeros.values()] == []


def test_pgd_does_not_gather_whole_batches() -> None:
    model = made().eval()
    images, labels = images_and_labels(8)
    attack = deat_rb.PGD(model, steps=2, tau=1, loss="kl", start="none")
    attack.fixed_size = True
    with Kernels() as recorded:
        attack.craft(images, labels)
    assert not [name for name in recorded.names if "index" in name]


class Selective(nn.Module):
    """Plus and minus the mean of an image as logits; the third image's, taken in fp16, is multiplied by 600."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, images: Tensor) -> Tensor:
        half = images.mean(dim=(1, 2, 3), dtype=torch.float32).to(torch.float16)
        steepness = torch.tensor([1.0, 1.0, 600.0, 1.0], dtype=torch.float16)[: len(images)]
        score = (half * steepness).float()
        return torch.stack([score * self.weight[0], -score * self.weight[1]], dim=1)


@pytest.mark.parametrize("tau", [None, 3])
def test_an_overflow_in_an_attack_neither_moves_the_example_nor_counts_in_l_x(tau: int | None) -> None:
    """In fp16 the largest number is 65,504: 2 * 600 * 1024 / 4 overflows, 2 * 600 * 128 / 4 does not."""
    model = Selective()
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 1, 1, 1])
    engine = Engine("cpu", "fp16")
    attack = deat_rb.PGD(model, eps=0.1, alpha=0.05, steps=1, start="none", tau=tau, attack_mode="eval")
    attack.loss_scale = engine.loss_scale
    adv, stats = attack.craft(images, labels)
    assert stats.l_x.isfinite()
    assert float(stats.overflows) == 1
    assert torch.equal(adv[2], images[2])
    assert not torch.equal(adv[0], images[0])
    assert float(engine.loss_scale) == ATTACK_SCALE / 2
    for _ in range(3):
        adv, stats = attack.craft(images, labels)
    assert float(stats.overflows) == 0
    assert float(engine.loss_scale) == ATTACK_SCALE / 8
    assert not torch.equal(adv[2], images[2])
    attack.loss_scale = 1.0
    assert float(stats.l_x) == pytest.approx(float(attack.craft(images, labels)[1].l_x), rel=1e-2)


def test_overflows_are_recorded_and_their_scale_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.training.fit.resolve_precision", lambda name, device: "fp16")
    model = Selective()
    data = [(torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 1, 1, 1]))] * 3
    history = deat_rb.create("pgd-2", model).fit(data, epochs=1, lr=0.01)
    assert history.rows[0].overflows > 0
    assert history.rows[0].l_x > 0
    engine = Engine("cpu", "fp16")
    assert isinstance(engine.loss_scale, Tensor)
    engine.loss_scale.fill_(64)
    other = Engine("cpu", "fp16")
    other.load_state_dict(engine.state_dict())
    assert float(other.loss_scale) == 64
    other.load_state_dict(engine.scaler.state_dict())
    assert float(other.loss_scale) == ATTACK_SCALE
    assert Engine().state_dict() == {}


def test_a_call_after_a_step_in_fp16_uses_no_loss_scale() -> None:
    """It would change the engine's, and fail where the model was moved to another device."""
    trainer, engine = deat_rb.create("pgd-1", Selective()), Engine("cpu", "fp16")
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 1, 1, 1])
    trainer.training_step(images, labels, SGD(trainer.model.parameters(), lr=0.0), engine)
    scale = float(engine.loss_scale)
    assert scale == ATTACK_SCALE / 2
    trainer(images, labels)
    assert float(engine.loss_scale) == scale


def test_an_overflow_in_a_penalty_counts_and_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """GradAlign differentiates at the image and at a random point, where it halves the scale as the attack does.

    The third image overflows at 1024 in the attack and at 512 in the penalty, then at 256 in the attack.
    """
    model, engine = Selective(), Engine("cpu", "fp16")
    trainer = deat_rb.create("gradalign", model)
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 1, 1, 1])
    optimizer = SGD(model.parameters(), lr=1e-6)
    counts = []
    for _ in range(4):
        stats = trainer.training_step(images, labels, optimizer, engine)
        counts.append(float(stats.overflows))
        assert stats.loss.isfinite()
    assert counts == [2, 1, 0, 0]
    assert float(engine.loss_scale) == 128
    assert model.weight.isfinite().all()
    monkeypatch.setattr("deat_rb.training.fit.resolve_precision", lambda name, device: "fp16")
    history = deat_rb.create("gradalign", Selective()).fit([(images, labels)] * 4, epochs=1, lr=1e-6)
    assert history.rows[0].overflows == 3


@pytest.mark.parametrize(("method", "passes"), [("free-2", 2), ("deat-2", 2), ("yopo-3-2", 3)])
def test_an_overflow_of_a_whole_batch_counts_in_methods_that_share_a_pass(method: str, passes: int) -> None:
    """At a scale of 2^60 every backward pass overflows, though the scaler halves it after each update."""
    model, engine = made(), Engine("cpu", "fp16")
    trainer = deat_rb.create(method, model)
    trainer.steps = passes
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stats = trainer.training_step(*images_and_labels(16), SGD(model.parameters(), lr=0.1), engine)
    assert float(stats.overflows) == 16 * passes
    assert float(stats.l_x) == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", ["pgd-2", "free-2", "yopo-2-2", "gradalign", "m+trades", "mart", "f+trades"])
def test_a_step_in_fp16_is_that_of_fp32_within_rounding(method: str) -> None:
    """The scale of fp16 grows in the step."""
    found = []
    for precision in ("fp32", "fp16"):
        model = made().eval()
        trainer, engine = taking_steps(method, model), Engine("cpu", precision)
        engine.scaler.set_growth_interval(1)
        torch.manual_seed(1)
        stats = trainer.training_step(*images_and_labels(16), SGD(model.parameters(), lr=0.01), engine)
        assert float(stats.overflows) == 0
        found.append((float(stats.loss), float(stats.l_x)))
    assert found[1] == pytest.approx(found[0], rel=0.1)


class Ambiguous(torch.autograd.Function):
    """Passes a tensor on; its gradient is contiguous in torch's default layout."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone(memory_format=torch.contiguous_format)


def test_gradients_get_the_strides_of_the_weights_for_the_fused_optimizer() -> None:
    """As of 1x1 convolutions in channels_last, whose strides of length 1 are free."""
    weight = nn.Parameter(torch.rand(4, 3, 1, 1).as_strided((4, 3, 1, 1), (3, 1, 3, 3)))
    expected = weight.detach() - 0.1
    seen = []
    optimizer = SGD([weight], lr=0.1, fused=True)
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.stride() if weight.grad is not None else None))
    Engine().update(Ambiguous.apply(weight).sum()[None], optimizer)
    assert seen == [weight.stride()]
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 3, 2, 2)])
def test_laying_out_keeps_the_values(shape: tuple[int, ...]) -> None:
    from deat_rb.training.engine import _laid_out_like

    gradient = torch.rand(shape)
    parameter = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    parameter = parameter.as_strided(shape, (3 * shape[2] * shape[3], 1, 3 * shape[3], 3))
    laid_out = _laid_out_like(parameter, gradient)
    assert laid_out.stride() == parameter.stride()
    assert torch.equal(laid_out, gradient)
    assert (laid_out.data_ptr() == gradient.data_ptr()) == (shape[2] == 1)


def test_full_float32_switches_autocast_and_tf32_off_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = settings()
    with torch.autocast("cpu", torch.bfloat16):
        with full_float32(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
            assert settings() == before
        assert torch.is_autocast_enabled("cpu")
        with full_float32(torch.device("cuda")):
            assert settings() == (False, "highest")
    assert settings() == before
