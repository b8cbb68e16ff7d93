"""Captured passes: the graph replayed is the pass, and an image takes few graphs."""

import graphs
import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from test_decode import check_theorem
from torch._dynamo.testing import CompileCounterWithBackend

from zipar_train import Grid, Plan
from zipar_train.decoding import decoder as module
from zipar_train.decoding.capture import Captured
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import uniforms
from zipar_train.masks import dense
from zipar_train.sections import Draw


@pytest.fixture
def recorder(monkeypatch):
    """CUDA graphs that work on the CPU, by default for every Decoder, with small buckets."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs.Graph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.capture)
    monkeypatch.setattr(module, "BUCKET", 8)
    monkeypatch.setattr(graphs.Graph, "recorded", 0)
    monkeypatch.setattr(graphs.Graph, "replayed", 0)
    monkeypatch.setattr(Decoder.__init__, "__kwdefaults__", {"released": False, "capture": True})
    return graphs.Graph


def test_a_recorded_graph_is_the_work(recorder):
    """The emulation itself: recording changes nothing, replaying does the work on what the tensors hold by then."""
    state, table = torch.zeros(3), torch.arange(12.0).view(4, 3)
    row = torch.zeros((), dtype=torch.long)

    def work():
        doubled = table[row + torch.arange(1)][0] * 2
        state.add_(doubled)
        row.add_(1)
        return doubled

    captured = Captured()
    with torch.inference_mode():
        for _ in range(4):
            result = captured("row", work)
    assert torch.equal(state, table.sum(0) * 2)
    assert torch.equal(result, table[3] * 2)
    assert (recorder.recorded, recorder.replayed) == (1, 3)

    def looks():
        return state * float(state[0])

    captured("looks", looks)
    with pytest.raises(AssertionError, match="reads a value on the host"):
        captured("looks", looks)


@pytest.mark.parametrize(("window", "guidance"), [(6, 1.0), (4, 2.5), (2, 1.0), (1, 2.5)])
@pytest.mark.parametrize("draw", [Draw(), Draw(temperature=0), Draw(temperature=0.8, top_k=4, top_p=0.9)])
def test_theorem_of_captured_passes(recorder, window, guidance, draw):
    family = llamagen(6, 6)
    plan = Plan.zipar(family.grid, window=window)
    check_theorem(family, plan, draw.model_copy(update={"guidance": guidance}), dense(plan))
    assert 0 < recorder.recorded < recorder.replayed < plan.passes


@pytest.mark.parametrize("window", [5, 3, 1])
def test_theorem_of_captured_passes_with_row_ends_and_a_longer_prompt(recorder, window):
    grid = Grid(5, 4, row_end=True)
    plan = Plan.zipar(grid, window=window, prompt=3)
    check_theorem(StockLlama(grid, prompt=3), plan, Draw(guidance=2.0), dense(plan))
    assert recorder.replayed


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("window", [5, 2, 1])
def test_captured_passes_draw_what_plain_ones_draw(recorder, window, released):
    """Batch after batch, another batch size between them, in float32, to the same codes."""
    family = llamagen(5, 5, dtype=torch.float32)
    plan = Plan.zipar(family.grid, window=window, stand_in="released" if released else "completed")
    plain = Decoder(family, plan, released=released, capture=False)
    captured = Decoder(family, plan, released=released)
    for labels in ([0, 1, 2], [2, 1, 0], [1], [0, 0, 1]):
        numbers = uniforms(list(range(len(labels))), 25, seed=len(labels))
        for draw in (Draw(guidance=2.0), Draw(guidance=2.0, temperature=0)):
            assert torch.equal(captured(labels, numbers, draw), plain(labels, numbers, draw))


def test_captured_captions(recorder):
    """Padding differs from batch to batch, and is no part of a graph."""
    family = llamagen_t2i(4, 5)
    plan = Plan.zipar(family.grid, window=2, prompt=3)
    plain, captured = Decoder(family, plan, capture=False), Decoder(family, plan)
    for lengths in ((3, 1), (2, 3), (1, 1)):
        captions = family.check([torch.randn(n, 6) for n in lengths])
        numbers = uniforms([0, 1], 20, seed=0)
        assert torch.equal(captured(captions, numbers, Draw()), plain(captions, numbers, Draw()))
    assert recorder.recorded <= 2 * len(set(captured.shapes))


def test_a_few_graphs_serve_an_image_of_24_by_24():
    family = llamagen(24, 24, dtype=torch.float32)
    counts = {}
    for window in (24, 16, 12, 8, 4):
        shapes = Decoder(family, Plan.zipar(family.grid, window=window), capture=True).shapes
        assert all(shape.keys % 128 == 0 for shape in shapes)
        counts[window] = len(set(shapes))
    assert counts[24] <= 6
    assert max(counts.values()) <= 60, counts


def test_a_compiled_body_draws_the_same_with_a_few_compilations():
    """Whole, without graph breaks, for every window and width; by the backend that leaves the operators as they are."""
    family, plain = (llamagen(8, 8, dtype=torch.float32) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    family.model.base_model.compile(dynamic=True, fullgraph=True, backend=counter)
    numbers, draw = uniforms([0, 1], 64, seed=0), Draw(guidance=2.0)
    for window in (8, 3, 2):
        plan = Plan.zipar(family.grid, window=window)
        assert torch.equal(Decoder(family, plan)([0, 1], numbers, draw), Decoder(plain, plan)([0, 1], numbers, draw))
    torch.compiler.reset()
    assert 1 <= counter.frame_count <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [24, 16, 4, 1])
def test_graphs_on_a_gpu_draw_what_plain_passes_draw(window, compiled):
    """In float64, to the code; the share that agrees in bfloat16 is `zipar-train bench`'s to report."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    family = llamagen(24, 24)
    family.model.cuda()
    plan, draw = Plan.zipar(family.grid, window=window), Draw(guidance=2.0)
    plain = Decoder(family, plan, capture=False)
    if compiled:
        family = llamagen(24, 24)
        family.model.cuda().base_model.compile(dynamic=True)
    captured = Decoder(family, plan)
    for labels in ([0, 2], [1, 0], [1]):
        numbers = uniforms(list(range(len(labels))), 576, seed=len(labels))
        assert torch.equal(captured(labels, numbers, draw), plain(labels, numbers, draw))
    assert any(graph is not None for graph in captured.captured.graphs.values())
    assert len(captured.captured.graphs) < plan.passes / 2
