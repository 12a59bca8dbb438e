"""Compiled training steps: how many graphs there are, and that all of them are static."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from training_problems import images_and_labels, made

import deat_rb

BATCHES = [images_and_labels(6, seed=20), images_and_labels(6, seed=21), images_and_labels(4, seed=22)]
"""Two full batches and a short last one."""


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Capture graphs as always, but run them without the compiler that takes a minute."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield counter
    torch._dynamo.reset()


def has_dynamic_shapes(graph: GraphModule) -> bool:
    values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    return any(isinstance(value, torch.SymInt) for value in values) or any(
        not isinstance(length, int) for shape in shapes for length in shape
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        # the clean logits and the first step in full precision, the second step in bf16, and the update
        ("m+trades", 4),
        ("m-deat", 1),
        ("fat-2", 2),
    ],
)
def test_graphs_are_static_and_few(method: str, graphs: int, counter: CompileCounterWithBackend) -> None:
    """One and two steps, full and short batches: no graph for a trial, a short batch, a step or a stopped example."""
    history = deat_rb.create(method, made()).fit(BATCHES, epochs=2, lr=0.05, compile=True, precision="bf16")
    assert history.steps[1] == 2
    assert counter.frame_count == graphs
    assert not any(map(has_dynamic_shapes, counter.graphs))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_every_network_of_a_process_is_compiled(counter: CompileCounterWithBackend) -> None:
    """By default torch stops compiling a function after 8 graphs; all networks of a class share the function."""
    limit = torch._dynamo.config.recompile_limit
    for classes in range(4, 13):
        model = made()
        model[9] = torch.nn.Linear(32, classes)
        deat_rb.create("m-deat", model).fit(BATCHES[:1], epochs=1, lr=0.05, compile=True)
        assert counter.frame_count == classes - 3
    assert torch._dynamo.config.recompile_limit == limit


def test_a_run_resumed_at_a_short_batch_does_not_compile_it(counter: CompileCounterWithBackend) -> None:
    from deat_rb.training.engine import Engine

    engine, model = Engine(compiled=True), made()
    engine.full_batch = 6
    with engine.prepared(model):
        for examples, compiled in ((4, False), (6, True), (8, True), (6, False)):
            with engine.training_batch(model, examples):
                assert hasattr(model.forward, "_torchdynamo_orig_callable") == compiled
