"""Models, loaders and batches that `fit` refuses, each in one sentence, with the caller's images unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from fits import equal, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_problems import images_and_labels, loader, made, network, normalized, run_config

import deat_rb
from deat_rb.methods import AttackTrainer
from deat_rb.runs.directory import RunDirectory
from deat_rb.training import Callback
from deat_rb.training.checks import InputFlags
from deat_rb.training.engine import Engine
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import DeatError

IMAGES, LABELS = images_and_labels(12)


class Wrapped(nn.Module):
    """A network with another output, always or in train mode only."""

    def __init__(self, change: Callable[[Tensor], Any], train_only: bool = False) -> None:
        super().__init__()
        self.net, self.change, self.train_only = made(), change, train_only

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        return self.change(logits) if self.training or not self.train_only else logits


class InPlace(nn.Module):
    """A network that changes its input in place."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.operation = made(), operation

    def forward(self, images: Tensor) -> Any:
        self.operation(images)
        return self.net(images)


class ExtraState(nn.Sequential):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Pooling(nn.Module):
    """No parameters."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def with_complex_weights() -> nn.Module:
    model = made()
    model.register_parameter("phase", nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    return model


class Detached(nn.Module):
    """A network whose input or output is detached."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.net, self.at = made(), at

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.detach() if self.at == "input" else images)
        return logits.detach() if self.at == "output" else logits


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tuple": (lambda: Wrapped(lambda out: (out, out)), "the model in train mode returns a tuple .* tensor of logits"),
    "dict": (lambda: Wrapped(lambda out: {"logits": out}), "the model in train mode returns a dict"),
    "1-D": (lambda: Wrapped(lambda out: out[:, 0]), r"returns logits of shape \(2,\)"),
    "(N, 1)": (lambda: Wrapped(lambda out: out[:, :1]), r"returns logits of shape \(2, 1\) .* K >= 2"),
    "integers": (lambda: Wrapped(lambda out: out.long()), "returns torch.int64 logits"),
    "auxiliary outputs in train mode": (lambda: Wrapped(lambda out: [out, out], True), "in train mode returns a list"),
    "bfloat16 weights": (lambda: made().bfloat16(), "does not accept torch.float32 images of 3x8x8"),
    "float64 weights": (lambda: made().double(), "does not accept torch.float32 images of 3x8x8"),
    "other channels": (lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), "does not accept .* images of 3x8x8"),
    "x.sub_": (lambda: InPlace(lambda x: x.sub_(0.5)), "the model in train mode changes its input in place"),
    "x.mul_": (lambda: InPlace(lambda x: x.mul_(0.9)), "the model in train mode changes its input in place"),
    "x.clamp_, no change": (lambda: InPlace(lambda x: x.clamp_(0, 1)), "changes its input in place"),
    "a view": (lambda: InPlace(lambda x: x[:, 0].zero_()), "changes its input in place"),
    "detached output": (lambda: Detached("output"), "the model's logits have no gradient"),
    "detached input": (lambda: Detached("input"), "the model's logits have no gradient"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "has lazy layers without weights"),
    "lazy BatchNorm": (lambda: nn.Sequential(nn.LazyBatchNorm2d(), made()), "has lazy layers without weights"),
    "meta": (lambda: made().to("meta"), "has no weights, only their shapes"),
    "frozen": (lambda: made().requires_grad_(False), "all parameters of the model are frozen"),
    "no parameters": (Pooling, "the model has no parameters"),
    "extra state": (lambda: ExtraState(*network()), "a dict under '_extra_state' in its state dict"),
    "complex weights": (with_complex_weights, "the complex tensor 'phase'"),
}


@pytest.mark.parametrize("case", MODELS)
def test_fit_refuses_a_model(case: str) -> None:
    factory, message = MODELS[case]
    model = factory()
    for batches in ([(IMAGES, LABELS)], [(IMAGES.contiguous(memory_format=torch.channels_last), LABELS)]):
        before = batches[0][0].clone()
        with pytest.raises(DeatError, match=message) as error:
            AttackTrainer(torchattacks.PGD(model, steps=1)).fit(batches, epochs=1)
        assert "\n" not in str(error.value)
        assert torch.equal(batches[0][0], before)


def test_fit_refuses_class_weights_of_other_classes() -> None:
    trainer = deat_rb.create("pgd-1", made(), class_weights=[1.0, 2.0, 3.0])
    with pytest.raises(DeatError, match=r"class_weights has 3 numbers, but the model 4 classes: give one for each$"):
        trainer.fit(loader(), epochs=1)


def test_fit_refuses_an_in_place_model_before_validating_with_it() -> None:
    model = InPlace(lambda x: x.mul_(0.9))
    before = IMAGES.clone()
    with pytest.raises(DeatError, match="the validation images: the model changes its input in place"):
        AttackTrainer(torchattacks.PGD(model, steps=1)).fit([(IMAGES, LABELS)], [(IMAGES, LABELS)], epochs=1)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("method", ["standard", "pgd-1", "trades", "free-2"])
def test_fit_gives_the_model_copies_of_the_images(method: str) -> None:
    """A network that turns to in-place operations later, too, cannot change the caller's images."""
    model = InPlace(lambda x: x)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    before = images.clone()

    class TurnsInPlace(Callback):
        def on_batch_start(self) -> None:
            model.operation = lambda x: x if x.requires_grad else x.mul_(0.5)

    deat_rb.create(method, model).fit([(images, LABELS)] * 2, epochs=1, lr=0.01, callbacks=[TurnsInPlace()])
    assert torch.equal(images, before)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_fit_trains_weight_norm(norm: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.warns() if norm is nn.utils.weight_norm else torch.no_grad():
        model = made()
        model[3] = norm(model[3])
    before = weights(model)
    deat_rb.create("pgd-1", model).fit(loader(), [images_and_labels()], epochs=2, lr=0.05)
    assert not equal(weights(model), before)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_fit_refuses_disabled_gradients_by_name(context: Any) -> None:
    trainer = deat_rb.create("pgd-1", made())
    with context(), pytest.raises(DeatError, match=rf"torch\.{context.__name__}\(\) disables: call fit outside of it"):
        trainer.fit(loader(), epochs=1)


def test_training_is_refused_inside_autocast(tmp_path: Path) -> None:
    """Autocast keeps the casts of weights until its outermost region ends, so that updates would have no effect."""
    trainer = deat_rb.create("free-2", made())
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    before = weights(trainer.model)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(DeatError, match="call it outside autocast, with precision='bf16' for fit"):
            trainer.fit(loader(), epochs=1)
        with pytest.raises(DeatError, match=r"engine=Engine\(device, 'bf16'\) for training_step"):
            trainer.training_step(IMAGES, LABELS, optimizer, Engine("cpu", "bf16"))
        with pytest.raises(DeatError, match="call it outside autocast"):
            deat_rb.train({"dataset": "digits", "method": "pgd-1"}, output=tmp_path / "runs")
    assert equal(weights(trainer.model), before)
    assert not (tmp_path / "runs").exists()


def test_fit_takes_images_created_in_inference_mode() -> None:
    with torch.inference_mode():
        images = IMAGES + 0
    assert deat_rb.create("pgd-1", made()).fit([(images, LABELS)], [(images, LABELS)], epochs=1).rows[0].examples == 12


# Loaders


class Examples(Dataset[Any]):
    """Single images as arrays, with labels."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index].numpy(), int(LABELS[index])


LOADERS: dict[str, tuple[Any, str]] = {
    "dicts": ([{"image": IMAGES, "label": LABELS}], "must yield pairs of tensors .* a dict with the keys image, label"),
    "triples": ([(IMAGES, LABELS, LABELS)], r"must yield pairs .* a tuple of 3 \(Tensor, Tensor, Tensor\)"),
    "numpy": ([(IMAGES.numpy(), LABELS.numpy())], r"must yield pairs .* a tuple of 2 \(ndarray, ndarray\)"),
    "None": ([None], "must yield pairs .* a NoneType"),
    "tensors": ((IMAGES, LABELS), "must yield pairs .* a Tensor"),
    "TensorDataset": (TensorDataset(IMAGES, LABELS), r"single examples, as a Dataset does: use .*DataLoader\(dataset"),
    "Dataset": (Examples(), r"single examples, as a Dataset does: use .*DataLoader\(dataset"),
    "DataLoader of dicts": (DataLoader(Examples(), collate_fn=lambda items: {"x": items}), "a dict with the keys x"),
    "number": (5, r"loader \(int\) is not iterable"),
    "float64": ([(IMAGES.double(), LABELS)], "does not accept torch.float64 images of 3x8x8"),
    "float16": ([(IMAGES.half(), LABELS)], "does not accept torch.float16 images of 3x8x8"),
    "int32 labels": ([(IMAGES, LABELS.int())], "labels must be int64"),
    "one-hot labels": ([(IMAGES, nn.functional.one_hot(LABELS))], "labels must be int64"),
}


@pytest.mark.parametrize("case", LOADERS)
@pytest.mark.parametrize("part", ["training", "validation"])
def test_fit_refuses_a_loader(case: str, part: str) -> None:
    bad, message = LOADERS[case]
    model = made()
    before = weights(model)
    loaders = (bad, None) if part == "training" else (loader(), bad)
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit(*loaders, epochs=1)
    assert equal(weights(model), before)


def test_fit_takes_batches_of_any_size_in_training_and_validation() -> None:
    batches: list[Any] = [(IMAGES[:5], LABELS[:5]), [IMAGES[5:6], LABELS[5:6]], (IMAGES[6:], LABELS[6:])]
    row = deat_rb.create("pgd-1", made()).fit(batches, batches, epochs=1).rows[0]
    assert row.examples == 12
    assert row.val_acc is not None


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(IMAGES, LABELS), batch_size=50, drop_last=True)])
def test_fit_refuses_a_loader_without_batches(empty: Any) -> None:
    with pytest.raises(
        DeatError, match="the training loader yields no batches; check its dataset, batch_size and drop_last"
    ):
        deat_rb.create("pgd-1", made()).fit(empty, epochs=1)


def test_fit_leaves_the_gradients_of_images_alone() -> None:
    images = IMAGES.clone().requires_grad_()
    for method in ("standard", "pgd-1", "free-2"):
        deat_rb.create(method, made()).fit([(images, LABELS)], [(images, LABELS)], epochs=1, lr=0.01)
    assert images.grad is None


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, IMAGES)])
def test_fit_trains_and_validates_torchscript(script: Callable[[nn.Module], nn.Module]) -> None:
    model = script(made())
    row = deat_rb.create("pgd-1", model).fit([(IMAGES, LABELS)], [(IMAGES, LABELS)], epochs=1, lr=0.01).rows[0]
    assert row.val_acc is not None


# Later batches

LATER: dict[str, tuple[Any, str]] = {
    "ignored labels": ((IMAGES, torch.full_like(LABELS, -100)), "label -100 is out of range"),
    "negative labels": ((IMAGES, LABELS - 1), "label -1 is out of range"),
    "labels too high": ((IMAGES, LABELS + 4), "label 7 is out of range: labels must be 0 to 3"),
    "0 to 255": ((IMAGES * 255, LABELS), r"images must be in \[0, 1\], not in .* divide by 255"),
    "uint8": (((IMAGES * 255).byte(), LABELS), "images must be floating-point"),
    "empty": ((IMAGES[:0], LABELS[:0]), "non-empty tensor"),
    "fewer labels": ((IMAGES, LABELS[:3]), "there are 12 images but 3 labels"),
    "dict": ({"x": IMAGES}, "a dict with the keys x"),
    "None": (None, "a NoneType"),
    "float64": ((IMAGES.double(), LABELS), "does not accept torch.float64 images"),
    "channels": ((IMAGES[:, :2], LABELS), "does not accept .* images of 2x8x8"),
}


class Changes:
    """Good batches, and a bad one as the second of the second epoch."""

    def __init__(self, bad: Any) -> None:
        self.bad = bad
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        good = loader(3)
        yield from [good[0], self.bad if self.epoch == 2 else good[1], good[2]]


THREE: dict[str, Any] = {"epochs": 3, "lr": 0.05}


@pytest.fixture(scope="module")
def weights_of_good_batches(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = RunDirectory.create(tmp_path_factory.mktemp("runs") / "whole", run_config())
    deat_rb.create("pgd-1", normalized()).fit(Changes(loader(3)[1]), run=run, **THREE)
    return (run.path / "last.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", LATER)
def test_fit_refuses_a_later_batch_by_number_and_loses_nothing(
    case: str, tmp_path: Path, weights_of_good_batches: bytes
) -> None:
    bad, message = LATER[case]
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(
        DeatError, match=f"^batch 2 of epoch 2: .*{message}.*; .* keeps 1 of 3 epochs and 1 batch of the next"
    ):
        deat_rb.create("pgd-1", normalized()).fit(Changes(bad), run=run, **THREE)
    deat_rb.create("pgd-1", normalized()).fit(Changes(loader(3)[1]), run=run, resume=True, **THREE)
    assert (run.path / "last.safetensors").read_bytes() == weights_of_good_batches


def test_fit_refuses_a_single_image_where_batchnorm_needs_more() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)
    )
    seen: list[dict[str, Tensor]] = []

    class Keeps(Callback):
        def on_batch_end(self, sums: Any) -> None:
            seen.append(weights(model))

    message = "batch 2 of epoch 1: it has a single image, from which BatchNorm cannot compute statistics: use a"
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit(
            [(IMAGES, LABELS), (IMAGES[:1], LABELS[:1])], [(IMAGES[:1], LABELS[:1])], epochs=1, callbacks=[Keeps()]
        )
    assert len(seen) == 1
    assert equal(weights(model), seen[0])


# Values on an accelerator are noted there, and judged where training reads values anyway


def test_input_flags_name_the_first_bad_batch_and_clamp_labels() -> None:
    flags = InputFlags()
    assert flags.found() is None
    assert torch.equal(flags.note(IMAGES, LABELS, 4, batch=0), LABELS)
    assert flags.found() is None
    assert flags.note(IMAGES, LABELS + 1, 4, batch=1).max() == 3
    flags.note(IMAGES * 255, LABELS, 4, batch=2)
    assert flags.found() == (2, "a label is negative or not below the number of classes")
    assert flags.note(IMAGES, torch.full_like(LABELS, -100), 4, batch=3).min() == 0


def test_fit_ends_at_the_epoch_s_end_on_bad_values_on_an_accelerator() -> None:
    class Accelerator(Callback):
        """Note the batches as training on an accelerator does, the second one of epoch 2 as bad."""

        def on_fit_start(self, state: TrainingState) -> None:
            self.state = state

        def on_batch_start(self) -> None:
            bad = (self.state.epoch, self.state.batch) == (2, 1)
            self.state.inputs.note(IMAGES * (255 if bad else 1), LABELS, 4, self.state.batch)

    with pytest.raises(
        DeatError, match=r"batch 2 of epoch 2 is invalid: an image has values .*; the model has .* epoch 1$"
    ):
        deat_rb.create("pgd-1", made()).fit(loader(3), epochs=3, callbacks=[Accelerator()])


# The loader is iterated as in a bare loop


class Counting(TensorDataset):
    """Record the indices in the order in which they are read."""

    def __init__(self) -> None:
        super().__init__(IMAGES, LABELS)
        self.order: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.order.append(index)
        return IMAGES[index], LABELS[index]


class CountingLoader(DataLoader[Any]):
    iterators = 0

    def __iter__(self) -> Any:
        self.iterators += 1
        return super().__iter__()


def test_fit_reads_a_dataloader_as_often_and_in_the_order_of_a_bare_loop() -> None:
    def shuffled() -> tuple[Counting, CountingLoader]:
        data = Counting()
        return data, CountingLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))

    (data, batches), (expected, bare) = shuffled(), shuffled()
    val_data, val_batches = shuffled()
    for _ in range(3):
        for _ in bare:
            pass
    deat_rb.create("pgd-1", made()).fit(batches, val_batches, epochs=3)
    assert data.order == expected.order
    assert (batches.iterators, val_batches.iterators) == (3, 1)
    assert val_data.order == expected.order[:12]


def test_fit_reads_a_stream_once_more_to_count_its_batches() -> None:
    class Stream(IterableDataset[Any]):
        iterators = 0

        def __iter__(self) -> Iterator[Any]:
            self.iterators += 1
            return iter(zip(IMAGES, LABELS, strict=True))

    stream = Stream()
    history = deat_rb.create("pgd-1", made()).fit(DataLoader(stream, batch_size=4), epochs=2)
    assert (stream.iterators, history.rows[0].updates) == (3, 3)


@pytest.mark.parametrize("part", [0, 1])
def test_fit_refuses_batches_without_values(part: int) -> None:
    batch = [IMAGES, LABELS]
    batch[part] = batch[part].to("meta")
    with pytest.raises(DeatError, match="images or labels have no values, only shapes"):
        deat_rb.create("pgd-1", made()).fit([(batch[0], batch[1])], epochs=1)
