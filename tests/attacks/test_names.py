"""Names of attacks: parsing, canonical spelling, and that nothing is executed."""

from __future__ import annotations

import re

import pytest

from deat_rb.attacks.names import parse_attacks, parse_torchattack, split_names, steps_and_restarts
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("fgsm, pgd-5", ("fgsm", "pgd-5")),
        ("torchattacks.PGD(steps=5, eps=8/255),fgsm", ("torchattacks.PGD(steps=5, eps=8/255)", "fgsm")),
        ("torchattacks.Pixle(x_dimensions=(2, 3),restarts=1)", ("torchattacks.Pixle(x_dimensions=(2, 3),restarts=1)",)),
        ("a),b", ("a)", "b")),
        ("", ("",)),
    ],
)
def test_split_names_ignores_commas_in_parentheses(text: str, names: tuple[str, ...]) -> None:
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("PGD-050x05", "pgd-50x5"),
        ("cw-20x1", "cw-20"),
        ("AutoAttack-Plus", "autoattack-plus"),
        ("autoattack-rand", "autoattack-rand"),
        ("Square", "square"),
        ("noise-Gaussian", "noise-gaussian"),
        ("torchattacks.MIFGSM", "torchattacks.MIFGSM()"),
        ("Torchattacks.PGD(steps= 20,eps = 8/255 )", "torchattacks.PGD(steps=20, eps=8/255)"),
        ("torchattacks.PGD(eps=0.03)", "torchattacks.PGD(eps=0.03)"),
        ("torchattacks.Pixle(x_dimensions=[2, 3])", "torchattacks.Pixle(x_dimensions=(2, 3))"),
        ("torchattacks.UPGD(loss='ce', random_start=True)", "torchattacks.UPGD(loss='ce', random_start=True)"),
    ],
)
def test_parse_attacks_returns_canonical_names(given: str, spelled: str) -> None:
    assert parse_attacks([given]) == ("natural", spelled)
    assert parse_attacks([spelled]) == ("natural", spelled)


def test_steps_and_restarts_splits_a_name() -> None:
    assert steps_and_restarts("pgd-50x5") == ("pgd", 50, 5)
    assert steps_and_restarts("cw-20") == ("cw", 20, 1)


def test_settings_prefers_written_arguments_then_known_then_defaults() -> None:
    settings = parse_torchattack("torchattacks.PGD(steps=3, alpha=2/255)").settings(eps=0.1, seed=7)
    assert settings == {"eps": 0.1, "alpha": 2 / 255, "steps": 3, "random_start": True}
    assert parse_torchattack("torchattacks.PGD(eps=4/255)").settings(eps=0.1)["eps"] == 4 / 255
    assert parse_torchattack("torchattacks.APGDT").settings(n_classes=4, norm="L2")["n_classes"] == 4


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("torchattacks.PGD()", 0.025),  # 2/255 of 8/255
        ("torchattacks.MIFGSM(steps=20)", 0.025),
        ("torchattacks.FFGSM()", 0.125),  # 10/255 of 8/255
        ("torchattacks.PGDL2()", 0.02),  # 0.2 of 1
        ("torchattacks.PGD(eps=0.2)", 0.05),
        ("torchattacks.PGD(alpha=0.01)", 0.01),
    ],
)
def test_settings_scale_the_step_with_eps(text: str, alpha: float) -> None:
    assert parse_torchattack(text).settings(eps=0.1)["alpha"] == pytest.approx(alpha, rel=1e-12)


def test_settings_at_the_default_eps_are_the_defaults() -> None:
    for text in ("torchattacks.PGD", "torchattacks.DIFGSM", "torchattacks.Jitter"):
        assert parse_torchattack(text).settings(eps=8 / 255)["alpha"] == 2 / 255
    assert "alpha" not in parse_torchattack("torchattacks.APGD").settings(eps=0.1)


@pytest.mark.parametrize(
    ("text", "norm", "wanted"),
    [
        ("torchattacks.PGDL2(steps=10)", "Linf", r"PGDL2\(steps=10\) attacks in L2, but the evaluation is in Linf: use "
         r"an attack in Linf, such as torchattacks\.PGD, or"),
        ("torchattacks.PGDRSL2", "Linf", "attacks in L2, but"),
        ("torchattacks.PGD", "L2", r"attacks in Linf, but the evaluation is in L2: .* such as torchattacks\.PGDL2, or"),
        ("torchattacks.PIFGSM", "L2", "attacks in Linf, but"),
        ("torchattacks.APGD(norm='L2')", "Linf", "attacks in L2, but"),
        ("torchattacks.FAB(norm='L1')", "L2", "attacks in L1, but"),
    ],
)  # fmt: skip
def test_check_norm_refuses_an_attack_in_another_norm(text: str, norm: str, wanted: str) -> None:
    with pytest.raises(DeatError, match=wanted):
        parse_torchattack(text).check_norm(norm)


def test_check_norm_accepts_the_norm_of_the_evaluation_and_attacks_without_a_radius() -> None:
    for text in ("torchattacks.PGD", "torchattacks.Square", "torchattacks.DeepFool"):
        parse_torchattack(text).check_norm("Linf")
    for text in ("torchattacks.PGDL2", "torchattacks.APGD", "torchattacks.DeepFool"):
        parse_torchattack(text).check_norm("L2")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("pgd-5x0", "attack 'pgd-5x0' has 0 starts; give 1 or more, such as pgd-5x5"),
        ("noise", "there is no attack 'noise': did you mean 'noise-uniform'"),
        ("torchattacks.mifgsm(steps=2)", "torchattacks.mifgsm does not exist: did you mean 'MIFGSM'"),
        ("torchattacks.os", "torchattacks.os does not exist"),
        ("torchattacks.LGV(epochs=1)", "torchattacks.LGV needs arguments besides the model, so it cannot be used here"),
        ("torchattacks.MultiAttack()", "torchattacks.MultiAttack needs arguments besides the model"),
        ("torchattacks.PGD(step=2)", "torchattacks.PGD has no argument 'step': did you mean 'steps'"),
        ("torchattacks.PGD(model=1)", "torchattacks.PGD has no argument 'model'"),
        ("torchattacks.PGD(2)", "cannot be read: write torchattacks.NAME(argument=value, ...)"),
        ("torchattacks.PGD(steps=2", "cannot be read"),
        ("torchattacks.PGD(steps=2).x(eps=1)", "cannot be read"),
        ("torchattacks.PGD(steps=2)(eps=1)", "cannot be read"),
        ("torchattacks.PGD(**{'steps': 2})", "write out its arguments instead of using **"),
        ("torchattacks.PGD(steps=2, steps=3)", "has an argument twice"),
        ("torchattacks.PGD(eps=1/0)", "has the invalid value 1/0: values must be numbers, fractions"),
        ("torchattacks.PGD(eps=1e999)", "has eps=inf: give a number that is 0 or more"),
        ("torchattacks.PGD(eps=-8/255)", "has eps=-0.03137254901960784: give a number that is 0 or more"),
        ("torchattacks.PGD(steps=0)", "has steps=0: give a number that is 1 or more"),
        ("torchattacks.PGD(steps=-1)", "has steps=-1: give a number that is 1 or more"),
        ("torchattacks.Jitter(scale=-1e999)", "has scale=-inf: give a number that is finite"),
        ("torchattacks.PGD(steps=1" + "0" * 400 + ")", "give a number that is 1 or more"),
        ("torchattacks.PGD(eps=1" + "0" * 400 + "/3)", "values must be numbers, fractions such as 8/255, quoted"),
        ("torchattacks.PGD(eps=" + "-" * 900 + "1)", "values must be numbers, fractions such as 8/255, quoted"),
        ("torchattacks.PGD(eps=2**9)", "has the invalid value 2**9: values must be numbers"),
        ("torchattacks.PGD(eps={'a': 1})", "values must be numbers, fractions such as 8/255, quoted"),
        ("torchattacks.PGD(eps=" + "(" * 300 + ")" * 300 + ")", "cannot be read"),
    ],
)
def test_parse_attacks_refuses_invalid_names(given: str, sentence: str) -> None:
    with pytest.raises(DeatError, match=re.escape(sentence)):
        parse_attacks([given])


def test_parse_torchattack_executes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("print(1)", "__import__('os').getpid()", "[print(1)]", "(lambda: 1)()"):
        with pytest.raises(DeatError, match="values must be numbers, fractions"):
            parse_attacks([f"torchattacks.PGD(steps={value})"])
    assert capsys.readouterr().out == ""
