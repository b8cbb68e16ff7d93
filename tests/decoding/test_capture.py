"""CudaGraphs passes: the graph replayed is the pass, and an image takes few graphs."""

from functools import partialmethod
from unittest.mock import patch

import graphs
import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from theorem import check_theorem
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from zipar_train import Grid, Plan
from zipar_train.decoding import decoder as module
from zipar_train.decoding.cuda_graphs import CudaGraphs
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import compile_body, fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models import compiled
from zipar_train.plan.masks import dense
from zipar_train.recipe.schema import SamplingParams


@pytest.fixture
def recorder(monkeypatch):
    """CUDA graphs that work on the CPU, by default for every Decoder, with small buckets."""
    monkeypatch.setattr(module, "BUCKET", 8)
    monkeypatch.setattr(Decoder.__init__, "__kwdefaults__", {"released": False, "capture": True})
    return graphs.install(monkeypatch)


def test_a_recorded_graph_is_the_work(recorder):
    """The emulation itself: recording changes nothing, replaying does the work on what the tensors hold by then."""
    state, table = torch.zeros(3), torch.arange(12.0).view(4, 3)
    row = torch.zeros((), dtype=torch.long)

    def work():
        doubled = table[row + torch.arange(1)][0] * 2
        state.add_(doubled)
        row.add_(1)
        return doubled

    captured = CudaGraphs(torch.device("cuda", 0))
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


@pytest.mark.slow
@pytest.mark.parametrize(("window", "guidance"), [(6, 1.0), (4, 2.5), (2, 1.0), (1, 2.5)])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=0.8, top_k=4, top_p=0.9)]
)
def test_theorem_of_captured_passes(recorder, window, guidance, sampling):
    family = llamagen(6, 6)
    plan = Plan.zipar(family.grid, window=window)
    check_theorem(family, plan, sampling.model_copy(update={"guidance": guidance}), dense(plan))
    assert 0 < recorder.recorded < recorder.replayed < plan.passes


@pytest.mark.parametrize("window", [5, 3, 1])
def test_theorem_of_captured_passes_with_row_ends_and_a_longer_prompt(recorder, window):
    grid = Grid(5, 4, row_end=True)
    plan = Plan.zipar(grid, window=window, prompt=3)
    check_theorem(StockLlama(grid, prompt=3), plan, SamplingParams(guidance=2.0), dense(plan))
    assert recorder.replayed


@pytest.mark.slow
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("window", [5, 2, 1])
def test_captured_passes_draw_what_plain_ones_draw(recorder, window, released):
    """Batch after batch, another batch size between them, in float32, to the same codes."""
    family = llamagen(5, 5, dtype=torch.float32)
    plan = Plan.zipar(family.grid, window=window, stand_in="released" if released else "completed")
    plain = Decoder(family, plan, released=released, capture=False)
    captured = Decoder(family, plan, released=released)
    for labels in ([0, 1, 2], [2, 1, 0], [1], [0, 0, 1]):
        numbers = code_seeds(list(range(len(labels))), 25, seed=len(labels))
        for sampling in (SamplingParams(guidance=2.0), SamplingParams(guidance=2.0, temperature=0)):
            assert torch.equal(captured(labels, numbers, sampling), plain(labels, numbers, sampling))


def test_captured_captions(recorder):
    """Padding differs from batch to batch, and is no part of a graph."""
    family = llamagen_t2i(4, 5)
    plan = Plan.zipar(family.grid, window=2, prompt=3)
    plain, captured = Decoder(family, plan, capture=False), Decoder(family, plan)
    for lengths in ((3, 1), (2, 3), (1, 1)):
        captions = family.check([torch.randn(n, 6) for n in lengths])
        numbers = code_seeds([0, 1], 20, seed=0)
        assert torch.equal(captured(captions, numbers, SamplingParams()), plain(captions, numbers, SamplingParams()))
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


def counted_body(model, *, fullgraph: bool = True) -> CompileCounterWithBackend:
    """Compile a body as `compile_body` does, by the backend that leaves the operators as they are."""
    counter = CompileCounterWithBackend("eager")
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter, fullgraph=fullgraph)):
        compile_body(model)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize(("streamlined", "windows"), [(True, (8, 3, 2, 1)), (False, (3,))])
def test_a_compiled_body_draws_the_same_with_a_few_compilations(streamlined, windows):
    """Without graph breaks, for every window, width and batch size."""
    family, plain = (llamagen(8, 8, dtype=torch.float32) for _ in range(2))
    if streamlined:
        assert fuse_for_inference(family.model, least=10**9) and fuse_for_inference(plain.model, least=10**9)
    torch.compiler.reset()
    counter = counted_body(family.model)
    for window, images in zip(windows, (2, 3, 1, 5), strict=False):
        plan, sampling = Plan.zipar(family.grid, window=window), SamplingParams(guidance=2.0)
        labels, numbers = [k % 3 for k in range(images)], code_seeds(list(range(images)), 64, seed=0)
        drawn = Decoder(family, plan)(labels, numbers, sampling)
        assert torch.equal(drawn, Decoder(plain, plan)(labels, numbers, sampling))
    torch.compiler.reset()
    assert 1 <= counter.frame_count <= 4  # whatever the number of layers, if they are compiled one by one


@pytest.mark.slow
def test_a_compiled_body_never_goes_on_uncompiled(monkeypatch):
    """At the limit of versions PyTorch would run a layer uncompiled, and say so in a log alone."""
    family = llamagen(6, 6, dtype=torch.float32)
    assert fuse_for_inference(family.model, least=10**9)
    torch.compiler.reset()
    counter = counted_body(family.model, fullgraph=False)  # which fails by itself
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 2)
    with torch._dynamo.config.patch(recompile_limit=1):
        decoder, numbers = Decoder(family, Plan.raster(family.grid)), code_seeds([0], 36, seed=0)
        decoder([0], numbers, SamplingParams())
        with pytest.raises(RuntimeError, match="a compiled layer has 2 versions.*raise torch._dynamo.config"):
            decoder([0], numbers, SamplingParams(guidance=2.0))
        assert torch._dynamo.config.recompile_limit == 1  # the process's own settings are as they were
        assert not torch._dynamo.config.fail_on_recompile_limit_hit
    assert counter.frame_count == 2
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("window", [5, 2])
def test_nothing_is_compiled_inside_a_captured_pass(recorder, window):
    """Captions: the prompt's pass is the only one of its shape, so it is captured in the second image.

    At the widest window no other pass feeds several slots, so nothing else compiles a version for that.

    `graphs.capture` fails if torch.compile works while it records.
    """
    family = llamagen_t2i(4, 5)
    assert fuse_for_inference(family.model, least=10**9)
    torch.compiler.reset()
    counter, plan = counted_body(family.model), Plan.zipar(family.grid, window=window, prompt=3)
    decoder = Decoder(family, plan)
    for seed in range(3):
        captions = family.check([torch.randn(n, 6) for n in (3, 1)])
        decoder(captions, code_seeds([0, 1], 20, seed=seed), SamplingParams())
    torch.compiler.reset()
    assert recorder.recorded == len(set(decoder.shapes)) and counter.frame_count


def test_the_emulation_sees_what_compiles(recorder):
    """A first call is not recorded; what makes the second one compile is found there."""

    class Tanh(nn.Module):
        def forward(self, x):
            return x.tanh()

    inputs, module = iter([torch.ones(2), torch.ones(2, 2)]), Tanh()
    torch.compiler.reset()
    module.compile(backend="eager")
    captured = CudaGraphs(torch.device("cuda", 0))
    captured("tanh", lambda: module(next(inputs)))
    with pytest.raises(AssertionError, match="has compiled inside a captured pass"):
        captured("tanh", lambda: module(next(inputs)))
    torch.compiler.reset()


def test_keys_and_values_lie_where_they_are_before_the_first_pass():
    family = llamagen(4, 4)
    plan, seen, hidden = Plan.zipar(family.grid, window=2), [], family.hidden

    def look(embeddings, positions, mask, cache=None):
        seen.append([t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)])
        return hidden(embeddings, positions, mask, cache)

    family.hidden = look
    decoder = Decoder(family, plan)
    decoder([0, 1], code_seeds([0, 1], 16, seed=0), SamplingParams())
    decoder([1, 2], code_seeds([2, 3], 16, seed=0), SamplingParams())
    assert len(seen) == 2 * plan.passes and all(each == seen[0] for each in seen)


@pytest.mark.parametrize("number", [0, 1])
def test_graphs_are_captured_on_their_own_device(recorder, number):
    """One process, two devices, `cuda:0` current: the stream of every capture lies on the device of the work."""
    first, device = CudaGraphs(torch.device("cuda", 0)), torch.device("cuda", number)
    for _ in range(2):
        first("anything", lambda: torch.ones(1))
    captured = CudaGraphs(device)
    for _ in range(2):
        captured("work", lambda: torch.ones(1))
        captured("more work", lambda: torch.ones(1))
    assert recorder.recorded == 3 and captured.stream.device == device
    assert graphs.current == [torch.device("cuda", 0)]


def check_captured(family, plain, *, window: int) -> None:
    """CudaGraphs passes draw what plain ones sampling, batch after batch, in as many graphs as there are shapes."""
    plan, sampling = Plan.zipar(family.grid, window=window), SamplingParams(guidance=2.0)
    plain, captured = Decoder(plain, plan, capture=False), Decoder(family, plan, capture=True)
    for labels in ([0, 2], [1, 0], [1]):
        numbers = code_seeds(list(range(len(labels))), plan.grid.num_codes, seed=len(labels))
        assert torch.equal(captured(labels, numbers, sampling), plain(labels, numbers, sampling))
        graphs = captured.captured.graphs
        assert len(graphs) == len(set(captured.shapes)) < plan.passes
    assert any(graph is not None for graph in graphs.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [24, 16, 4, 1])
def test_graphs_on_a_gpu_draw_what_plain_passes_draw(window, compiled):
    """In float64, to the code; the share that agrees in bfloat16 is `zipar-train bench`'s to report."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    family, plain = (llamagen(24, 24, device="cuda") for _ in range(2))
    assert fuse_for_inference(family.model) and fuse_for_inference(plain.model)
    if compiled:
        compile_body(family.model)
    check_captured(family, plain, window=window)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "compiled"), [(4, False), (1, False), (1, True)])
def test_graphs_as_on_a_gpu(recorder, monkeypatch, window, compiled):
    """The same on the CPU, with emulated graphs and the buckets of a GPU."""
    monkeypatch.setattr(module, "BUCKET", 128)
    family, plain = (llamagen(24, 24) for _ in range(2))
    assert fuse_for_inference(family.model) and fuse_for_inference(plain.model)
    torch.compiler.reset()
    if compiled:
        counted_body(family.model)
    check_captured(family, plain, window=window)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("lookahead", [0, 5])
@pytest.mark.parametrize("window", [8, 2])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(guidance=2.0), SamplingParams(temperature=0.9, top_k=20, top_p=0.9)]
)
def test_triton_kernels_generate_the_codes_of_plain_passes_on_a_gpu(window, lookahead, sampling):
    """Captured, batch after batch, in float32; sums in another order may change a code in a thousand."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from zipar_train.decoding.kernels.fused_decoder import FusedDecoder  # needs Triton

    family = llamagen(8, 8, codes=64, head=64, dtype=torch.float32, device="cuda")
    assert fuse_for_inference(family.model)
    plan = Plan.zipar(family.grid, window=window)
    plain, fused = Decoder(family, plan), FusedDecoder(family, plan)
    sampling = sampling.model_copy(update={"lookahead": lookahead})
    equal = []
    for labels in ([0, 1, 2], [2, 1, 0], [1], [0, 2, 1]):
        numbers = code_seeds(list(range(len(labels))), 64, seed=len(labels))
        equal.append((fused(labels, numbers, sampling) == plain(labels, numbers, sampling)).float().mean())
    assert fused.buffers
    assert torch.stack(equal).mean() > 0.9
