"""Options about the training data: an interrupted and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumed_runs import TIMES, Stops
from safetensors.torch import save_file
from small_image_sets import write_extra
from small_runs import SMALL, identical
from small_runs import planned as small_plan

from deat_rb import create
from deat_rb.data.extra_data import ExtraData, load_extra_data
from deat_rb.leaderboard.training_record import training_command, training_facts
from deat_rb.models.spec import build_model
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import TrainingPlan, plan
from deat_rb.runs.train import resume, train, train_seeds
from deat_rb.training.history import History
from deat_rb.utils.errors import DeatError, Interrupted

pytestmark = pytest.mark.usefixtures("without_curves")


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "trivialaugment"},
        {"augment": "cutout", "method": "m-deat"},
        {"extra_data": "extra.npz", "extra_fraction": 0.4, "method": "free-2"},
        {"method": "m+trades", "norm": "L2", "eps": 0.5, "augment": "autoaugment"},
        {
            "method": "deat-3", "arch": "timm:mobilenetv3_small_050", "pretrained": True, "weights": "net.safetensors",
            "freeze": "conv_stem|blocks.0", "augment": "resized-crop",
        },
        {
            "method": "m+trades", "extra_data": "extra.npz", "class_weights": "balanced", "augment": "randaugment",
            "freeze": "0|1.weight", "ema": 0.9, "awp": 0.01, "label_smoothing": 0.1,
        },
    ],
    ids=["trivialaugment", "cutout", "extra data", "L2, autoaugment", "frozen, resized-crop", "all together"],
)  # fmt: skip
def test_resumed_run_equals_the_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    if "extra_data" in changes:
        changes["extra_data"] = str(write_extra(tmp_path / changes["extra_data"]))
    if "weights" in changes:
        changes["weights"] = str(tmp_path / changes["weights"])
        save_file(build_model(changes["arch"], num_classes=1000).net.state_dict(), changes["weights"])
    options = {**SMALL, **changes}
    plain, _ = train({**SMALL, "method": options["method"]}, output=tmp_path, name="plain")
    whole, _ = train(options, output=tmp_path, name="whole")
    with pytest.raises(Interrupted):
        train(options, output=tmp_path, name="stopped", callbacks=[Stops(3)])
    again, _ = resume(tmp_path / "stopped", {}, trust_code=True)
    assert identical(whole, again)
    assert metrics(whole) == metrics(again)
    assert not identical(whole, plain)
    assert again.config.flat().items() >= changes.items()


def test_metrics_and_plan_say_what_classes_weigh_and_how_accurate_each_is(tmp_path: Path) -> None:
    planned = small_plan(class_weights="balanced", train_size=70)
    counts = torch.bincount(planned.train.labels).tolist()
    text = dict(planned.lines())["weighting"]
    assert text.startswith(f"balanced: {70 / (10 * max(counts)):.3g} ('")
    assert f"to {70 / (10 * min(counts)):.3g} ('" in text
    run, _ = train(planned, output=tmp_path, name="run")
    row = metrics(run)[-1]
    held = torch.bincount(planned.val.labels, minlength=10).tolist()
    assert [each is None for each in row["val_class_acc"]] == [count == 0 for count in held]
    for name in ("", "robust_"):
        by_class = row[f"val_class_{name}acc"]
        total = sum((each or 0) * count for each, count in zip(by_class, held, strict=True)) / sum(held)
        assert total == pytest.approx(row[f"val_{name}acc"])
    with pytest.raises(DeatError, match="--class-weights = 'some' cannot be used: it should be 'none' or 'balanced'"):
        make_options({"class_weights": "some"})


def test_class_weights_in_python_train_the_commands_weights(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    command, _ = train(small_plan(class_weights="balanced", train_size=75), output=tmp_path, name="command")
    own = small_plan(train_size=75)
    weights = compute_class_weight("balanced", classes=np.arange(10), y=own.train.labels.numpy())
    own.trainer = create("pgd-1", own.trainer.model, eps=0.1, class_weights=weights)
    python, _ = train(own, output=tmp_path, name="python")
    assert identical(command, python)
    plain, _ = train(small_plan(train_size=75), output=tmp_path, name="plain")
    assert not identical(command, plain)


def test_run_records_its_extra_data_and_resumes_with_the_same_only(tmp_path: Path) -> None:
    options = {**SMALL, "extra_data": str(write_extra(tmp_path / "extra.npz"))}
    planned = plan(make_options(options))
    assert planned.config.data.extra_fraction == 0.7
    text = dict(planned.lines())["extra data"]
    # 64 images in batches of 32, of which 0.7 are 22.4.
    assert text == ("40 images mapped from extra.npz, 22 in each batch of 32; an epoch is 2 batches, as without them: "
                    "20 training and 44 extra images")  # fmt: skip
    assert dict(planned.lines())["cost"] == dict(small_plan().lines())["cost"]
    with pytest.raises(Interrupted):
        train(planned, output=tmp_path, name="run", callbacks=[Stops(3)])
    run = RunDirectory.open(tmp_path / "run")
    assert run.config.extra_fingerprint == planned.extra.fingerprint if planned.extra else None
    assert run.rows()[0].examples == 64
    assert training_facts(run.config, [])["additional_data"] is True
    assert "--extra-data extra.npz --extra-fraction 0.7" in training_command(run.config)
    (tmp_path / "extra.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(DeatError, match=r"--extra-data .*extra.npz cannot be read"):
        resume(run.path, {}, trust_code=True)
    write_extra(tmp_path / "extra.npz", seed=1)
    with pytest.raises(DeatError, match=r"the images of --extra-data .*extra.npz differ from those of the run"):
        resume(run.path, {}, trust_code=True)
    again, history = resume(run.path, {"extra_data": str(tmp_path / "moved.npz")}, trust_code=True)
    assert len(history.rows) == 2
    assert again.config.data.extra_data == str(tmp_path / "moved.npz")


def test_plan_refuses_extra_data(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r"^--extra-fraction 0.5 requires --extra-data: give both$"):
        small_plan(extra_fraction=0.5)
    with pytest.raises(DeatError, match=r"--extra-fraction = 1\.5 cannot be used"):
        small_plan(extra_data="x.npz", extra_fraction=1.5)
    few = write_extra(tmp_path / "few.npz", count=31)
    with pytest.raises(DeatError, match="31 extra images are fewer than one batch of --batch-size 32"):
        small_plan(extra_data=str(few))
    enough = str(write_extra(tmp_path / "enough.npz", count=40))
    with pytest.raises(DeatError, match=r"^31 training images are fewer than a batch of 32; reduce --batch-size$"):
        small_plan(extra_data=enough, train_size=31)
    small_plan(extra_data=enough, train_size=33)  # without a last batch of one image


def test_cost_of_liet_with_extra_data_is_what_a_run_counts(tmp_path: Path) -> None:
    """Of 21 batches, the first and the last, which extra images fill to 2, take a pass over 10 gray images."""
    extra = str(write_extra(tmp_path / "extra.npz"))
    ready = small_plan(method="liet", train_size=41, batch_size=2, epochs=1, extra_data=extra, extra_fraction=0.5)
    costs = ready.costs()
    assert costs is not None
    assert costs.backwards == 2 * 21 + 10 / 2 + 10 / 2
    _, history = train(ready, output=tmp_path)
    assert [row.backwards for row in history.rows] == [costs.backwards]


def test_train_seeds_reads_the_extra_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a plan made before, as by the command, or of the first seed."""
    loaded: list[ExtraData] = []

    def load(*args: Any, **options: Any) -> ExtraData:
        loaded.append(load_extra_data(*args, **options))
        return loaded[-1]

    trained: list[ExtraData | None] = []

    def counted(each: TrainingPlan, *, output: Path, name: str, **options: Any) -> tuple[RunDirectory, History]:
        trained.append(each.extra)
        return RunDirectory(output / name, each.config), History()

    monkeypatch.setattr("deat_rb.runs.plan.load_extra_data", load)
    monkeypatch.setattr("deat_rb.runs.train.train", counted)
    options = make_options({**SMALL, "extra_data": str(write_extra(tmp_path / "extra.npz"))})
    train_seeds(options, [3, 4], output=tmp_path)
    first = plan(options)
    train_seeds(options, [3, 4], output=tmp_path, data=first.data, extra=first.extra)
    assert len(loaded) == 2
    assert all(each is loaded[number // 2] for number, each in enumerate(trained))
    assert len(trained) == 4
