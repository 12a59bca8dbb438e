"""Files that describe studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from deat_rb.reproduction.study import Evaluation, Study, expand, merge, read_study
from deat_rb.utils.errors import DeatError

FILE = """
title = "Step sizes"
seeds = [0, 3]
[options]
dataset = "digits"
epochs = 4
[grid]
method = ["u-fgsm", "m+u-fgsm"]
alpha = ["12/255", "14/255"]
[[runs]]
method = "PGD-7"
label = "the baseline"
epochs = 5
[evaluation]
attacks = "fgsm,pgd-20"
n_examples = 100
autoattack = 20
"""


def test_read_study_expands_grid_list_and_seeds(tmp_path: Path) -> None:
    path = tmp_path / "alphas.toml"
    path.write_text(FILE)
    study = read_study(path)
    assert (study.name, study.title) == ("alphas", "Step sizes")
    described = [(run.label, run.seed, run.options.optim.epochs) for run in study.runs]
    assert described == [
        ("u-fgsm, alpha 12/255", 0, 4), ("u-fgsm, alpha 12/255", 3, 4),
        ("u-fgsm, alpha 14/255", 0, 4), ("u-fgsm, alpha 14/255", 3, 4),
        ("m+u-fgsm, alpha 12/255", 0, 4), ("m+u-fgsm, alpha 12/255", 3, 4),
        ("m+u-fgsm, alpha 14/255", 0, 4), ("m+u-fgsm, alpha 14/255", 3, 4),
        ("the baseline", 0, 5), ("the baseline", 3, 5),
    ]  # fmt: skip
    assert study.runs[2].options.attack.alpha == pytest.approx(14 / 255)
    assert study.runs[0].evaluation.parts() == ((("fgsm", "pgd-20"), 100), (("autoattack",), 20))
    path = tmp_path / "off.toml"
    path.write_text("[grid]\nmethod = ['pgd-7']\n[evaluation]\nautoattack = false\n")
    assert read_study(path).runs[0].evaluation.autoattack is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[options]\nepochs = 2", "describes no runs"),
        ("[grid]\nmethod = []", "the grid has no value for method"),
        ("[grid]\nmethod = ['pgd-7']\nepoch = [3]", "there is no option epoch: did you mean 'epochs' or"),
        ("[grid]\nmethod = ['pdg-7']", r"there is no method 'pdg-7': did you mean 'pgd-7'"),
        (
            "[options]\nepochs = 'ten'\n[grid]\nmethod = ['pgd-7']",
            "epochs = 'ten' cannot be used: it should be a whole number$",
        ),
        (
            "[options]\ndataset = 'folder'\ndata = 'my-images'\n[grid]\nmethod = ['pgd-7']",
            "data = 'my-images' cannot be used: it should be a table of options$",
        ),
        (
            "[options]\nattack = 'pgd'\neps = '8/255'\n[grid]\nepochs = [1]",
            "attack = 'pgd' cannot be used: it should be a table of options$",
        ),
        (
            "[options]\nno_decay = true\n[grid]\nmethod = ['pgd-7']",
            "no_decay = True cannot be used: 'True' is not a list of names; give names such as norm,bias$",
        ),
        ("[options]\nepochs = 'open'\n[grid]\nmethod = ['pgd-7']", "epochs = open never ends without patience"),
        ("options = 3\n[grid]\nmethod = ['pgd-7']", r"options = 3 cannot be used: it should be a table \[options\]"),
        (
            "[grid]\nmethod = 'pgd-7'",
            r"grid of method = 'pgd-7' cannot be used: it should be a table \[grid\]",
        ),
        ("[runs]\nmethod = 'pgd-7'", r"runs cannot be used: it should be a list of tables \[\[runs\]\]"),
        ("seeds = 3\n[grid]\nmethod = ['pgd-7']", "seeds = 3 cannot be used: it should be a list of whole numbers"),
        ("seeds = [0, 1.5]\n[grid]\nmethod = ['pgd-7']", "seeds = 1.5 cannot be used: it should be a list of whole"),
        ("epochs = 3\n[grid]\nmethod = ['pgd-7']", r"a study has no epochs: options of runs belong into \[options\]"),
        (
            "[grid]\nmethod = ['pgd-7']\n[evaluation]\nattack = 'fgsm'",
            r"\[evaluation\] has no attack: did you mean 'attacks'",
        ),
        (
            "[grid]\nmethod = ['pgd-7']\n[evaluation]\nautoattack = 'all'",
            "autoattack = 'all' cannot be used: it should be true, false, or a positive whole number$",
        ),
        (
            "[grid]\nmethod = ['pgd-7']\n[evaluation]\nn_examples = 20\nautoattack = 0",
            "autoattack = 0 cannot be used: it should be true, false, or a positive whole number$",
        ),
        (
            "[grid]\nmethod = ['standard']\n[[runs]]\nmethod = 'pgd-7'\nlabel = 'standard'",
            "two rows have the label 'standard', but runs of one label are averaged",
        ),
        ("[grid]\nmethod = ['pgd-7', 'PGD-7']", "two rows have the label 'pgd-7', but runs of one label are averaged"),
        (
            "[options]\ndataset = 'folder'\n[grid]\nmethod = ['pgd-7']\ndata_dir = ['a/images', 'b/images']",
            "runs are named by the last part of a path, which a/images and b/images share; rename one of them$",
        ),
        (
            "[grid]\nmethod = ['pgd-7']\n[evaluation]\nn_examples = 0",
            "n_examples = 0 cannot be used: it should be a positive whole number$",
        ),
        ("[grid]\nmethod = ['pgd-7', 'pgd-7']", "two runs have the same options"),
        ("seeds = [1, 1]\n[grid]\nmethod = ['pgd-7']", "is not a list of different seeds"),
        ("[grid]\nseed = [1]", "cannot be an option of a study"),
        ("[grid]\nmethod = ['pgd-7']\n[evaluation]\nattacks = 'pdg-3'", "there is no attack"),
        ("[grids]\nmethod = ['pgd-7']", "a study has no grids: did you mean 'grid'"),
        ("[grid", "is not valid TOML"),
    ],
)
def test_read_study_refuses(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(content)
    with pytest.raises(DeatError, match=message) as caught:
        read_study(path)
    assert str(path) in str(caught.value)


def test_names_depend_only_on_options_that_matter(tmp_path: Path) -> None:
    """Equal options have the same name in every study, on every machine and wherever the data are."""

    def name(**options: object) -> str:
        return expand({}, {}, [{"method": "pgd-7", **options}], [0], Evaluation())[0].name

    folder = {"dataset": "folder", "arch": "wrn-10-1"}
    assert name() == name(device="cpu", save_every=1)
    assert name(alpha="2/255") == name(alpha=2 / 255)
    assert name() != name(epochs=3)
    assert name(**folder, data_dir="/one/birds") == name(**folder, data_dir="two/birds")
    assert name(**folder, data_dir="birds") != name(**folder, data_dir="cars")


def test_merge_trains_a_run_of_two_studies_once() -> None:
    def study(name: str, methods: list[str], *attacks: str) -> Study:
        return Study(name, name, expand({}, {"method": methods}, [], [0], Evaluation(attacks)))

    both = merge([study("a", ["pgd-7", "free-4"], "fgsm"), study("b", ["free-4", "free-8"], "pgd-20")], "all", "All")
    assert [(run.label, run.evaluation.attacks) for run in both.runs] == [
        ("pgd-7", ("fgsm",)), ("free-4", ("fgsm", "pgd-20")), ("free-8", ("pgd-20",)),
    ]  # fmt: skip
