"""Runs of `deat-rb train` from Python, on a part of the digits."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, identical, planned

import deat_rb
from deat_rb.cli.training_progress import TrainingProgress
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import ImageSet
from deat_rb.runs.options import make_options, read_options
from deat_rb.runs.plots import plot_curves
from deat_rb.runs.train import train, train_seeds
from deat_rb.training.base import TrainerBase
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import DeatError


@pytest.mark.slow
def test_train_writes_all_files_of_a_run(tmp_path: Path) -> None:
    options = {"method": "m+trades", "arch": "wrn-10-1", "train_size": 200, "batch_size": 32, "epochs": 2, "eps": 0.15}
    run, history = train({**options, "precision": "fp32"}, output=tmp_path)
    assert run.path.name == "m+trades-digits-wrn-10-1-s0"
    assert sorted(path.name for path in run.path.iterdir() if path.name[0] != ".") == [
        "best.json", "best.safetensors", "checkpoints", "config.json", "curves.png", "last.json",
        "last.safetensors", "metrics.jsonl",
    ]  # fmt: skip
    assert (run.path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert run.rows() == history.rows
    assert history.steps == [1, 2]
    assert [row.examples for row in history.rows] == [200, 200]
    assert torch.__version__.startswith(run.config.versions["torch"])
    assert all(row.val_robust_acc is not None and row.lipschitz and row.seconds > 0 for row in history.rows)


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_train_repeats_a_config_json_bit_for_bit(tmp_path: Path) -> None:
    """A part of the training images, the part held out and their order come from the seed and the sizes."""
    first, _ = train({**SMALL, "method": "m-deat", "seed": 5}, output=tmp_path / "a")
    options = read_options(first.path / "config.json")
    again, _ = train(options, output=tmp_path / "b")
    assert again.config == first.config
    assert identical(first, again)
    other, _ = train({**options, "seed": 6}, output=tmp_path / "b")
    assert not identical(first, other)


@pytest.mark.usefixtures("without_curves")
def test_train_leaves_validation_images_in_their_files(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(data / "test", data / "val")
    options = {**SMALL, "dataset": "folder", "data_dir": str(data), "train_size": None, "val_size": None,
               "method": "u-fgsm", "batch_size": 24, "epochs": 1}  # fmt: skip
    _, held = train(options, output=tmp_path, name="held")

    in_memory = ImageFolder.in_memory

    def load(self: ImageFolder) -> ImageSet:
        assert len(self) <= 8, "only the images of a trial are loaded"
        return in_memory(self)

    monkeypatch.setattr(ImageFolder, "in_memory", load)
    _, read = train({**options, "memory_limit": 0}, output=tmp_path, name="read")
    for name in ("loss", "val_acc", "val_robust_acc", "stop_robust_acc"):
        assert getattr(read.rows[0], name) == getattr(held.rows[0], name)


@pytest.mark.usefixtures("without_curves")
def test_train_never_uses_a_test_image(tmp_path: Path) -> None:
    """Invariant 7: the run trains although its test images cannot be read."""

    class Forbidden:
        def __getattr__(self, name: str) -> object:
            raise AssertionError("somebody looked at the test images")

    ready = planned()
    object.__setattr__(ready.data, "test", Forbidden())
    run, history = train(ready, output=tmp_path)
    assert len(history.rows) == 2
    assert run.selected_weights_path.is_file()


@pytest.mark.usefixtures("without_curves")
def test_train_resets_peak_memory_in_each_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[str] = []
    monkeypatch.setattr(
        "deat_rb.training.engine.Engine.reset_peak_memory", lambda engine: begun.append(engine.device.type)
    )
    train(SMALL, output=tmp_path)
    assert begun == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pgd"}, "no method 'pgd': did you mean"),
        (
            {"dataset": "digit"},
            "--dataset = 'digit' cannot be used: it should be 'digits', 'cifar10', 'cifar100' or 'folder'",
        ),
        ({"arch": "wrn-10"}, "architecture 'wrn-10' is unknown"),
        ({"eps": 0.0}, "--eps = 0 is outside"),
        ({"eps": -0.1}, "--eps = -0.1 is outside"),
        ({"eps": 8.0}, "--eps = 8 is outside"),
        ({"beta": 3.0}, "the method pgd-1 has no parameter beta"),
        ({"batch_size": 65}, "64 training images are fewer than a batch of 65; reduce --batch-size"),
        (
            {"batch_size": 63, "arch": "training_problems:network"},
            r"the last batch would have only 1 of the 64 training images \(--batch-size 63\), and BatchNorm needs 2",
        ),
        ({"train_size": 5000}, "--train-size 5000 cannot be taken from 1281"),
        ({"val_size": 1297}, "--val-size 1297 cannot be held out of 1297"),
        ({"val_size": 0}, "val-size"),
        ({"train_size": 0}, "train-size"),
        ({"precision": "fp16"}, "fp16 is not supported on a CPU"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"image_size": 28, "arch": "wrn-10-1"}, "28"),
    ],
)
def test_train_with_a_bad_option_writes_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=message):
        train({**SMALL, **changes}, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("without_curves")
def test_train_refuses_bad_and_taken_names(tmp_path: Path) -> None:
    for name in ("a/b", "..", "../../a"):
        with pytest.raises(DeatError, match="is not a valid run name"):
            train(SMALL, output=tmp_path / "runs", name=name)
    assert not (tmp_path / "runs").exists()
    run, _ = train({**SMALL, "epochs": 1}, output=tmp_path, name="mine")
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(DeatError, match=r"mine already exists"):
        train(SMALL, output=tmp_path, name="mine")
    assert (run.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_train_interrupted_has_curves_and_loads(tmp_path: Path) -> None:
    class Interrupts(Callback):
        def on_batch_end(self, sums: EpochAccumulator) -> None:
            if self.epoch == 2:
                raise KeyboardInterrupt

        def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
            self.epoch = epoch

    with pytest.raises(KeyboardInterrupt):
        train(SMALL, output=tmp_path, name="cut", callbacks=[Interrupts()])
    assert (tmp_path / "cut" / "curves.png").is_file()
    deat_rb.load_model(tmp_path / "cut", trust_code=True)


@pytest.mark.usefixtures("without_curves")
def test_train_restores_the_global_generators(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train({**SMALL, "epochs": 1}, output=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_plot_curves_of_one_epoch_without_validation(tmp_path: Path) -> None:
    """A picture of 1100 x 704 pixels, as the PNG's header says."""
    path = tmp_path / "curves.png"
    plot_curves([EpochStats(epoch=1, steps=0, loss=1.0, train_acc=0.5)], path, title="one")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (1100, 704)


@pytest.mark.slow
def test_train_seeds_loads_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, **options: Any) -> Dataset:
        loaded.append(name)
        return load_data(name, **options)

    monkeypatch.setattr("deat_rb.runs.plan.load_data", load)
    results = train_seeds(make_options({**SMALL, "epochs": 1}), [3, 4], output=tmp_path, name="runs")
    assert loaded == ["digits"]
    assert [(run.path.name, run.config.optim.seed) for run, _ in results] == [("runs-s3", 3), ("runs-s4", 4)]
    alone, _ = train({**SMALL, "epochs": 1, "seed": 4}, output=tmp_path, name="alone")
    assert identical(results[1][0], alone)


def test_train_seeds_frees_the_network_and_state_of_a_finished_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next seed's optimizer and averaged weights are built; the progress is the command line's callback."""
    trainers: list[weakref.ref[TrainerBase]] = []
    alive: list[int] = []

    class Keeps(Callback):
        def on_fit_start(self, state: TrainingState) -> None:
            super().on_fit_start(state)
            trainers.append(weakref.ref(state.trainer))

    def counted(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(trainer() is not None for trainer in trainers))
        return train(*args, **kwargs)

    monkeypatch.setattr("deat_rb.runs.train.train", counted)
    options = make_options({**SMALL, "epochs": 1})
    with TrainingProgress(seeds=(3, 4, 5)) as progress:
        train_seeds(options, [3, 4, 5], output=tmp_path, callbacks=[Keeps(), progress])
    assert len(trainers) == 3
    assert alive == [0, 0, 0]


def test_train_seeds_refuses_a_seed_twice(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r"--seeds 1,1 has 1 twice: remove the duplicates$"):
        train_seeds(make_options(SMALL), [1, 1], output=tmp_path)
