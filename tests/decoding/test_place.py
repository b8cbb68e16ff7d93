"""What drawing asks of a GPU: its own device, attention without a plan for each shape, sums of a fixed order."""

from types import SimpleNamespace

import graphs
import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from noise import pick
from theorem import grouped
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ChameleonConfig, LlamaConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonModel
from transformers.models.llama.modeling_llama import LlamaModel

from zipar_train import Grid, Plan
from zipar_train.decoding import decoder, place
from zipar_train.decoding.adaptive import decoder as adaptive
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import FusedLlama, fuse_for_inference, norm
from zipar_train.decoding.pixel_stream import PixelStream
from zipar_train.decoding.sampling import code_seeds, probabilities, sample_from
from zipar_train.models.attention import WITHOUT_CUDNN
from zipar_train.models.cache_argument import cache_arguments
from zipar_train.recipe.schema import SamplingParams
from zipar_train.run.ranks import process


class Operators(TorchDispatchMode):
    """Calls `look(name, args)` with every operator."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.look(operator.name().split("::")[1].split(".")[0], args)
        return operator(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.fixture
def gpus(monkeypatch):
    """Two stand-in GPUs; the list of what has been made current for good."""
    graphs.install(monkeypatch)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("local", [0, 1, 2])
def test_a_process_makes_its_gpu_the_current_one(gpus, monkeypatch, local):
    for name, value in {
        "RANK": local + 2,
        "WORLD_SIZE": 5,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": 3,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1234,
        "TORCHELASTIC_RUN_ID": "run",
    }.items():
        monkeypatch.setenv(name, str(value))
    rank, world, device = process()
    assert (rank, world, device) == (local + 2, 5, torch.device("cuda", local % 2))
    assert gpus == [device]


def test_a_process_without_a_gpu_chooses_none(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert process() == (0, 1, torch.device("cpu"))
    assert gpus == []


@pytest.mark.parametrize("number", [0, 1])
def test_passes_run_on_their_device_without_cudnn(gpus, number):
    """Whatever is current; on the CPU nothing changes."""
    device, allowed = torch.device("cuda", number), torch.backends.cuda.cudnn_sdp_enabled
    assert allowed()
    with place.inference_on(device):
        assert graphs.current[-1] == device and not allowed()
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    with place.inference_on(torch.device("cpu")):
        assert graphs.current[-1] == torch.device("cuda", 0) and allowed()
    assert graphs.current == [torch.device("cuda", 0)] and allowed()
    assert torch.nn.attention.SDPBackend.CUDNN_ATTENTION not in WITHOUT_CUDNN


@pytest.mark.parametrize("mode", ["planned", "adaptive"])
def test_every_pass_runs_where_it_is_told(monkeypatch, mode):
    """The kernels of every attention, as if the CPU were a GPU."""
    device = torch.device("cuda", 1)
    family, seen, inference_on = llamagen(4, 4), [], place.inference_on
    for module in (decoder, adaptive):
        monkeypatch.setattr(module, "inference_on", lambda _: inference_on(device))
    graphs.install(monkeypatch)
    hidden = family.hidden

    def look(*args):
        seen.append((graphs.current[-1], torch.backends.cuda.cudnn_sdp_enabled()))
        return hidden(*args)

    family.hidden = look
    plan = Plan.zipar(family.grid, window=2)
    drawer = Decoder(family, plan) if mode == "planned" else AdaptiveDecoder(family, window=2)
    drawer([0, 1], code_seeds([0, 1], drawer.numbers, seed=0), SamplingParams())
    assert len(seen) >= plan.passes and set(seen) == {(device, False)}


def test_pixels_are_made_on_the_device_of_the_codes(gpus, monkeypatch):
    """A process that draws on `cuda:1` while `cuda:0` is current; a stand-in for codes and tokenizer."""
    device, used = torch.device("cuda", 1), []
    monkeypatch.setattr(graphs.Stream, "wait_stream", lambda self, other: used.append((self, other)), raising=False)
    monkeypatch.setattr(graphs.Stream, "synchronize", lambda self: used.append(self), raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: graphs.Stream(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: graphs.on_device(stream.device))

    def decode(codes):
        assert graphs.current[-1] == device
        return torch.ones(2, 3, 4, 4)

    pixels = PixelStream(SimpleNamespace(decode=decode), device)
    pixels.add(SimpleNamespace(device=device, record_stream=used.append))
    assert pixels.all().shape == (2, 3, 4, 4)
    (beside, drawing), kept, waited = used
    assert beside.device == drawing.device == device and kept is waited is beside is pixels.stream


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("slots", [1, 4])
def test_grouped_queries_are_folded_into_slots(masks, slots):
    """float64: a layer's attention equals sdpa's with `enable_gqa`, for masks of all rows and of each."""
    family = grouped(Grid(4, 4))
    assert fuse_for_inference(family.model)
    body, calls = family.model.model, []
    assert isinstance(body, FusedLlama) and body.groups == 2

    def look(name, args):
        if "attention" in name:
            calls.append((args[0].shape, args[1].shape))

    torch.manual_seed(0)
    x, mask = torch.randn(3, slots, 16, dtype=torch.float64), torch.randn(masks, 1, slots, slots, dtype=torch.float64)
    mask = mask.masked_fill(mask < -1, -torch.inf).diagonal_scatter(torch.zeros(masks, 1, slots), dim1=-2, dim2=-1)
    arguments = {"inputs_embeds": x, "position_ids": torch.arange(slots)[None], "attention_mask": mask}
    with torch.no_grad(), Operators(look):
        folded = body(**arguments).last_hidden_state
    assert calls and all(query[1] == key[1] == 2 for query, key in calls)  # as many heads of queries as of keys
    assert all(query[2] == 2 * slots for query, _ in calls)
    with torch.no_grad():
        cos, sin = (t[:, :, None] for t in body.rotary_emb(x, position_ids=torch.arange(slots)[None]))
        sin = torch.cat([-sin[..., :4], sin[..., 4:]], dim=-1)
        defined = x
        for layer in body.layers:
            defined = with_enable_gqa(layer, defined, cos, sin, mask)
        defined = norm(defined, body.norm)
    assert (folded - defined).abs().max() <= 1e-14 * defined.abs().max()


def with_enable_gqa(layer, hidden, cos, sin, mask):
    """A layer of four query heads and two key heads, 8 wide."""
    heads = layer.qkv(norm(hidden, layer.before)).unflatten(-1, (8, 8))
    query, key = (torch.addcmul(x * cos, x.roll(4, -1), sin) for x in (heads[:, :, :4], heads[:, :, 4:6]))
    query, key, value = (x.transpose(1, 2) for x in (query, key, heads[:, :, 6:]))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=8**-0.5, enable_gqa=True)
    hidden = hidden + layer.out(attended.transpose(1, 2).flatten(2))
    gate, up = layer.gate_up(norm(hidden, layer.between)).chunk(2, dim=-1)
    return hidden + layer.down(silu(gate) * up)


@pytest.mark.parametrize("mode", ["planned", "adaptive"])
@pytest.mark.parametrize("make", [lambda: llamagen(5, 5), lambda: llamagen_t2i(4, 5)])
def test_masks_begin_at_multiples_and_are_made_once_a_pass(monkeypatch, mode, make):
    """As on a GPU without captured passes: no layer has to copy its mask; the codes stay the same."""
    family, masks = make(), []
    labels = family.check([0, 1] if family.grid.height == 5 else [torch.randn(n, 6) for n in (3, 1)])

    def drawn():
        plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
        drawer = Decoder(family, plan) if mode == "planned" else AdaptiveDecoder(family, window=2)
        return drawer(labels, code_seeds([0, 1], drawer.numbers, seed=0), SamplingParams())

    plain, hidden = drawn(), family.hidden

    def look(embeddings, positions, mask, cache):
        masks.append(mask)
        return hidden(embeddings, positions, mask, cache)

    family.hidden = look
    for module in (decoder, adaptive):
        monkeypatch.setattr(module, "keys_aligned", lambda _: place.ALIGNED)
    assert place.keys_aligned(torch.device("cuda", 0)) == place.ALIGNED and place.keys_aligned(torch.device("cpu")) == 1
    assert torch.equal(drawn(), plain)
    for mask in masks:
        assert mask.is_floating_point()  # a bool one is converted in every layer
        assert mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Sums


@pytest.mark.parametrize("mode", ["planned", "adaptive"])
def test_no_sum_runs_along_a_single_row(mode):
    """CUDA's scan over one row alone, and no other, may differ from run to run: see `sampling.two_rows`."""
    family, sums, sampling = llamagen(4, 4), [], SamplingParams(guidance=2.0, top_p=0.9, top_k=5)

    def look(name, args):
        if name.startswith(("cumsum", "cumprod", "logcumsumexp")):
            sums.append((args[0].numel(), args[0].shape[args[1]]))

    planned = mode == "planned"
    drawer = Decoder(family, Plan.raster(family.grid)) if planned else AdaptiveDecoder(family, window=2)
    with Operators(look):
        drawer([1], code_seeds([0], drawer.numbers, seed=0), sampling)
    assert len(sums) >= 10 and all(numbers > size for numbers, size in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_row_is_drawn_as_among_others(dtype):
    torch.manual_seed(0)
    logits, numbers = 3 * torch.randn(50, 1000, dtype=dtype), code_seeds([0], 50, seed=0)[0]
    p = probabilities(logits, temperature=0.9, top_k=300, top_p=0.95)
    codes = sample_from(p, numbers)
    for row in range(50):
        one = probabilities(logits[row : row + 1], temperature=0.9, top_k=300, top_p=0.95)
        assert torch.equal(one, p[row : row + 1])
        assert torch.equal(sample_from(one, numbers[row : row + 1]), codes[row : row + 1])
    assert codes.tolist() == [pick(p[row], numbers[row]) for row in range(50)]


# ---------------------------------------------------------------------------------------------------------------------
# The cache's name


class New(torch.nn.Module):
    def forward(self, inputs_embeds=None, cache=None, use_cache=None, **kwargs):
        return cache


class Old(torch.nn.Module):
    def forward(self, inputs_embeds=None, past_key_values=None, use_cache=None, **kwargs):
        return past_key_values


def test_the_cache_goes_by_the_name_that_a_model_takes():
    cache = object()
    assert New()(**cache_arguments(New(), cache)) is Old()(**cache_arguments(Old(), cache)) is cache
    assert cache_arguments(New(), cache) == {"cache": cache, "use_cache": True}
    assert cache_arguments(Old(), cache) == {"past_key_values": cache, "use_cache": True}
    assert cache_arguments(Old(), None) == cache_arguments(New(), None) == {"use_cache": False}
    with pytest.raises(AssertionError, match="takes none of"):
        cache_arguments(torch.nn.Tanh(), cache)


def test_installed_models_take_the_cache_by_a_known_name():
    """Every stock body that families call."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bodies = [LlamaModel(LlamaConfig(vocab_size=9, **shape))]
    with torch.device("meta"):
        bodies.append(ChameleonModel(ChameleonConfig(vocab_size=9, vocabulary_map={"<image>": 3}, **shape)))
    for body in bodies:
        (name,) = set(cache_arguments(body, object())) - {"use_cache"}
        assert name in ("cache", "past_key_values")


@pytest.mark.parametrize("streamlined", [False, True])
def test_a_family_hands_its_cache_on(streamlined, recwarn):
    family = StockLlama(Grid(3, 3))
    if streamlined:
        assert fuse_for_inference(family.model)
    drawer = Decoder(family, Plan.raster(family.grid))
    drawer(torch.tensor([0, 1]), code_seeds([0, 1], 9, seed=0), SamplingParams())
    assert drawer.state.cache.slot_layers[0].keys.abs().amax((0, 1, 3)).min() > 0  # every slot was written
    assert not [w for w in recwarn if "deprecated" in str(w.message)]
