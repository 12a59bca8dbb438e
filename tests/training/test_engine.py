"""Devices, precisions and the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torchattacks
from torch import nn
from torch.optim import SGD
from training_problems import images_and_labels, loader, made

import deat_rb
from deat_rb.training.engine import Engine, fast_gpu_math
from deat_rb.training.optimizers import build_optimizer
from deat_rb.training.options import OptimConfig
from deat_rb.training.trainer import Trainer
from deat_rb.utils.devices import Precision, resolve_device, resolve_precision
from deat_rb.utils.errors import DeatError

CPU = torch.device("cpu")


def test_resolve_device() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else resolve_device().type)


@pytest.mark.parametrize("name", ["cuda:63", "gpu", "", "meta"])
def test_resolve_device_refuses(name: str) -> None:
    with pytest.raises(
        DeatError, match=f"there is no device '{name}' on this machine; use --device auto to choose one"
    ):
        resolve_device(name)


def test_resolve_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(DeatError, match="fp16 is not supported on a CPU; use --precision bf16, fp32 or auto"):
        resolve_precision("fp16", CPU)
    with pytest.raises(DeatError, match="unknown precision 'bf61': did you mean 'bf16'"):
        resolve_precision("bf61", CPU)
    for bf16, amx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert resolve_precision("auto", CPU) == expected
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("device", "precision"), [("cuda", "high"), ("cpu", "highest")])
def test_fast_gpu_math_is_for_gpus_and_restored(device: str, precision: str) -> None:
    def chosen() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    assert chosen() == ("highest", False)
    with fast_gpu_math(torch.device(device)):
        assert chosen() == (precision, device == "cuda")
        with Engine().eager(made()):
            assert chosen() == (precision, False)
    assert chosen() == ("highest", False)


def test_backward_and_step_returns_the_gradient_before_the_update() -> None:
    """Of w x^2 at w = 3, x = 2: 2 w x = 12 with respect to x, x^2 = 4 to w, so that w = 3 - 0.5 * 4 = 1."""
    w, x = nn.Parameter(torch.tensor([3.0])), torch.tensor([2.0], requires_grad=True)
    w.grad = torch.tensor([100.0])
    gradient, overflows = Engine().backward_and_step(w * x**2, SGD([w], lr=0.5), x)
    assert (float(gradient), float(w), overflows) == (12.0, 1.0, 0)
    assert float(Engine().backward_and_step(w * x.detach() ** 2, SGD([w], lr=0.5), x.detach())[0]) == 0


def test_autocast_has_the_precision() -> None:
    model, (images, _) = made(), images_and_labels()
    for engine, dtype in ((Engine("cpu", "fp32"), torch.float32), (Engine("cpu", "bf16"), torch.bfloat16)):
        with engine.autocast():
            assert model(images).dtype == dtype


def test_prepare_and_to_device_use_channels_last() -> None:
    engine = Engine()
    weight = next(engine.prepare(made()).parameters())
    images, labels = engine.to_device(*images_and_labels())
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, images_and_labels()[0])
    assert labels.dtype == torch.int64


def test_peak_memory_is_in_bytes() -> None:
    """A process that has imported torch takes more than 50 MB and less than 100 GB."""
    pytest.importorskip("resource", reason="the peak is unknown where it does not exist, as on Windows")
    assert 50e6 < Engine().peak_memory() < 100e9


def test_training_step_in_bf16_has_the_l_x_of_fp32() -> None:
    for name in ("pgd-2", "deat-2", "mart"):
        seen = [l_x_of(name, precision, "cpu") for precision in ("fp32", "bf16")]
        assert seen[1] == pytest.approx(seen[0], rel=0.05), name


def l_x_of(name: str, precision: Precision, device: str) -> float:
    model = made().eval().to(device)
    trainer = trainer_of(name, model)
    images, labels = images_and_labels(64, size=32)
    torch.manual_seed(1)
    stats = trainer.training_step(
        images.to(device), labels.to(device), SGD(model.parameters(), lr=0.01), Engine(device, precision)
    )
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert bool(stats.loss.isfinite())
    return float(stats.l_x)


def trainer_of(name: str, model: nn.Module) -> Trainer:
    if name == "torchattacks":
        return deat_rb.AttackTrainer(torchattacks.PGD(model, steps=2))
    return deat_rb.create(name, model)


NAMES = ["standard", "pgd-2", "m-deat", "free-3", "trades", "mart", "fat-2", "f+mart", "torchattacks"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_step_in_half_precision_on_a_gpu_has_the_l_x_of_fp32(name: str, precision: Precision) -> None:
    """The noise of TRADES' start is at the resolution of half precision, so its l_X is only known to be finite."""
    expected, seen = l_x_of(name, "fp32", "cuda"), l_x_of(name, precision, "cuda")
    if name not in ("trades", "f+mart"):
        assert seen == pytest.approx(expected, rel=0.05)


@contextmanager
def syncs_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_step_on_a_gpu_does_not_wait(name: str, precision: Precision) -> None:
    model = made().cuda()
    trainer = trainer_of(name, model)
    engine = Engine("cuda", precision)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01), engine.device)
    images, labels = (part.cuda() for part in images_and_labels(16))
    trainer.training_step(images, labels, optimizer, engine)
    with syncs_raise():
        stats = trainer.training_step(images, labels, optimizer, engine)
    assert bool(stats.loss.isfinite())


@pytest.mark.gpu
def test_fit_on_a_gpu_trains_and_restores_the_generators() -> None:
    state = torch.cuda.get_rng_state()
    model = made()
    trainer = deat_rb.create("m-deat", model)
    history = trainer.fit([images_and_labels(16)] * 2, epochs=2, device="cuda", precision="bf16")
    assert next(model.parameters()).device.type == "cuda"
    assert history.steps == [1, 2]
    assert history.rows[-1].peak_memory > 0
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd-2", "fat-3", "f+trades", "free-2", "mart"])
def test_compile_trains_as_eager_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding. The graphs are captured as always, and run without the compiler that takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        model = made()
        trainer = deat_rb.create(method, model, **({"steps": 2} if method == "mart" else {}))
        history = trainer.fit(loader(3), epochs=1, lr=0.05, compile=compiled)
        assert "forward" not in model.__dict__
        results.append((history.rows[0].loss, history.rows[0].l_x))
    assert results[0] == pytest.approx(results[1], rel=1e-3)
