"""Repeated passes on a CPU: a stand-in repeats recorded operations on the same tensors, as a CUDA graph does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar, cast

import pytest
import torch
from short_autoattack import robust_network, shorten
from small_problems import batch_for, small_network
from tape import TapeRecorder
from torch import Tensor, nn

import deat_rb
from deat_rb.attacks import captured
from deat_rb.attacks.captured import FIRST_CALLS, Captures, captures_for, padded_sizes
from deat_rb.attacks.functional import CountingModel
from deat_rb.evaluation import evaluate as evaluation
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.utils.devices import full_float32

T = TypeVar("T")


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def passed(model: CountingModel, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of the images for random weights of the logits."""
    images = images.clone().requires_grad_()
    logits = model(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    return logits.detach(), torch.autograd.grad(logits, images, weights)[0]


@pytest.mark.parametrize("batch_size", [1, 7, 16, 17, 24, 33, 128, 500])
def test_padded_sizes_fall_to_16(batch_size: int) -> None:
    sizes = padded_sizes(batch_size)
    assert sizes[0] == batch_size
    assert sizes[-1] == min(batch_size, 16)
    for larger, smaller in pairwise(sizes):
        assert smaller < larger <= max(1.25 * smaller, smaller + 8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_repeated_passes_have_the_logits_gradients_and_counts_of_others(dtype: torch.dtype | None) -> None:
    network = small_network().requires_grad_(False)
    captures = Captures(TapeRecorder, 40)
    plain, model = CountingModel(network, dtype), CountingModel(network, dtype)
    calls: list[int] = []
    model.on_call = lambda: calls.append(model.calls)
    kept: list[tuple[Tensor, Tensor]] = []
    with captures.during(model, []):
        for seed, count in enumerate([40, 33, 17, 24, 30, 16, 40, 1] * 6):
            kept += zip(passed(model, images_of(count, seed), seed), passed(plain, images_of(count, seed), seed),
                        strict=True)  # fmt: skip
            with torch.no_grad():
                kept.append((model(images_of(count, seed)), plain(images_of(count, seed))))
    for found, expected in kept:  # also those that later passes would have overwritten
        tolerance = 1e-5 if dtype is None else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (model.forwards, model.backwards, model.calls) == (plain.forwards, plain.backwards, plain.calls)
    assert calls == list(range(1, model.calls + 1))
    assert 0 < captures.recordings <= 2 * len(captures.sizes)
    assert captures.repeated > model.calls / 2
    assert not captures.failure


def test_passes_do_not_depend_on_whether_others_came_before() -> None:
    """Those that are not recorded are padded, too, so that a resumed evaluation has the same logits."""
    network = small_network().requires_grad_(False)
    late, early = CountingModel(network), CountingModel(network)
    with Captures(TapeRecorder, 40).during(late, []), torch.no_grad():
        for _ in range(FIRST_CALLS + 1):
            late(images_of(20))
        repeated = late(images_of(19, 1))
    with Captures(TapeRecorder, 40).during(early, []), torch.no_grad():
        assert torch.equal(early(images_of(19, 1)), repeated)


def test_a_second_backward_pass_is_refused() -> None:
    model = CountingModel(small_network().requires_grad_(False))
    with Captures(TapeRecorder, 16).during(model, []):
        for _ in range(FIRST_CALLS):
            passed(model, images_of(16), 0)
        images = images_of(16).requires_grad_()
        first, second = model(images), model(images)
        torch.autograd.grad(second.sum(), images, retain_graph=True)
        for logits in (first, second):
            with pytest.raises(RuntimeError, match="allows one backward pass"):
                torch.autograd.grad(logits.sum(), images, retain_graph=True)


def test_a_backward_pass_after_another_pass_was_recorded_is_refused() -> None:
    """Also if recording failed: the new graph has been run in the memory that all share."""

    class OneGood(WrongGradient):
        def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
            return (TapeRecorder if self.recorded < 2 else WrongGradient).record(self, function)

    model = CountingModel(small_network().requires_grad_(False))
    captures = Captures(OneGood, 24)
    with captures.during(model, []):
        for count in (16, 24):
            for _ in range(FIRST_CALLS):
                passed(model, images_of(count), 0)
        images = images_of(16).requires_grad_()
        pending = model(images)
        passed(model, images_of(24), 0)
        assert "other results" in captures.failure
        with pytest.raises(RuntimeError, match="allows one backward pass"):
            torch.autograd.grad(pending.sum(), images)


def test_a_failure_is_told_once_after_resuming() -> None:
    """The warnings of the batches that are kept are restored before a new recorder fails."""
    warnings: list[str] = []
    for _ in range(2):
        model = CountingModel(small_network().requires_grad_(False))
        with Captures(Refusing, 16).during(model, warnings):
            for _ in range(FIRST_CALLS + 1):
                passed(model, images_of(16), 0)
    assert len(warnings) == 1


def test_the_exact_logits_are_never_repeated() -> None:
    model = CountingModel(small_network().requires_grad_(False))
    captures = Captures(TapeRecorder, 16)
    with captures.during(model, []), torch.no_grad():
        for _ in range(2 * FIRST_CALLS):
            model.exact(images_of(16))
    assert (captures.recordings, captures.repeated) == (0, 0)


class Frozen(TapeRecorder):
    """Records what does not read the images that are given later: it repeats nothing."""

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        return (lambda: None), function()


class WrongGradient(TapeRecorder):
    """Doubles what the second recording of a pass, the backward pass, returns."""

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        run, result = super().record(function)
        if self.recorded % 2:
            return run, result

        def doubled() -> None:
            run()
            cast(tuple[Tensor], result)[0].mul_(2)

        return doubled, result


class Refusing(TapeRecorder):
    """Raises as a GPU does if a recorded operation is not permitted."""

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


class Waiting(TapeRecorder):
    """Reports that a pass waits for the device."""

    def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
        return function(), False


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Frozen, "gave other results"),
        (WrongGradient, "gave other results"),
        (Refusing, "recorded as CUDA graphs (operation not permitted)"),
        (Waiting, "a pass waits for the device"),
    ],
)
def test_without_equal_results_nothing_is_repeated(recorder: type[TapeRecorder], reason: str) -> None:
    network = small_network().requires_grad_(False)
    plain, model = CountingModel(network), CountingModel(network)
    captures = Captures(recorder, 20)
    warnings: list[str] = []
    for _ in range(2):
        with captures.during(model, warnings):
            for seed in range(FIRST_CALLS + 3):
                for count in (20, 9):
                    for found, expected in zip(
                        passed(model, images_of(count, seed), seed), passed(plain, images_of(count, seed), seed),
                        strict=True,
                    ):  # fmt: skip
                        torch.testing.assert_close(found, expected)
    assert (captures.recordings, captures.repeated) == (0, 0)
    assert warnings == [captures.failure]
    assert reason in captures.failure
    assert (model.forwards, model.backwards, model.calls) == (plain.forwards, plain.backwards, plain.calls)


def test_graphs_are_freed_on_exit() -> None:
    recorders: list[weakref.ref[TapeRecorder]] = []

    def new() -> TapeRecorder:
        recorder = TapeRecorder()
        recorders.append(weakref.ref(recorder))
        return recorder

    model = CountingModel(small_network().requires_grad_(False))
    captures = Captures(new, 16)
    gc.disable()
    try:
        for _ in range(3):
            with captures.during(model, []):
                for _ in range(FIRST_CALLS + 2):
                    passed(model, images_of(16), 0)
        # The first recording of a process imports modules of torch that keep its frames.
        assert [recorder() for recorder in recorders[1:]] == [None, None]
    finally:
        gc.enable()


def test_where_passes_are_recorded() -> None:
    class Own(nn.Flatten):
        pass

    gpu = torch.device("cuda")
    network = deat_rb.build_model("wrn-10-1", dataset="digits")
    assert captures_for(network, gpu, 500) is not None
    assert captures_for(network, torch.device("cpu"), 500) is None
    assert captures_for(nn.Sequential(network, Own()), gpu, 500) is None
    assert captures_for(torch.jit.trace(small_network(), images_of(2)), gpu, 500) is None
    compiled = small_network()
    compiled.compile()
    assert captures_for(compiled, gpu, 500) is None
    network.register_forward_pre_hook(lambda *_: None)
    assert captures_for(network, gpu, 500) is None


def evaluated(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, images: Tensor, labels: Tensor, *, captures: Captures | None,
    **options: Any,
) -> Report:  # fmt: skip
    monkeypatch.setattr(evaluation, "captures_for", lambda *_: captures)
    return evaluate(model, images, labels, batch_size=64, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "norm", "eps"), [("autoattack,square", "Linf", 0.1), ("autoattack-plus", "L2", 0.5)])
def test_autoattack_has_the_verdicts_of_passes_that_are_not_repeated(
    names: str, norm: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=8, queries=40)
    model, images, labels = robust_network(10, 0.1)
    images, labels = images[:96], labels[:96]
    captures = Captures(TapeRecorder, 64)
    options: dict[str, Any] = {"attacks": names, "eps": eps, "norm": norm}
    expected = evaluated(monkeypatch, model, images, labels, captures=None, **options)
    found = evaluated(monkeypatch, model, images, labels, captures=captures, **options)
    for name, verdict in expected.verdicts.items():
        assert torch.equal(found.verdicts[name], verdict), name
        first, second = found.results[name], expected.results[name]
        assert (first.forwards, first.backwards) == (second.forwards, second.backwards), name
        assert first.notes == second.notes
        if name in expected.adversarial:
            torch.testing.assert_close(found.adversarial[name], expected.adversarial[name], rtol=0, atol=1e-3)
        assert second.n_correct > 0
    assert expected.worst_case.n_correct < expected.results["natural"].n_correct
    assert captures.recordings > 3
    assert captures.repeated > 100


def test_a_failed_recording_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=6, queries=10)
    network = small_network()
    images, labels = batch_for(network)
    captures = Captures(Refusing, 64)
    options: dict[str, Any] = {"attacks": "autoattack,square", "eps": 0.02}
    found = evaluated(monkeypatch, network, images, labels, captures=captures, **options)
    expected = evaluated(monkeypatch, network, images, labels, captures=None, **options)
    assert found.verdicts.keys() == expected.verdicts.keys()
    assert all(torch.equal(found.verdicts[name], verdict) for name, verdict in expected.verdicts.items())
    notes = [note for result in found.results.values() for note in result.notes if captured.NO_GRAPHS in note]
    assert notes == [captures.failure]


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + 0.01 * torch.rand_like(images)


class Centred(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean(dim=0)


@pytest.mark.parametrize(("kind", "recorded"), [("rand", False), (Noisy, False), (Centred, False), (nn.Identity, True)])
def test_what_is_not_recorded(kind: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack's version for random networks, networks that draw numbers, and those whose images affect others."""
    shorten(monkeypatch, iterations=3, queries=10)
    network = small_network()
    images, labels = batch_for(network)
    model = network if kind == "rand" else nn.Sequential(kind(), network)
    captures = Captures(TapeRecorder, 64)
    names = "autoattack-rand" if kind == "rand" else "square"
    evaluated(monkeypatch, model, images, labels, captures=captures, attacks=names, eps=0.02)
    assert (captures.recordings > 0, captures.repeated > 0) == (recorded, recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("arch", ["wrn-10-1", "preactresnet18"])
def test_graphs_have_the_logits_and_gradients_of_others(arch: str, dtype: torch.dtype | None) -> None:
    gpu = torch.device("cuda")
    network = deat_rb.build_model(arch, dataset="digits").eval().requires_grad_(False).to(gpu)
    captures = captures_for(network, gpu, 100)
    assert captures is not None
    plain, model = CountingModel(network, dtype), CountingModel(network, dtype)
    with captures.during(model, []), full_float32(gpu):
        for seed, count in enumerate([100, 93, 64, 5] * 6):
            images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(gpu)
            for found, expected in zip(passed(model, images, seed), passed(plain, images, seed), strict=True):
                within = (1e-3 if dtype is None else 5e-2) * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=0, atol=within)
    assert not captures.failure
    assert captures.recordings > 2
    assert (model.forwards, model.backwards, model.calls) == (plain.forwards, plain.backwards, plain.calls)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autoattack_has_the_verdicts_of_passes_without_graphs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for images on the edge, whose logits are rounded differently in a padded batch."""
    gpu = torch.device("cuda")
    shorten(monkeypatch, iterations=20, queries=200)
    model, images, labels = robust_network(10, 0.1)
    options: dict[str, Any] = {"attacks": "autoattack-plus", "eps": 0.1, "device": "cuda", "precision": precision}
    captures = captures_for(model, gpu, 64)
    found = evaluated(monkeypatch, model, images, labels, captures=captures, **options)
    expected = evaluated(monkeypatch, model, images, labels, captures=None, **options)
    differing = found.verdicts["autoattack-plus"] != expected.verdicts["autoattack-plus"]
    assert int(differing.sum()) <= 2
    assert captures is not None
    assert not captures.failure
    assert captures.repeated > 1000
