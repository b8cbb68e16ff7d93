"""Compiled rounds: passes stay compiled at any batch size, and what is not compiled is not reported as compiled."""

import pytest
import torch
from small import TINY

from zipar_train.benchmark import train
from zipar_train.benchmark.decode import bench_decode
from zipar_train.benchmark.results import COMPILED, OURS
from zipar_train.benchmark.train import bench_train
from zipar_train.decoding import fused_llama as body
from zipar_train.models import compiled
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")


def with_eager_backend(monkeypatch, seen=None):
    """torch.compile by the backend that leaves operators as they are; their inputs are kept in `seen`."""
    real = torch.nn.Module.compile

    def backend(graph, inputs):
        if seen is not None:
            seen.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, **how, backend=backend))


def bench_compiled(batches):
    """Batch sizes and windows of which some have passes of one slot, others of several."""
    torch.compiler.reset()
    try:
        return bench_decode(
            load_recipe("digits", TINY),
            windows=[8, 2],
            batches=batches,
            rounds=1,
            baselines=False,
            compiled=True,
            progress=False,
        )
    finally:
        torch.compiler.reset()


@pytest.mark.slow
def test_three_batch_sizes_stay_compiled(monkeypatch):
    """PyTorch's limit is 8 versions of a function; a layer here takes some of each batch size."""
    with_eager_backend(monkeypatch)
    with torch._dynamo.config.patch(recompile_limit=1):  # drawing raises it
        report = bench_compiled([1, 2, 3])
    assert not report.failures
    assert [row.method for row in report.rows].count(COMPILED) == 6


@pytest.mark.slow
def test_what_is_partly_not_compiled_is_not_reported_as_compiled(monkeypatch):
    with_eager_backend(monkeypatch)
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        report = bench_compiled([1, 3])
    assert [row.method for row in report.rows].count(OURS) == 4
    assert {failure.method for failure in report.failures} == {COMPILED}
    assert "a compiled layer has 1 versions, PyTorch's limit" in report.failures[0].error


@pytest.mark.slow
def test_what_breaks_is_not_reported_as_compiled(monkeypatch):
    """Part of a layer that cannot be compiled."""
    with_eager_backend(monkeypatch)
    real = body.silu

    @torch._dynamo.disable
    def uncompiled(x):
        return real(x)

    monkeypatch.setattr(body, "silu", uncompiled)
    report = bench_compiled([1])
    assert [row.method for row in report.rows] == [OURS, OURS]
    assert {failure.method for failure in report.failures} == {COMPILED}
    assert "torch.compile left parts uncompiled" in report.failures[0].error


@pytest.mark.slow
def test_each_kind_of_step_is_compiled_for_its_own_length(monkeypatch):
    """64 and 70 slots, then 16 and 18: without a reset PyTorch would make the later lengths variables."""
    seen = []
    with_eager_backend(monkeypatch, seen)
    monkeypatch.setattr(train, "compiles", lambda recipe, device: True)
    recipe = load_recipe("digits", TINY)
    report = bench_train(recipe, window=2, batches=[2], grids=[8, 4], rounds=1, progress=False, device="cpu")
    torch.compiler.reset()
    assert len(report.rows) == 4 and report.compiled
    sizes = [tensor.shape for inputs in seen for tensor in inputs if isinstance(tensor, torch.Tensor)]
    assert {64, 70, 16, 18} <= {size[1] for size in sizes if len(size) == 3}
    assert not any(isinstance(value, torch.SymInt) for inputs in seen for value in inputs)
    assert "each kind of step is compiled for its own length" in " ".join(report.notes)
