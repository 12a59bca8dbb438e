import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import evaluation, problem, speed
from benchmarks.limit import Limit, Pass, observed
from benchmarks.memory import Memory, peak
from benchmarks.overhead import Overhead
from benchmarks.published import LOOPS, PublishedLoop, family
from benchmarks.speed import Row
from benchmarks.tables import at_least, at_most
from benchmarks.timing import Side, alternate, ratio
from deat_rb import create
from deat_rb.methods.registry import known_methods
from deat_rb.training.engine import Engine
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError

ROOT = Path(__file__).parents[2]
LR = 0.05


class ScriptedClock:
    """Whose time moves by what the sides say that they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sides_run_in_turn_after_a_warm_up_and_every_other_round_backwards() -> None:
    ran: list[str] = []
    sides = {name: Side(partial(ran.append, name)) for name in "abc"}
    alternate(sides, 3)
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc"


def test_only_the_run_is_timed_and_the_warm_up_is_not() -> None:
    clock = ScriptedClock()
    seconds = {"a": iter([100.0, 1.0, 2.0, 30.0]), "b": iter([100.0, 2.0, 8.0, 10.0])}

    def side(name: str) -> Side:
        def run() -> None:
            clock.now += next(seconds[name])

        def prepare() -> None:
            clock.now += 1000

        return Side(run, prepare)

    times = alternate({name: side(name) for name in "ab"}, 3, clock=clock)
    assert times == {"a": [1, 2, 30], "b": [2, 8, 10]}
    assert ratio(times["b"], times["a"]) == 2  # the median of 2, 4 and 1/3; the ratio of the medians would be 4


def test_what_runs_once_needs_no_warm_up() -> None:
    ran: list[str] = []
    assert len(alternate({"a": Side(lambda: ran.append("a"))}, 1, warm_up=False)["a"]) == len(ran) == 1


def test_row_works_its_figures_out() -> None:
    row = Row("pgd-7", "bf16", 7, 8.0, 100, published=[12, 20, 8], ours=[4, 5, 4], limit=[3, 4, 4])
    assert row.milliseconds_per_image == 40  # the median 4 s for 100 images
    assert row.passes_per_second == 2
    assert row.speedup == 3  # 3, 4, 2
    assert row.of_limit == pytest.approx(0.8)  # 0.75, 0.8, 1


def test_overhead_is_the_share_of_a_step_with_its_loading() -> None:
    assert Overhead("pgd-7", "fp32", [1.0, 1.0, 2.0], [9.0, 3.0, 18.0]).share == pytest.approx(0.1)


def test_memory_is_compared_with_and_without_what_was_there_before() -> None:
    found = Memory("pgd-7", "fp32", ours=110, ours_before=50, limit=100, limit_before=60)
    assert found.of_limit == pytest.approx(1.1)
    assert found.growth_of_limit == pytest.approx(1.5)


def test_tables_say_met_or_missed() -> None:
    assert at_least(3.5, 3.5) == "3.50 (met: 3.5)"
    assert at_least(3.4, 3.5) == "3.40 (missed: 3.5)"
    assert at_least(3.4, None) == "3.40"
    assert at_most(1.06, 1.05) == "1.060 (missed: 1.05)"
    assert at_most(1.05, 1.05) == "1.050 (met: 1.05)"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("m-deat", "deat"), ("deat-40%", "deat"), ("deat-3", "deat"), ("free-8", "free"), ("m+pgd", "pgd"),
        ("m+u-fgsm", "u-fgsm"), ("fat-5", "fat"), ("f+mart", "f+mart"), ("m+trades", "trades"),
        ("standard", "standard"),
    ],
)  # fmt: skip
def test_methods_find_their_loop(method: str, expected: str) -> None:
    assert family(method) == expected


def test_every_method_of_the_paper_has_a_loop() -> None:
    assert len(speed.check_methods([])) == 16
    assert {family(method) for method in speed.check_methods([])} == set(LOOPS)


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    # Away from 0 and 1, where one clamp for the start and another for the sum would be told apart.
    return 0.1 + 0.8 * torch.rand(12, 3, 6, 6, generator=stream), torch.randint(0, 4, (12,), generator=stream)


@pytest.mark.parametrize("method", [name for name in known_methods() if family(name) in LOOPS])
def test_the_published_loop_has_the_mathematics_of_the_training_step(method: str, tiny_model: nn.Module) -> None:
    # In float64, in which another order of sums turns no gradient's sign.
    images, labels = images_and_labels()
    images = images.double()
    trainer = create(method, tiny_model.double())
    problem.fix_steps(trainer)
    model = copy.deepcopy(tiny_model)
    loop = PublishedLoop(method, model, eps=trainer.eps, alpha=trainer.alpha or trainer.eps, steps=trainer.steps, lr=LR)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for batch in range(2):
        seeding.seed_global(0, "batch", batch)
        stats = trainer.training_step(images, labels, optimizer)
        seeding.seed_global(0, "batch", batch)
        loop(images, labels)
    for ours, theirs, at_first in zip(tiny_model.parameters(), model.parameters(), before, strict=True):
        assert not torch.equal(theirs, at_first)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert loop.correct <= 24
    assert math.isfinite(loop.loss)
    assert stats.examples == 12


def test_methods_without_a_published_loop_are_refused(tiny_model: nn.Module) -> None:
    with pytest.raises(DeatError, match="no published loop for the method 'mine'"):
        PublishedLoop("mine", tiny_model, eps=0.1, alpha=0.1, steps=1, lr=LR)
    with pytest.raises(DeatError, match="there is no method 'pdg-7'"):
        speed.check_methods(["pdg-7"])


def test_passes_are_observed_as_the_method_takes_them(tiny_model: nn.Module) -> None:
    images, labels = images_and_labels()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=LR)
    expected = {
        "standard": ["update"],
        "pgd-2": ["input"] * 2 + ["update"],
        "trades": ["forward"] + ["input"] * 10 + ["update"] * 2,
        "mart": ["input"] * 10 + ["update"] * 2,
        "free-3": ["replay"] * 3,
    }
    for method, kinds in expected.items():
        trainer = create(method, tiny_model)
        with observed(trainer) as passes:
            trainer.training_step(images, labels, optimizer)
        assert [each.kind for each in passes] == kinds
        assert all(each.rows == 12 and each.training for each in passes)


def test_passes_are_observed_with_their_precision() -> None:
    given = problem.Problem("wrn-10-1", 4, torch.device("cpu"))
    with problem.Step(given, "trades", "bf16") as step:
        passes = step.passes()
    assert [each.cast for each in passes] == [False, False] + [True] * 11


def test_friendly_passes_shrink_and_run_in_eval_mode(tiny_model: nn.Module) -> None:
    images, _ = images_and_labels()
    labels = (tiny_model.eval()(images).argmax(dim=1) + 1) % 4
    trainer = create("fat-5", tiny_model.train())
    with observed(trainer) as passes:
        trainer.training_step(images, labels, torch.optim.SGD(tiny_model.parameters(), lr=LR))
    crafting = [each for each in passes if each.kind == "input"]
    # All are wrong from the beginning: three more steps, the pass that finds each to stop, and nobody is left.
    assert [each.rows for each in crafting] == [12] * 4
    assert not any(each.training for each in crafting)
    assert passes[-1] == Pass("update", 12, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_limit_takes_just_the_passes_it_is_given(precision: str, tiny_model: nn.Module) -> None:
    images, _ = images_and_labels()
    cast = precision == "bf16"
    given = [
        Pass("forward", 12, True),
        Pass("input", 12, True),
        Pass("input", 5, False, cast),
        Pass("update", 12, True, cast),
        Pass("update", 12, True, cast),
        Pass("replay", 12, True, cast),
        Pass("replay", 12, True, cast),
    ]
    autocast: list[bool] = []
    tiny_model.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    seen: list[tuple[int, bool, bool, bool]] = []
    backward_passes: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            (len(inputs[0]), module.training, inputs[0].requires_grad, torch.is_grad_enabled())
        )
    )
    next(tiny_model.parameters()).register_hook(lambda gradient: backward_passes.append(1))
    Limit(tiny_model, given, precision)(images)
    assert seen == [
        (12, True, False, False),
        (12, True, True, True),
        (5, False, True, True),
        (12, True, False, True),
        (12, True, False, True),
        (12, True, True, True),
        (12, True, True, True),
    ]
    assert autocast == [False, False] + [cast] * 5
    # The two updates together and each replay: input passes form no gradient of a parameter.
    assert len(backward_passes) == 3
    assert tiny_model.training
    assert images.grad is None


def test_every_timed_run_begins_from_the_same_weights() -> None:
    given = problem.Problem("wrn-10-1", 4, torch.device("cpu"))
    first = {name: value.clone() for name, value in given.model.state_dict().items()}
    with problem.Step(given, "pgd-1", "fp32") as step:
        side = step.side()
        side.run()
        changed = step.trainer.model.state_dict()
        assert any(not torch.equal(value, first[name]) for name, value in changed.items())
        side.prepare()
        for name, value in step.trainer.model.state_dict().items():
            assert torch.equal(value, first[name])
    assert given.labels.unique().numel() <= 10


def test_half_of_the_problem_is_classified_correctly() -> None:
    given = problem.Problem("wrn-10-1", 6, torch.device("cpu"))
    with torch.no_grad():
        correct = given.model.eval()(given.images).argmax(dim=1) == given.labels
    assert correct.tolist() == [True, False] * 3


def test_steps_are_fixed_at_the_bound_and_replays_at_four(tiny_model: nn.Module) -> None:
    fixed = {"m-deat": 4, "deat-3": 4, "m+pgd": 7, "m+mart": 10, "free-8": 8, "pgd-7": 7, "standard": 0}
    for method, steps in fixed.items():
        trainer = create(method, tiny_model)
        problem.fix_steps(trainer)
        assert trainer.steps == steps


def test_methods_with_the_same_step_are_measured_once() -> None:
    given = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    methods = ["free-4", "free-8", "deat-3", "deat-40%", "m-deat", "pgd-7", "m+pgd", "u-fgsm", "m+u-fgsm", "pgd-10"]
    groups = speed.alike(given, [*methods, "trades", "f+trades", "m+trades", "mart", "m+mart"])
    assert groups == [
        ("free-4",), ("free-8",), ("m-deat", "deat-3", "deat-40%"), ("pgd-7", "m+pgd"), ("u-fgsm", "m+u-fgsm"),
        ("pgd-10",), ("trades", "m+trades"), ("f+trades",), ("mart", "m+mart"),
    ]  # fmt: skip


def test_targets_are_for_one_network_batch_and_kind_of_device() -> None:
    given = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    assert not speed.targets_apply("wrn-10-1", given)
    assert not speed.targets_apply("preactresnet18", given)
    given.images = given.images.new_zeros(128, 3, 32, 32)
    assert speed.targets_apply("preactresnet18", given)


def test_rows_and_faithfulness_come_from_the_rounds() -> None:
    given = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    clock = ScriptedClock()
    told: list[str] = []
    # Every side reads the clock before and after, between which it moves by one.
    ticks = iter(range(10_000))

    def tick() -> float:
        clock.now += next(ticks) % 2
        return clock.now

    [(rows, faithful)] = speed.measure(
        given, ["m-deat"], ["fp32"], 2, with_targets=True, clock=tick, notify=told.append
    )
    assert [row.method for row in rows] == ["m-deat"]
    assert rows[0].passes == rows[0].steps == 4
    assert rows[0].published == rows[0].ours == rows[0].limit == [1, 1]
    assert rows[0].target == 1.15
    assert faithful is not None
    assert faithful.steps == 2
    assert faithful.loop == 1
    assert faithful.deviation == pytest.approx(1 / (5.4 / 3.04) - 1)
    sides = ["published", "full pass", "script", "ours fp32", "limit fp32"]
    assert told[5:] == [f"m-deat: {side}" for side in [*sides, *reversed(sides)]]


def test_the_radius_is_the_smallest_that_breaks_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    def robust(model: object, images: object, labels: object, *, eps: float) -> tuple[float, float]:
        return 0.9, 0.9 - eps

    monkeypatch.setattr(evaluation, "validate", robust)
    nothing = torch.zeros(1)
    # 0.9 - 0.41 is the first below one half.
    assert evaluation._eps_below_half(nn.Identity(), nothing, nothing) == pytest.approx(0.41)


def test_autoattack_has_the_verdicts_of_robustbench() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = problem.Problem("wrn-10-1", 2, torch.device("cpu")).model.eval()
    subject = evaluation.EvalTarget(model, images, model(images).argmax(dim=1), 0.5, "fresh weights")
    found = evaluation.against_robustbench(subject, batch_size=6)
    assert (found.differing, found.equal, found.examples) == (0, True, 6)
    assert found.ours_accuracy == found.theirs_accuracy
    assert len(found.ours) == len(found.theirs) == 1


def test_peak_memory_of_this_process_is_at_least_what_it_holds() -> None:
    before = peak(torch.device("cpu"))
    held = torch.ones(16 * 2**20)
    assert peak(torch.device("cpu")) >= max(before, held.numel() * 4)
    assert Engine("cpu").peak_memory() >= held.numel() * 4


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run(
        "--quick", "--threads", "1", "--device", "cpu", "--methods", "f+trades", "--precision", "fp32", "--memory",
        "--overhead", "--eval", "--no-autoattack", "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text(encoding="utf-8"))
    [row] = figures["speed"]
    assert (row["method"], row["precision"], row["steps"], row["batch_size"]) == ("f+trades", "fp32", 10, 8)
    assert len(row["published"]) == len(row["ours"]) == len(row["limit"]) == 1
    assert figures["options"]["arch"] == "wrn-10-1"
    assert figures["environment"]["threads"] == 1
    [memory], [overhead] = figures["memory"], figures["overhead"]
    assert memory["ours"] > memory["ours_before"] > 0
    assert 0 < overhead["share"] < 1
    [pgd] = figures["evaluation"]
    assert (pgd["attack"], pgd["examples"], pgd["against"]) == ("pgd-100", 8, "torchattacks")
    for title in ("Training steps in fp32", "Peak memory", "augmentation", "Evaluation"):
        assert title in done.stdout
    assert "f+trades" in done.stdout
    assert "f+trades" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "pdg-7"], "there is no method 'pdg-7'"),
        (["--arch", "wrn-11-1"], "wrn-11-1"),
        (["--precision", "fp8"], "there is no precision 'fp8'"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
        (["--no-speed"], "leaves nothing to measure"),
    ],
)
def test_refusals_are_one_sentence(arguments: list[str], sentence: str) -> None:
    from click.testing import CliRunner

    from benchmarks.__main__ import main

    refused = CliRunner().invoke(main, ["--quick", *arguments])
    assert refused.exit_code == 2
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
