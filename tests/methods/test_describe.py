"""Methods in words."""

from __future__ import annotations

from typing import Any

import pytest
from paper_table import NOT_IN_THE_PAPER, TABLE

from deat_rb.methods import registry
from deat_rb.methods.describe import describe, explain, markdown_table
from deat_rb.methods.recipes import Recipe
from deat_rb.methods.schedules import GradientMagnitude
from deat_rb.utils.errors import DeatError


def test_describe_names_the_four_choices() -> None:
    row = describe("M+TRADE")
    assert (row.name, row.loss, row.stop) == ("m+trades", "CE(clean) + 6 KL", "-")
    assert row.schedule == "gradient magnitude, at most 10"
    assert row.attack == "steps of 2/255 on KL, start 0.001 N(0,1)"
    assert row.cost == "sum of (r + 1), times M"
    assert "Algorithm 4" in row.paper


NOISE = ", noise 0.001 N(0,1) after each step"

# fmt: off
ATTACKS = [
    ("standard", {}, "none"),
    ("free-8",   {}, "8 replays, alpha = eps, delta carried from batch to batch"),
    ("free-8",   {"steps": 4, "alpha": "4/255"}, "4 replays of 4/255, delta carried from batch to batch"),
    ("free-8",   {"eps": "16/255"}, "8 replays, alpha = eps, delta carried from batch to batch"),
    ("deat-3",   {}, "replays of 10/255, uniform start"),
    ("pgd-7",    {}, "7 steps of 2/255, uniform start"),
    ("pgd-7",    {"steps": 10}, "10 steps of 2/255, uniform start"),
    ("pgd-7",    {"steps": 1}, "one step of 2/255, uniform start"),
    ("pgd-7",    {"steps": 0}, "no step, uniform start"),
    ("trades",   {"steps": 0}, "no step, start 0.001 N(0,1)"),
    ("gradalign", {"steps": 0}, "none"),
    ("pgd-7",    {"eps": 16 / 255}, "7 steps of 4/255, uniform start"),
    ("pgd-7",    {"eps": 16 / 255, "alpha": 1 / 255}, "7 steps of 1/255, uniform start"),
    ("pgd-7",    {"attack_mode": "eval"}, "7 steps of 2/255, uniform start, in eval mode"),
    ("u-fgsm",   {}, "one step of 10/255, uniform start"),
    ("n-fgsm",   {}, "one step of 8/255, uniform start within 2 eps, not projected onto the eps-ball"),
    ("fat-5",    {}, f"5 steps of 2/255, uniform start, FAT's early stop with tau = 3{NOISE}"),
    ("fat-5",    {"omega": 0}, "5 steps of 2/255, uniform start, FAT's early stop with tau = 3"),
    ("f+mart",   {}, "10 steps of 2/255 on KL, start 0.001 N(0,1), FAT's early stop with tau = 3"),
    ("free-8",   {"carry": False}, "8 replays, alpha = eps, delta zero in each batch"),
    ("fat-5",    {"tau": 0}, f"5 steps of 2/255, uniform start, FAT's early stop with tau = 0{NOISE}"),
    ("fat-5",    {"attack_mode": "train"},
     f"5 steps of 2/255, uniform start, FAT's early stop with tau = 3{NOISE}, in train mode"),
    ("m+mart",   {"alpha": 1 / 255}, "steps of 1/255 on CE, start 0.001 N(0,1)"),
    ("yopo-5-3", {}, "5 times 3 steps of 2/255 through the first layer, uniform start"),
    ("amata-2-10", {}, "steps of (20/255)/r"),
    ("amata-3-10", {"eps": "4/255"}, "steps of (10/255)/r"),
    ("amata-2-10", {"steps": 4}, "steps of (20/255)/r"),
    ("amata-2-10", {"steps": 4, "alpha": "10/255"}, "steps of (40/255)/r"),
    ("amata-2-10", {"eps": 0.1}, "steps of 0.25/r"),
]
OTHERS = [
    ("loss",     "pgd-7",    {}, "CE"),
    ("loss",     "trades",   {"beta": 1.5}, "CE(clean) + 1.5 KL"),
    ("loss",     "trades",   {"beta": 0}, "CE(clean)"),
    ("loss",     "trades",   {"label_smoothing": 0.1}, "CE(clean) + 6 KL, label smoothing 0.1"),
    ("loss",     "m-deat",   {"label_smoothing": 0.4}, "CE, label smoothing 0.4"),
    ("loss",     "trades",   {"awp": 0.005}, "CE(clean) + 6 KL, AWP with gamma 0.005"),
    ("loss",     "pgd-7",    {"awp": 0.01, "awp_warmup": 2}, "CE, AWP with gamma 0.01 after 2 epochs"),
    ("cost",     "pgd-7",    {"awp": 0.01, "awp_warmup": 1}, "(7 + 1)MT, and 1 for AWP in each batch after 1 epoch"),
    ("loss",     "mart",     {}, "MART, lambda 6"),
    ("loss",     "mart",     {"beta": 0.0}, "MART, lambda 0"),
    ("schedule", "pgd-7",    {}, "constant"),
    ("schedule", "deat-3",   {}, "one more every 3 epochs"),
    ("schedule", "deat-5",   {"max_steps": 4}, "one more every 5 epochs, at most 4"),
    ("schedule", "deat-3",   {"every": 1}, "one more every epoch"),
    ("schedule", "deat-20%", {"steps": 2}, "one more after an epoch with training accuracy above 20 %, from 2"),
    ("schedule", "m-deat",   {"max_steps": 4, "gamma": 1.2}, "gradient magnitude, at most 4, gamma 1.2"),
    ("schedule", "m+pgd",    {"steps": 3}, "gradient magnitude, from 3, at most 7"),
    ("schedule", "amata-2-10", {"max_steps": 6}, "rises linearly from 2 towards 6 over the epochs"),
    ("cost",     "yopo-5-3", {}, "5MT (and 20MT through the first layer only)"),
    ("cost",     "amata-2-10", {}, "sum of (r + 1), times M"),
    ("stop",     "u-fgsm",   {}, "PGD-5 accuracy drops by over 20 points"),
    ("stop",     "u-fgsm",   {"drop": 0.1}, "PGD-5 accuracy drops by over 10 points"),
    ("stop",     "m+u-fgsm", {}, "l_X surges (m = 2, gamma 1.5)"),
    ("stop",     "m+u-fgsm", {"gamma": 2.0, "m": 3}, "l_X surges (m = 3, gamma 2)"),
    ("cost",     "standard", {}, "MT"),
    ("cost",     "free-4",   {}, "4MT"),
    ("cost",     "free-4",   {"steps": 1}, "MT"),
    ("cost",     "pgd-7",    {}, "(7 + 1)MT"),
    ("cost",     "pgd-7",    {"steps": 10}, "(10 + 1)MT"),
    ("cost",     "u-fgsm",   {}, "2MT"),
    ("cost",     "deat-3",   {}, "sum of r, times M"),
    ("cost",     "fat-5",    {}, "at most (5 + 1)MT"),
]
# fmt: on


@pytest.mark.parametrize(("name", "overrides", "text"), ATTACKS)
def test_describe_states_the_attack_with_the_values_it_runs_with(
    name: str, overrides: dict[str, Any], text: str
) -> None:
    assert describe(name, **overrides).attack == text


@pytest.mark.parametrize(("column", "name", "overrides", "text"), OTHERS)
def test_describe_states_the_values_of_an_override(
    column: str, name: str, overrides: dict[str, Any], text: str
) -> None:
    assert getattr(describe(name, **overrides), column) == text


def test_describe_refuses_what_create_refuses() -> None:
    with pytest.raises(DeatError, match="the method pgd-7 has no parameter beta"):
        describe("pgd-7", beta=1.0)


def test_describe_appends_overrides_to_the_summary_of_a_registered_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"mine": Recipe(summary="an attack of 2 steps", steps=2)})
    assert describe("mine").attack == "an attack of 2 steps"
    assert describe("mine", steps=3).attack == "an attack of 2 steps; here steps = 3, alpha = 2/255"
    assert describe("mine", eps=16 / 255).attack == "an attack of 2 steps"


def test_markdown_table_has_a_row_per_method() -> None:
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert lines[2] == "| `standard` | none | CE | constant | MT |"
    assert lines[3].startswith("| `free-8` (`free-R`) | 8 replays, alpha = eps")


@pytest.mark.parametrize("name", TABLE)
def test_explain_gives_the_choices_the_cost_and_the_source(name: str) -> None:
    text = explain(name)
    lines = text.splitlines()
    assert 7 <= len(lines) <= 11
    assert lines[0].startswith(f"{name}: ")
    stop = [] if describe(name).stop == "-" else ["stop"]
    named = [line.split()[0] for line in lines[1:] if not line.startswith("  note")]
    assert named == ["attack", "loss", "schedule", *stop, "cost", "settings", "paper"]
    source = describe(name).paper if name in NOT_IN_THE_PAPER else f"arXiv:2103.03076, {describe(name).paper}"
    assert f"  paper      {source}" in lines
    assert f"fast: {TABLE[name][-1]} epochs" in text
    assert ("alpha* = max(alpha, eps/r)" in text) == (TABLE[name][8] is GradientMagnitude)


@pytest.mark.parametrize(
    ("name", "family"), [("free-8", "free-R"), ("deat-3", "deat-D"), ("deat-40%", "deat-P%"), ("m+pgd", "m+pgd")]
)
def test_describe_gives_the_notation_of_a_family(name: str, family: str) -> None:
    assert describe(name).family == family
