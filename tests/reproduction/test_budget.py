"""The choice of a method for a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from training_problems import ARCH

from deat_rb.cli import main
from deat_rb.methods.registry import recipe
from deat_rb.reproduction import budget as budgets
from deat_rb.reproduction.budget import Budget, Measured, NetworkTable, Table, Tables, choose, parse_budget, read_tables
from deat_rb.reproduction.estimate import Times, seconds_of
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import TrainingPlan, plan
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError


def row(
    method: str, epochs: int, passes: float, robust: float, last_epoch: float | None = None, **options: Any
) -> Measured:
    return Measured(options={"method": method, "epochs": epochs, **options}, passes=passes, last_epoch=last_epoch,
                    natural=80, robust=robust, source="here")  # fmt: skip


def of(*tables: Table, other_networks: tuple[NetworkTable, ...] = ()) -> Tables:
    return Tables(schema_version=3, tables=tables, other_networks=other_networks)


TABLE = Table(
    data="made-up images", attack="AutoAttack",
    rows=(row("n-fgsm", 10, 20, 40, ema=0.99), row("free-4", 10, 40, 45), row("pgd-7", 10, 80, 44),
          row("trades", 30, 330, 50, setting="standard")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "given", "method", "epochs"),
    [
        (20, {}, "n-fgsm", 10),
        (39, {}, "n-fgsm", 19),
        (40, {}, "free-4", 10),
        (60, {}, "free-4", 15),
        (100, {}, "free-4", 20),  # 25 would be more than twice the epochs
        (330, {}, "trades", 30),
        (330, {"setting": "fast"}, "free-4", 20),
        (100, {"method": "PGD-7"}, "pgd-7", 12),
        (40, {"method": "pgd-7"}, "pgd-7", 5),
        (5, {}, "n-fgsm", 2),
    ],
)
def test_choose_takes_the_most_robust_run_within_the_budget(
    passes: float, given: dict[str, Any], method: str, epochs: int
) -> None:
    chosen = choose(Budget(passes, "passes"), given, tables=of(TABLE))
    assert recipe(chosen.options["method"])[0] == method
    assert chosen.options["epochs"] == epochs
    assert chosen.reasons[0].startswith(f"{method}, {epochs} epochs: the ")
    measured = next(each for each in TABLE.rows if each.method == method)
    assert any("which were not measured" in reason for reason in chosen.reasons) is (epochs != measured.epochs)
    assert "AutoAttack" in chosen.reasons[1]


def test_choose_keeps_given_options_and_the_row_gives_the_others() -> None:
    options = choose(Budget(20, "passes"), {"ema": 0.5, "seed": 3}, tables=of(TABLE)).options
    assert options == {"method": "n-fgsm", "epochs": 10, "ema": 0.5, "seed": 3}
    assert choose(Budget(20, "passes"), {}, tables=of(TABLE)).options["ema"] == 0.99


def test_choose_counts_the_passes_of_given_options() -> None:
    """PGD-20 takes 21 passes per epoch, so that a budget for 5 epochs of PGD-7, 40 passes, is one for 1."""
    chosen = choose(Budget(40, "passes"), {"method": "pgd-7", "steps": 20}, tables=of(TABLE))
    assert chosen.options["epochs"] == 1
    assert chosen.reasons[-1] == "measured without your --steps, which may change these accuracies"
    assert choose(Budget(40, "passes"), {"method": "pgd-7"}, tables=of(TABLE)).options["epochs"] == 5
    for ema, said in ((0.99, False), (0.5, True)):
        reasons = choose(Budget(20, "passes"), {"ema": ema, "seed": 3}, tables=of(TABLE)).reasons
        assert ("measured without your --ema, which may change these accuracies" in reasons) is said


def test_choose_raises_guided_epochs_by_the_passes_of_the_last_one() -> None:
    """M-DEAT took 35 passes in 12 epochs and 4 in the last one; steps never fall, so 59 passes allow 6 more epochs."""
    table = Table(data="made-up images", attack="CW-20",
                  rows=(row("m-deat", 12, 35, 50, last_epoch=4),))  # fmt: skip
    for passes, epochs in ((34, 11), (35, 12), (38, 12), (39, 13), (58.9, 17), (59, 18), (1000, 24)):
        assert choose(Budget(passes, "passes"), {}, tables=of(table)).options["epochs"] == epochs
    said = "further epochs are counted with 4 passes each; if the steps rise, the run takes more than 59 passes"
    assert said in choose(Budget(59, "passes"), {}, tables=of(table)).reasons
    assert not any("further epochs" in each for each in choose(Budget(38, "passes"), {}, tables=of(table)).reasons)


def test_choose_leaves_out_methods_that_refuse_a_given_option() -> None:
    """FREE-4 cannot use AWP; with it N-FGSM takes 3 passes per epoch, so 40 passes allow 13 epochs."""
    chosen = choose(Budget(40, "passes"), {"awp": "0.005", "arch": ARCH}, tables=of(TABLE))
    assert (chosen.options["method"], chosen.options["epochs"]) == ("n-fgsm", 13)
    assert "left out free-4, which your options exclude" in chosen.reasons
    assert "measured without your --arch" not in " ".join(chosen.reasons)
    with pytest.raises(DeatError, match=r"the method free-4 cannot use awp: each of its passes serves both"):
        choose(Budget(40, "passes"), {"awp": 0.005, "method": "free-4"}, tables=of(TABLE))
    with pytest.raises(DeatError, match=r"--eps = '9/5' cannot be used|eps"):
        choose(Budget(40, "passes"), {"eps": "9/5"}, tables=of(TABLE))


def test_choose_compares_values_and_not_their_spelling() -> None:
    reasons = choose(Budget(20, "passes"), {"ema": "0.990", "seed": "3"}, tables=of(TABLE)).reasons
    assert not any("measured without" in each for each in reasons)
    reasons = choose(Budget(20, "passes"), {"ema": "0.5"}, tables=of(TABLE)).reasons
    assert "measured without your --ema, which may change these accuracies" in reasons


@pytest.mark.parametrize(
    ("given", "rate"),
    [({}, 0.05), ({"optimizer": "sgd"}, 0.05), ({"lr_schedule": "flat"}, 0.05), ({"optimizer": "adamw"}, 0.001),
     ({"lr_schedule": "cyclic"}, 0.1), ({"optimizer": "adamw", "lr": 0.01}, 0.01)],
)  # fmt: skip
def test_choose_keeps_a_learning_rate_only_with_its_optimizer_and_schedule(given: dict[str, Any], rate: float) -> None:
    """The fast setting's peak is 0.1 in the paper; AdamW's default is 0.001."""
    table = Table(data="made-up images", attack="CW-20",
                  rows=(row("n-fgsm", 30, 60, 50, lr_schedule="flat", lr=0.05),))  # fmt: skip
    options = choose(Budget(60, "passes"), {"arch": ARCH, "dataset": "cifar10", **given}, tables=of(table)).options
    assert resolve(make_options(options)).optim.lr == rate


def test_choose_names_the_default_method_of_a_setting_without_measured_runs() -> None:
    """M+TRADES takes at most 2 and 3 passes in its first two epochs."""
    chosen = choose(
        Budget(6, "passes"), {"setting": "standard", "arch": ARCH, "train_size": 64, "val_size": 16, "batch_size": 32},
        tables=of(Table(data="made-up images", attack="CW-20", rows=TABLE.rows[:1])),
    )  # fmt: skip
    assert chosen.options["epochs"] == 2
    assert chosen.reasons[0].startswith("m+trades, 2 epochs: as many as fit 6 passes")


@pytest.mark.parametrize(
    ("method", "epochs"), [("mart", 4), ("m+trades", 5), ("free-3", 15), ("gradalign", 11), ("liet", 19)]
)
def test_choose_gives_an_unmeasured_method_the_epochs_that_it_can_have(method: str, epochs: int) -> None:
    """MART takes 11 passes per epoch, FREE-3 3, M+TRADES at most 2, 3, ... and 11: 2 + 3 + 4 + 5 + 6 = 20 in five.

    GradAlign takes 4; LIET 2 for each of the two batches, and 10/32 of one for the ten classes: 2.16.
    """
    budget = Budget({"m+trades": 22, "liet": 42}.get(method, 45), "passes")
    given = {"method": method, "arch": ARCH, "train_size": 64, "val_size": 16, "batch_size": 32}
    chosen = choose(budget, given, tables=of(TABLE))
    assert chosen.options["epochs"] == epochs
    assert "there is no measured run" in chosen.reasons[0]


@pytest.mark.parametrize(
    ("amount", "given", "message"),
    [
        (1, {}, "--budget is too small: an epoch of n-fgsm takes 2 passes, but the budget is 1 pass; give more"),
        (40, {"epochs": 5}, "--epochs 5 and --budget exclude each other; give only one"),
        (40, {"epochs": "open"}, "--epochs open and --budget exclude each other"),
        (
            5,
            {"method": "mart", "arch": ARCH},
            "--budget is too small: an epoch of mart takes more than 5 passes",
        ),
    ],
)
def test_choose_refuses(amount: float, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        choose(Budget(amount, "passes"), given, tables=of(TABLE))


def test_choose_refuses_a_method_of_unknown_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingPlan, "cost_bounds", lambda self: None)
    with pytest.raises(DeatError, match="the cost of mart is not known in advance: give --epochs instead of --budget"):
        choose(Budget(90, "passes"), {"method": "mart", "arch": ARCH}, tables=of(TABLE))


def test_choose_by_time_measures_what_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay takes 1 s, an attack step 0.5 s and an update 1.5 s: over 2 batches FREE-4 takes 80 s, N-FGSM 40 s.

    Validation takes 14 passes of 16/32 of a batch per epoch, at 0.01 s: 0.07 s, and twice that with averaged weights.
    """
    times = {True: Times(0.0, 1.0, 0.01), False: Times(1.5, 0.5, 0.01)}
    monkeypatch.setattr(
        "deat_rb.reproduction.estimate.Clock.times", lambda self, planned: times["free" in planned.config.attack.method]
    )
    given = {"arch": ARCH, "train_size": 64, "val_size": 16, "batch_size": 32}
    planned = plan(make_options({**given, "method": "free-4", "epochs": 10}))
    assert seconds_of(planned, times[True], 80) == pytest.approx(80.7)
    averaged = plan(make_options({**given, "method": "n-fgsm", "epochs": 10, "ema": 0.99}))
    assert seconds_of(averaged, times[False], 40) == pytest.approx(20 * 0.5 + 20 * 1.5 + 1.4)
    for seconds, method, epochs in ((80, "n-fgsm", 19), (81, "free-4", 10), (122, "free-4", 15)):
        chosen = choose(Budget(seconds, "seconds"), given, tables=of(TABLE))
        assert (chosen.options["method"], chosen.options["epochs"]) == (method, epochs)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("40", (40, "passes")), ("2.5", (2.5, "passes")), ("90s", (90, "seconds")), ("30m", (1800, "seconds")),
     ("1.5 h", (5400, "seconds"))],
)  # fmt: skip
def test_parse_budget(text: str, budget: tuple[float, str]) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["0", "-3", "", "m", "30min", "inf", "1e3", "4,0", "0m", "٣"])
def test_parse_budget_refuses(text: str) -> None:
    with pytest.raises(DeatError, match="is not a budget; give passes over the training images such as 40, or a time"):
        parse_budget(text)


def test_choose_takes_the_first_table_with_the_method() -> None:
    """A second table, whose accuracies are higher because its data are easier, serves for its own methods only."""
    easier = Table(
        data="easier images", attack="CW-20", rows=(row("mart", 10, 110, 70, ema=0.5), row("free-4", 10, 40, 90))
    )
    tables = of(TABLE, easier)
    assert choose(Budget(110, "passes"), {}, tables=tables) == choose(Budget(110, "passes"), {}, tables=of(TABLE))
    given = {"method": "free-4"}
    assert choose(Budget(40, "passes"), given, tables=tables) == choose(Budget(40, "passes"), given, tables=of(TABLE))
    chosen = choose(Budget(55, "passes"), {"method": "mart"}, tables=tables)
    assert chosen.options == {"method": "mart", "epochs": 5, "ema": 0.5}
    assert "(easier images; here)" in chosen.reasons[1]
    # No method of the first table takes beta.
    fast = Table(data="made-up images", attack="AutoAttack", rows=TABLE.rows[:3])
    chosen = choose(Budget(110, "passes"), {"beta": 4, "arch": ARCH}, tables=of(fast, easier))
    assert (chosen.options["method"], chosen.options["epochs"]) == ("mart", 10)
    assert "left out free-4, n-fgsm, pgd-7, which your options exclude" in chosen.reasons


def test_choose_names_a_method_that_is_more_accurate_on_clean_images() -> None:
    accurate = Measured(
        options={"method": "m-deat", "epochs": 11}, passes=32, last_epoch=4, natural=85.5, robust=39, source="here"
    )
    weak = row("standard", 9, 9, 0)
    rows = (*TABLE.rows[:2], weak.model_copy(update={"natural": 95.0}), accurate)
    table = Table(data="made-up images", attack="CW-20", rows=rows)
    said = "more accurate on clean images and less robust: --method m-deat (natural 85.5 %, CW-20 39 % with 32 passes)"
    for passes, given, is_said in ((31, {}, False), (32, {}, True), (40, {}, True), (40, {"method": "n-fgsm"}, False)):
        assert (said in choose(Budget(passes, "passes"), given, tables=of(table)).reasons) is is_said


def test_choose_names_what_the_same_options_reached_with_the_network_that_is_trained() -> None:
    """Other networks do not decide, however robust they are, and runs with other options are not named."""
    rows = (row("n-fgsm", 10, 22, 55, ema=0.99), row("free-4", 10, 40, 99, ema=0.5))
    other = NetworkTable(arch=ARCH, data="small network", attack="CW-20", rows=rows)
    for passes, epochs, arch, is_said in (
        (20, 10, ARCH, True), (26, 13, ARCH, True), (20, 10, "preactresnet18", False), (40, 10, ARCH, False),
    ):  # fmt: skip
        given = {"arch": arch}
        chosen = choose(Budget(passes, "passes"), given, tables=of(TABLE, other_networks=(other,)))
        expected = choose(Budget(passes, "passes"), given, tables=of(TABLE))
        assert (chosen.options, chosen.options["epochs"]) == (expected.options, epochs)
        said = (
            "measured with 10 epochs, --ema 0.99, 22 passes: natural 80 %, CW-20 55 % (small network; here)",
        ) * is_said  # fmt: skip
        assert chosen.reasons == (*expected.reasons[:2], *said, *expected.reasons[2:])


def test_other_networks_that_come_with_deat_rb_have_runs_with_the_options_of_others() -> None:
    tables = read_tables()
    options = [row.options for table in tables.tables for row in table.rows]
    for network in tables.other_networks:
        assert resolve(make_options({"arch": network.arch})).model.arch == network.arch
        assert all(row.options in options for row in network.rows)


def test_tables_that_come_with_deat_rb_have_known_methods_and_options() -> None:
    tables = read_tables().tables
    for each in (row for table in tables for row in table.rows):
        assert recipe(each.method)[0] == each.method
        options = make_options(each.options)
        assert options.optim.epochs == each.epochs
        assert each.passes >= each.epochs
        guided = recipe(each.method)[1].guided
        assert (each.last_epoch is not None and each.last_epoch > each.passes / each.epochs) is guided
    methods = [{each.method for each in table.rows} for table in tables]
    assert sum(map(len, methods)) == len(set.union(*methods)), "the first table with a method decides"


@pytest.mark.parametrize(
    ("passes", "method", "epochs", "schedule"),
    [
        (30, "n-fgsm", 15, None),
        (33, "n-fgsm", 16, None),
        (34, "m-deat", 11, None),
        (36, "n-fgsm", 18, "flat"),
        (60, "n-fgsm", 30, "flat"),
    ],
)
def test_choose_takes_what_was_most_robust_on_all_images(
    passes: float, method: str, epochs: int, schedule: str | None
) -> None:
    """As docs/lab/recipes.md says under "For a budget"."""
    chosen = choose(Budget(passes, "passes"), {})
    assert (chosen.options["method"], chosen.options["epochs"], chosen.options.get("lr_schedule")) == (
        method, epochs, schedule,
    )  # fmt: skip


def test_train_budget_prints_and_records_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "read_tables", lambda: of(TABLE))
    command = ["train", "--budget", "4", "--arch", ARCH, "--train-size", "64", "--val-size", "16", "--batch-size", "32",
               "--output", str(tmp_path), "--name", "run", "--eps", "0.1"]  # fmt: skip
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "budget     n-fgsm, 2 epochs: the cheapest per epoch of 4 measured runs, all of which" in result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["attack"]["method"], config["optim"]["epochs"], config["optim"]["ema"]) == ("n-fgsm", 2, 0.99)
    for extra in (["--resume", str(tmp_path / "run")], ["--config", str(tmp_path / "run" / "config.json")]):
        refused = CliRunner().invoke(main, ["train", "--budget", "4", *extra])
        assert refused.exit_code == 2
        assert f"--budget cannot be combined with {extra[0]}" in refused.output
