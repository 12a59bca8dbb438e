"""The benchmarks: timing, the published loops, the bare passes, and one smoke run."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from small_problems import batch_for, small_network
from tape import TapeGraphs
from torch import nn

from benchmarks import busy, busy_worker, evaluation, fill, memory, problem, speed
from benchmarks.__main__ import main
from benchmarks.limit import Limit, Pass, observed
from benchmarks.published import LOOPS, PublishedLoop, family
from benchmarks.speed import Row
from benchmarks.timing import Side, alternate, ratio
from deat_rb import create
from deat_rb.data.datasets import load_data
from deat_rb.eval_target import EvalTarget as OpenedTarget
from deat_rb.methods.registry import known_methods
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.threads import BUSY

LR = 0.05


class ScriptedClock:
    """A clock that is moved by the sides."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_alternate_warms_up_and_reverses_every_other_round() -> None:
    ran: list[str] = []
    sides = {name: Side(partial(ran.append, name)) for name in "abc"}
    alternate(sides, 3)
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc"


def test_alternate_times_neither_preparation_nor_warm_up() -> None:
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


@pytest.mark.parametrize("method", ["u-fgsm", "free-2"])
def test_steps_are_recorded_before_they_are_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts the repetitions of recorded steps: each timed round has one, and none is of the warm-up."""
    tape = TapeGraphs()
    monkeypatch.setattr(problem, "choose_graphs", lambda *_: tape)
    small = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    with problem.Step(small, method, "fp32") as step:
        assert alternate({"ours": step.side()}, 2, clock=lambda: tape.repeated) == {"ours": [1, 1]}
    assert tape.recorded == 1
    monkeypatch.setattr(problem, "choose_graphs", lambda *_: None)
    with problem.Step(small, method, "fp32") as step:
        step.side().warm_up()
        assert step.sums.batches == 1, "a step that is not recorded is warmed up once"


def test_row_properties() -> None:
    row = Row("pgd-7", "bf16", 7, 8.0, 100, published=[12, 20, 8], ours=[4, 5, 4], limit=[3, 4, 4])
    assert row.milliseconds_per_image == 40  # the median 4 s for 100 images
    assert row.passes_per_second == 2
    assert row.speedup == 3  # 3, 4, 2
    assert row.of_limit == pytest.approx(0.8)  # 0.75, 0.8, 1


def test_busy_row_compares_with_the_default_or_with_the_best_setting() -> None:
    times = {busy.BEFORE: [2.0, 2.0, 9.0], "short": [2.2, 2.1, 2.2], "one": [4.0], "passive": [2.0]}
    quiet = busy.Row("training", "wrn-10-1", loops=0, others=0.0, ours="short", times=times)
    assert quiet.quotient == pytest.approx(1.1)
    assert quiet.target == 1.1
    beside = busy.Row("training", "preactresnet18", loops=4, others=0.0, ours="one", times=times | {"passive": [1.6]})
    assert (beside.quotient, beside.target) == (2.5, 1.2)


def test_busy_times_a_workload_without_and_with_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers that need no torch: the module of the working directory comes first."""
    (tmp_path / "benchmarks").mkdir()
    program = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    print(0.1, flush=True)\n"
    (tmp_path / "benchmarks" / "busy_worker.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loops: list[int] = []

    def busy_loops(count: int) -> AbstractContextManager[None]:
        loops.append(count)
        return nullcontext()

    monkeypatch.setattr(busy, "_busy_loops", busy_loops)
    monkeypatch.setattr(busy, "processors", lambda: 3)
    settings = {"one thread": {"OMP_NUM_THREADS": "1"}, "passive": BUSY}
    rows = list(busy.measure(1, settings=settings, workloads=[("training", "wrn-10-1")]))
    assert [row.loops for row in rows] == loops == [0, 6]
    assert all(seconds > 0 for row in rows for times in row.times.values() for seconds in times)


def test_busy_worker_prints_the_seconds_of_each_workload(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(busy_worker.SIZES, "wrn-10-1", (2, 1, 2))
    monkeypatch.setattr("sys.stdin", ["training wrn-10-1\n", "evaluation wrn-10-1\n"])
    busy_worker.main()
    ready, *seconds = capsys.readouterr().out.splitlines()
    assert (ready, len(seconds)) == ("ready", 2)
    assert min(map(float, seconds)) > 0


def test_busy_waits_until_a_worker_has_loaded_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError", encoding="utf-8")
    worker = busy._worker({"PYTHONPATH": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"benchmarks\.busy_worker ended"), worker:
        pass


def test_check_methods_has_a_loop_for_every_method() -> None:
    assert len(speed.check_methods([])) == 18
    assert {family(method) for method in speed.check_methods([])} == set(LOOPS)
    with pytest.raises(DeatError, match="there is no method 'pdg-7'"):
        speed.check_methods(["pdg-7"])


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    # Away from 0 and 1, where clamping the start and clamping the sum would differ.
    return 0.1 + 0.8 * torch.rand(12, 3, 6, 6, generator=stream), torch.randint(0, 4, (12,), generator=stream)


@pytest.mark.parametrize("method", [name for name in known_methods() if family(name) in LOOPS])
def test_published_loop_updates_weights_as_training_step_does(method: str, tiny_model: nn.Module) -> None:
    # In float64, where another order of summation changes no gradient's sign.
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


def test_observed_records_the_passes_of_each_method(tiny_model: nn.Module) -> None:
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


def test_observed_records_fats_early_stop(tiny_model: nn.Module) -> None:
    images, _ = images_and_labels()
    labels = (tiny_model.eval()(images).argmax(dim=1) + 1) % 4
    trainer = create("fat-5", tiny_model.train())
    with observed(trainer) as passes:
        trainer.training_step(images, labels, torch.optim.SGD(tiny_model.parameters(), lr=LR))
    attack = [each for each in passes if each.kind == "input"]
    # All are misclassified from the start: three more steps, and the pass in which each is found to stop.
    assert [each.rows for each in attack] == [12] * 4
    assert not any(each.training for each in attack)
    assert passes[-1] == Pass("update", 12, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_limit_runs_exactly_the_given_passes(precision: str, tiny_model: nn.Module) -> None:
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


def test_alike_groups_methods_with_the_same_step() -> None:
    given = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    methods = ["free-4", "free-8", "deat-3", "deat-40%", "m-deat", "pgd-7", "m+pgd", "u-fgsm", "m+u-fgsm", "pgd-10"]
    groups = speed.alike(given, [*methods, "trades", "f+trades", "m+trades", "mart", "m+mart"])
    assert groups == [
        ("free-4",), ("free-8",), ("m-deat", "deat-3", "deat-40%"), ("pgd-7", "m+pgd"), ("u-fgsm", "m+u-fgsm"),
        ("pgd-10",), ("trades", "m+trades"), ("f+trades",), ("mart", "m+mart"),
    ]  # fmt: skip


@pytest.mark.slow
def test_against_robustbench_has_equal_verdicts() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = problem.Problem("wrn-10-1", 2, torch.device("cpu")).model.eval()
    target = evaluation.EvalTarget(model, images, model(images).argmax(dim=1), 0.5, "fresh weights")
    comparison = evaluation.against_robustbench(target, batch_size=6)
    assert (comparison.differing, comparison.equal, comparison.examples) == (0, True, 6)
    assert comparison.ours_accuracy == comparison.theirs_accuracy
    assert len(comparison.ours) == len(comparison.theirs) == 1


@pytest.mark.parametrize(("device", "equal"), [("cpu", True), ("meta", False)])
def test_verdicts_must_equal_robustbenchs_on_a_cpu_only(
    device: str, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = torch.tensor([True, False]), torch.tensor([True, True])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: SimpleNamespace(verdicts={"autoattack": ours}))
    monkeypatch.setattr("benchmarks.evaluation.robustbench_benchmark.benchmark", lambda *_, **__: (0.0, 0.0, theirs))
    monkeypatch.setattr(evaluation, "device_clock", lambda _: ScriptedClock())
    model = nn.Linear(1, 2, device=device)
    target = evaluation.EvalTarget(model, torch.zeros(2, 1), torch.tensor([0, 1]), 0.5, "none")
    found = evaluation.against_robustbench(target, batch_size=2)
    assert (found.differing, found.equal) == (1, equal)


def test_make_target_attacks_a_run_in_l2_at_the_radius_of_linf(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenedTarget(small_network(), load_data("digits"), 0.5, {"run": "runs/a"}, norm="L2")
    monkeypatch.setattr(evaluation, "open_target", lambda _: opened)
    assert evaluation.make_target(Path("runs/a"), 2, "cpu").eps == 8 / 255


def test_bare_passes_on_a_gpu_run_only_when_their_side_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory before them is read in between."""
    calls: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in {"CUDAGraph": Graph, "Stream": lambda: stream, "current_stream": lambda: stream,
                           "graph": lambda *_, **__: nullcontext(), "stream": nullcontext}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(problem, "Limit", lambda *_: lambda images: calls.append("passes"))
    small = problem.Problem("wrn-10-1", 2, torch.device("cpu"))
    small.device = torch.device("cuda")
    side = problem.limit_side(small, [], "fp32")
    assert not calls
    side.run()
    side.run()
    assert calls == ["passes"] * 5 + ["replay"] * 2


def test_fill_counts_passes_of_batches_one_by_one_and_together() -> None:
    network = small_network()
    images, labels = (torch.cat(3 * [each]) for each in batch_for(network))
    target = evaluation.EvalTarget(network, images, labels, 0.04, "a small network")
    alone, together = fill.measure(target, batch_size=36, repeats=1, autoattack=False, attacks=["pgd-6"])
    assert (alone.stage, alone.together, together.together) == ("pgd-6", False, True)
    assert alone.differing == together.differing == 0
    assert alone.equal
    assert together.equal
    assert together.calls < alone.calls <= 4 * 7
    assert alone.fill == pytest.approx(alone.images / alone.calls / 36)
    assert alone.fill < together.fill <= 1
    assert len(alone.seconds) == len(together.seconds) == 1


def peaks_around_64_mebibytes() -> tuple[int, int]:
    return memory._around(Side(lambda: torch.ones(16 * 2**20)), torch.device("cpu"))


def test_memory_before_and_after_a_side_is_the_peak_of_its_process() -> None:
    """A fork's peak begins with its present memory; 64 MiB are added."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        before, after = pool.submit(peaks_around_64_mebibytes).result()
    assert after - before == pytest.approx(64 * 2**20, rel=0.1)


@pytest.mark.slow
def test_main_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_alone", memory._peak)  # in this process
    digits = load_data("digits")
    monkeypatch.setattr(evaluation, "load_data", lambda _: replace(digits, train=digits.train.first(64)))
    file = tmp_path / "results.json"
    command = [
        "--quick", "--threads", "1", "--device", "cpu", "--methods", "f+trades", "--precision", "fp32", "--memory",
        "--overhead", "--eval", "--no-autoattack", "--json", str(file),
    ]  # fmt: skip
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    results = json.loads(file.read_text(encoding="utf-8"))
    [row] = results["speed"]
    assert (row["method"], row["precision"], row["steps"], row["batch_size"]) == ("f+trades", "fp32", 10, 8)
    assert len(row["published"]) == len(row["ours"]) == len(row["limit"]) == 1
    assert results["options"]["arch"] == "wrn-10-1"
    assert results["environment"]["threads"] == 1
    [peak], [overhead] = results["memory"], results["overhead"]
    assert peak["ours"] >= peak["ours_before"] > 0
    assert 0 < overhead["share"] < 1
    [pgd] = results["evaluation"]
    assert (pgd["attack"], pgd["examples"], pgd["against"]) == ("pgd-100", 8, "torchattacks")
    for title in ("Training steps in fp32", "Peak memory", "augmentation", "Evaluation"):
        assert title in done.stdout
    assert "f+trades" in done.stdout
    assert "f+trades" in done.stderr
