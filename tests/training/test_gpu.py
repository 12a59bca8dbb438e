"""Training on a GPU: recorded, compiled, deterministic and resumed steps of residual networks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_problems import images_and_labels

import deat_rb
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet
from deat_rb.methods.registry import known_methods
from deat_rb.runs.train import resume as resume_run
from deat_rb.training.callbacks import Action, Callback
from deat_rb.training.cuda_graphs import choose_graphs
from deat_rb.training.engine import Engine, deterministic_algorithms
from deat_rb.training.optimizers import build_optimizer
from deat_rb.training.options import OptimConfig
from deat_rb.training.step_runner import StepRunner
from deat_rb.utils.errors import Interrupted

pytestmark = pytest.mark.gpu

ARCHITECTURES = ("wrn-10-1", "preactresnet18")
OPTIONS: dict[str, Any] = {"epochs": 2, "lr": 0.05, "device": "cuda"}


@cache
def batches(device: str = "cuda") -> Batches:
    """Six full batches of 16 images and a smaller one, in two epochs those of one seed."""
    images, labels = images_and_labels(100, size=32)
    data = ImageSet((255 * images).to(torch.uint8), labels)
    return Batches(data, 16, shuffle=True, augmentation="crop-flip", device=device, memory_format=torch.channels_last)


def network(arch: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return deat_rb.build_model(arch, dataset="digits")


def trained(method: str, arch: str, **options: Any) -> tuple[dict[str, Tensor], list[tuple[float, ...]]]:
    model = network(arch)
    trainer = deat_rb.create(method, model)
    if trainer.stopping is not None:
        trainer.stopping = None
    history = trainer.fit(batches(), **{**OPTIONS, **options})
    return model.state_dict(), [(row.loss, row.l_x, row.train_acc) for row in history.rows]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("method", "precision"),
    [(method, "bf16") for method in known_methods()]
    + [(method, precision) for method in ("m-deat", "m+trades", "fat-5") for precision in ("fp32", "fp16")],
)
def test_recorded_steps_are_bit_for_bit_those_that_are_not(method: str, precision: str) -> None:
    options = {"precision": precision, "deterministic": True}
    weights, rows = trained(method, "wrn-10-1", cuda_graphs="on", **options)
    expected, expected_rows = trained(method, "wrn-10-1", cuda_graphs="off", **options)
    assert rows == expected_rows
    assert equal(weights, expected)


@pytest.mark.parametrize("method", ["m-deat", "pgd-2", "m+trades"])
def test_recorded_steps_of_preactresnet18(method: str) -> None:
    """With 1x1 convolutions, whose gradients' strides are free."""
    options = {"precision": "bf16", "deterministic": True, "epochs": 1, "ema": 0.9}
    weights, rows = trained(method, "preactresnet18", cuda_graphs="on", **options)
    expected, expected_rows = trained(method, "preactresnet18", cuda_graphs="off", **options)
    assert rows == expected_rows
    assert equal(weights, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_by_default_steps_are_recorded(arch: str, precision: Any) -> None:
    model = network(arch)
    trainer = deat_rb.create("pgd-2", model)
    engine = Engine("cuda", precision)
    engine.graphs = choose_graphs("auto", torch.device("cuda"), 1)
    with engine.prepared(model):
        trainer.set_device(engine.device)
        model.train()
        runner = StepRunner(trainer, engine, build_optimizer(model, OptimConfig(lr=0.01), engine.device))
        images, labels = engine.to_device(*images_and_labels(16, size=32))
        losses = [float(runner(images, labels, 16).loss) for _ in range(6)]
    assert runner.recordings == 1
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_and_gradients_are_in_channels_last_and_fit_the_fused_optimizer(arch: str) -> None:
    model = network(arch)
    trainer, engine = deat_rb.create("pgd-1", model), Engine("cuda", "bf16")
    with engine.prepared(model):
        trainer.set_device(engine.device)
        optimizer = build_optimizer(model, OptimConfig(lr=0.01), engine.device)
        trainer.training_step(*engine.to_device(*images_and_labels(16, size=32)), optimizer, engine)
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_the_fused_optimizer_takes_a_vision_transformer() -> None:
    pytest.importorskip("timm")
    model = deat_rb.build_model("timm:vit_tiny_patch16_224", num_classes=4, image_size=32)
    history = deat_rb.create("pgd-1", model).fit(batches(), **{**OPTIONS, "epochs": 1, "precision": "bf16"})
    assert history.rows[0].updates == 7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["m+trades", "fat-2"])
def test_compiled_and_recorded_steps_train_as_eager_ones(method: str) -> None:
    """Within rounding."""
    _, rows = trained(method, "wrn-10-1", precision="fp32", compile=True, cuda_graphs="on", epochs=1)
    _, expected = trained(method, "wrn-10-1", precision="fp32", cuda_graphs="off", epochs=1)
    assert rows[0][:2] == pytest.approx(expected[0][:2], rel=0.05)


def test_deterministic_runs_are_equal_and_a_resumed_one_too(tmp_path: Path) -> None:
    options = {
        "method": "m-deat", "dataset": "digits", "train_size": 200, "val_size": 20, "epochs": 2, "precision": "bf16",
        "device": "cuda", "deterministic": True,
    }  # fmt: skip
    first, _ = deat_rb.train(options, output=tmp_path, name="a")

    class Interrupts(Callback):
        """Stops in the middle of the second epoch."""

        stops = False

        def on_batch_end(self, sums: Any) -> None:
            self.stops = sums.batches == 1 and sums.updates == 2

        def requested_action(self) -> Action:
            return Action.STOP if self.stops else Action.CONTINUE

    with pytest.raises(Interrupted):
        deat_rb.train(options, output=tmp_path, name="b", callbacks=[Interrupts()])
    second, _ = resume_run(tmp_path / "b", {})
    assert equal(deat_rb.load_model(first.path).state_dict(), deat_rb.load_model(second.path).state_dict())


def test_order_crops_and_flips_are_those_of_the_cpu() -> None:
    for each in (batches(), batches("cpu")):
        each.set_epoch(2)
    for (images, labels), (expected, expected_labels) in zip(batches(), batches("cpu"), strict=True):
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), expected_labels)


def test_deterministic_algorithms_are_used() -> None:
    with deterministic_algorithms():
        values = torch.rand(1000, device="cuda")
        index = torch.zeros(1000, dtype=torch.long, device="cuda")
        sums = {float(torch.zeros(1, device="cuda").index_add_(0, index, values)) for _ in range(5)}
    assert len(sums) == 1


def test_a_loader_may_yield_images_and_labels_on_different_devices() -> None:
    images, labels = images_and_labels(16, size=32)
    for batch in ((images.cuda(), labels), (images, labels.cuda())):
        history = deat_rb.create("pgd-1", network("wrn-10-1")).fit([batch] * 2, [batch], **OPTIONS)
        assert [row.updates for row in history.rows] == [2, 2]
