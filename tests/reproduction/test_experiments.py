"""The paper's experiments as data."""

from __future__ import annotations

from pathlib import Path

import pytest
from noise_folder import make_folder

from deat_rb.reproduction.experiments import (
    EVERYWHERE,
    Setup,
    chosen_targets,
    differences,
    experiments,
    part_runs,
    published,
    target_study,
)
from deat_rb.reproduction.planning import Planner, check_evaluation
from deat_rb.reproduction.results import MINUTES, PASSES
from deat_rb.reproduction.study import merge
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError

TABLES = [name for name in experiments().targets if name.startswith("table")]


@pytest.mark.parametrize("name", list(experiments().targets))
@pytest.mark.parametrize("scale", list(experiments().scales))
def test_options_of_all_runs_are_valid(name: str, scale: str) -> None:
    setup = Setup(scale, seeds=(0,))
    for run in target_study(name, setup).runs:
        resolve(run.options)
    for label in (label for panel in experiments().targets[name].panels for label in panel):
        assert label in {run.label for run in target_study(name, setup).runs}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_the_papers_values_and_they_satisfy_its_claims(name: str) -> None:
    """The paper's minutes stand for backward passes, which it does not report."""
    target = experiments().targets[name]
    setup = Setup("paper")
    for number in range(len(target.parts)):
        assert published(name, number).keys() >= {run.label for run in part_runs(setup, target, number)}
    for claim in target.claims:
        values = published(name, claim.part)
        column = MINUTES if claim.column == PASSES else claim.column
        for high in claim.more:
            for low in claim.less:
                assert values[high][column].mean > values[low][column].mean, claim.text


def test_published_values_are_the_papers() -> None:
    """Typed from the paper: Tables 4, 5 and 7, and AutoAttack of its later version."""
    row = published("table4", 0)["m+trades"]
    assert {column: value.mean for column, value in row.items()} == {
        "natural": 80.26, "fgsm": 55.69, "pgd-100": 51.19, "cw-20": 48.57, "minutes": 336.1, "autoattack": 47.52,
    }  # fmt: skip
    assert published("table5", 2)["u-fgsm"]["pgd-100"].mean == 45.77
    row = published("table7", 0)["u-fgsm, alpha 18/255"]
    assert [(value.mean, value.deviation) for value in row.values()] == [
        (72.92, 0.9), (39.35, 4.2), (16.6, 2), (14.2, 1.3),
    ]  # fmt: skip


def test_paper_scale_is_the_papers_setting() -> None:
    standard = resolve(target_study("table4", Setup("paper")).runs[0].options)
    assert (standard.model.arch, standard.data.dataset, standard.attack.method) == (
        "preactresnet18",
        "cifar10",
        "free-4",
    )
    assert (standard.optim.epochs, standard.optim.lr, standard.optim.lr_schedule) == (50, 0.05, "multistep")
    flat = resolve(target_study("table7", Setup("paper")).runs[-1].options)
    assert (flat.optim.epochs, flat.optim.lr, flat.optim.lr_schedule) == (30, 0.05, "flat")
    assert flat.attack.alpha == pytest.approx(18 / 255)
    assert [run.seed for run in target_study("table6", Setup("paper")).runs] == [0, 1, 2, 3, 4] * 2
    assert {differences(Setup("paper"), name) for name in experiments().targets} == {EVERYWHERE}


def test_step_sizes_scale_with_eps() -> None:
    """alpha = 12/255 at eps = 8/255 is 1.5 eps."""
    options = target_study("table6", Setup("digits", seeds=(0,))).runs[0].options
    assert options.attack.alpha == pytest.approx(1.5 * options.attack.eps)


def test_differences_name_what_a_scale_changes() -> None:
    said = differences(Setup("digits", seeds=(0,)), "table4")
    assert said.startswith("Not the paper's setting: digits in place of CIFAR-10; deat_rb.models.small:narrow in place")
    assert "1 seed instead of 3" in said
    folder = differences(Setup("paper", dataset="folder", data_dir="x"), "table1")
    assert folder == f"Not the paper's setting: your images in place of CIFAR-10. {EVERYWHERE}"
    some = Setup("paper", autoattack=1000)
    assert "setting: AutoAttack on 1,000 test images instead of all." in differences(some, "table4")
    assert [differences(Setup("paper", autoattack=0), "table4"), differences(some, "figure2")] == [EVERYWHERE] * 2


def test_differences_name_the_test_images_that_a_target_shows() -> None:
    """Figure 7's caption in the paper: "the first 1280 examples of the CIFAR-10 test set"."""
    assert "the first 256 test images instead of 1,280." in differences(Setup("small"), "figure7")
    few = Setup("paper", n_examples=500, curve_test=50)
    assert "setting: the first 50 test images instead of 1,280." in differences(few, "figure7")
    shown = [name for name in experiments().targets if "500 test images instead of all" in differences(few, name)]
    assert shown == [*TABLES, "figure5"]


def test_every_output_says_what_differs_at_all_scales() -> None:
    """Typed from docs/methods.md: validation is not test, and how PGD-100 and CW-20 count."""
    said = differences(Setup("paper"), "table1")
    assert "held out of the training images" in said
    assert "any misclassified iterate" in said


def test_the_scale_small_takes_few_images_of_ones_own(tmp_path: Path) -> None:
    """A folder of 27 training and 6 test images, of which 18 and 6 are used."""
    images = make_folder(tmp_path / "images")
    setup = Setup("small", (0,), "folder", str(images), n_examples=6, train_size=18, batch_size=9, curve_test=6)
    run = target_study("table4", setup).runs[0]
    planned = Planner(dry=True).plan(run.options)
    check_evaluation(run, planned)
    assert (len(planned.train), planned.batches, planned.config.output.curve_test) == (18, 2, 6)
    assert "train size 18, epochs 20, batch size 9 (standard setting)" in differences(setup, "table4")


def test_runs_that_several_targets_need_are_trained_once() -> None:
    setup = Setup("paper", seeds=(0,))
    figures = merge([target_study(name, setup) for name in ("table4", "figure6", "figure7", "figure8")], "", "")
    assert len(figures.runs) == 14  # the 13 rows of Table 4, and U-FGSM of Table 5
    assert len(merge([target_study(name, setup) for name in ("table6", "table7", "figure3")], "", "").runs) == 8 + 1


def test_chosen_targets() -> None:
    assert chosen_targets(["figure2", "table1"]) == ["table1", "figure2"]
    assert len(chosen_targets(["all"])) == 14
    with pytest.raises(DeatError, match="there is no target 'table8': did you mean"):
        chosen_targets(["table8"])
    with pytest.raises(DeatError, match="--scale big does not exist"):
        Setup("big")
