"""Stages that train and evaluate networks on a folder of CIFAR-10 images (JPEG): Table 1, and CPU against GPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from deat_rb import create, evaluate, load_data, load_model
from deat_rb.data.batches import Batches
from deat_rb.data.datasets import Dataset
from deat_rb.data.images import ImageSet, subset, train_val_split
from deat_rb.data.statistics import DatasetStatistics
from deat_rb.evaluation.report import Report
from deat_rb.methods.registry import recipe
from deat_rb.models.spec import model_spec
from deat_rb.runs.defaults import setting_defaults
from deat_rb.utils import seeding

ENTRY = "leaderboard/entries/cifar10-jpeg/Linf/Wang2021Gradient_M-DEAT_WRN-10-1.json"


def decode(session: Session) -> None:
    """Decode the images and cache them as tensors for later stages of the same folder."""
    _data(session)


def _data(session: Session) -> Dataset:
    cache, folder = session.options.cache, str(Path(session.options.data).resolve())
    if cache.exists() and (saved := torch.load(cache, weights_only=True)).get("folder") == folder:
        train, test = (ImageSet(saved[f"{part}_images"], saved[f"{part}_labels"]) for part in ("train", "test"))
        statistics = DatasetStatistics(saved["fingerprint"], saved["mean"], saved["std"])
        return Dataset("folder", train, test, saved["classes"], statistics)
    began = time.monotonic()
    data = load_data("folder", data_dir=session.options.data)
    parts = {f"{part}_{name}": getattr(getattr(data, part).in_memory(), name)
             for part in ("train", "test") for name in ("images", "labels")}  # fmt: skip
    rest = {name: getattr(data, name) for name in ("classes", "mean", "std", "fingerprint")}
    partial = cache.with_suffix(".tmp")
    torch.save({"folder": folder, **parts, **rest}, partial)
    partial.replace(cache)  # so that a stage that is ended leaves no damaged file
    seconds = round(time.monotonic() - began, 1)
    session.record("decode", seconds=seconds, train=len(data.train), test=len(data.test), sha256=data.fingerprint)
    return data


def _expected_passes(method: str, epochs: int) -> int:
    """Return the approximate number of backward passes per batch of a whole training."""
    per_epoch = {"pgd-7": 8, "u-fgsm": 2, "free-4": 4, "free-8": 8}
    return per_epoch[method] * epochs if method in per_epoch else 36


def table1(session: Session) -> None:
    """Train each method of the paper's Table 1 (fast setting), and evaluate it on the first test images.

    Methods that would exceed the remaining time budget are skipped and recorded as such.
    """
    options = session.options
    data = _data(session)
    train, val = train_val_split(data.train, options.val_size, seed=0)
    if options.train_size:
        train = subset(train, options.train_size, 0)
    spec = model_spec(options.arch, num_classes=len(data.classes), image_size=32, mean=data.mean, std=data.std)
    batches = Batches(train, options.batch_size, shuffle=True, augmentation="crop-flip", seed=0, device=session.device,
                      memory_format=torch.channels_last)  # fmt: skip
    stop_batch = Batches(val.first(min(128, len(val))), 128, device=session.device)
    per_pass = 0.0
    for name in options.methods.split(","):
        method, row = recipe(name)
        settings = setting_defaults("fast", row, options.arch)
        epochs = options.epochs or settings["epochs"]
        expected = _expected_passes(method, epochs) * per_pass * len(batches)
        if expected * 1.15 + 12 > session.seconds_left():
            session.record("table1", method=method, left_out=f"{expected:.0f} s of {session.seconds_left():.0f} s left")
            continue
        with session.recording_failure("table1", method=method):
            with seeding.preserved():
                seeding.seed_global(0, "weights")
                model = spec.build()
            trainer = create(method, model, gamma=settings.get("gamma"))
            began = time.monotonic()
            history = trainer.fit(
                batches, stop_batch if trainer.stopping else None, epochs=epochs, lr=settings["lr"],
                lr_schedule=settings["lr_schedule"], device=session.device, precision=options.precision,
                select="last", seed=0, compile=options.compile, ema=options.ema,
            )  # fmt: skip
            seconds = sum(row.seconds for row in history.rows)
            per_pass = seconds / history.backwards
            session.record(
                "table1",
                method=method,
                epochs=epochs,
                steps=history.steps,
                backwards=round(history.backwards),
                seconds=round(seconds, 1),
                wall=round(time.monotonic() - began, 1),
                images_per_s=[round(row.images_per_second) for row in history.rows],
                l_x=[round(row.l_x) for row in history.rows],
                train_acc=[round(row.train_acc, 4) for row in history.rows],
                loss=[round(row.loss, 4) for row in history.rows],
                peak_MiB=max(row.peak_memory for row in history.rows) >> 20,
                gamma=settings.get("gamma"),
                stopped=history.stopped,
                train_images=len(train),
            )
            session.trained[method] = model.eval()
            _evaluate(session, method, options.test_size, "table1-eval")


def test_images(session: Session, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images (N, C, H, W) in [0, 1] and their labels (N,)."""
    test = _data(session).test
    return test.first(min(count, len(test))).tensors()


def _evaluate(session: Session, method: str, count: int, stage: str) -> None:
    images, labels = test_images(session, count)
    model = session.trained[method].to(session.device)
    began = time.monotonic()
    report = evaluate(model, images, labels, attacks=session.options.attacks.split(","), eps=8 / 255,
                      batch_size=session.options.eval_batch, device=session.device, keep_adversarial=False)  # fmt: skip
    session.record(
        stage,
        method=method,
        images=len(images),
        seconds=round(time.monotonic() - began, 1),
        **{name: round(100 * result.accuracy, 2) for name, result in report.results.items()},
        **costs(report),
    )


def costs(report: Report) -> dict[str, dict[str, float]]:
    """Return the seconds, the energy and the peak memory of each attack of a report, as far as they were measured."""
    results = report.results.items()
    return {
        "attack_seconds": {name: round(each.seconds, 2) for name, each in results},
        "kWh": {name: round(each.energy_kwh, 6) for name, each in results if each.energy_kwh is not None},
        "peak_MiB": {name: each.peak_memory >> 20 for name, each in results if each.peak_memory is not None},
    }


def full(session: Session) -> None:
    """Evaluate the networks of ``table1`` on all test images."""
    for method in session.trained:
        _evaluate(session, method, session.options.full_size, "full-eval")


def parity(session: Session) -> None:
    """Compare verdicts on the device with those on the CPU, example by example, in float32 and TF32."""
    images, labels = test_images(session, session.options.parity_size)
    model = load_model(ENTRY)
    reference = None
    for device, tf32 in (("cpu", False), (session.options.device, False), (session.options.device, True)):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            began = time.monotonic()
            verdicts = evaluate(model, images, labels, attacks=("fgsm", "pgd-20", "cw-20"), eps=8 / 255,
                                batch_size=100, device=device, keep_adversarial=False).verdicts  # fmt: skip
        finally:
            torch.backends.cudnn.allow_tf32 = before
        reference = reference or verdicts
        session.record(
            "parity",
            device=device,
            precision="tf32" if tf32 else "fp32",
            seconds=round(time.monotonic() - began, 1),
            differing={name: int((verdicts[name] != reference[name]).sum()) for name in reference},
            robust={name: int(verdicts[name].sum()) for name in reference},
        )
