"""The Triton kernels in Triton's interpreter: against float64 formulas, and against the decoder's own passes."""

import os
from itertools import islice
from types import SimpleNamespace

import pytest
import small
import theorem
import torch
from families import StockLlama, llamagen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, silu
from transformers import LlamaConfig, LlamaForCausalLM

from zipar_train import Grid, Plan
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.token_prompts import Prompts
from zipar_train.plan.masks import dense
from zipar_train.recipe.schema import SamplingParams

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without a GPU"
)
UNPACKED = 10**9  # weights stay readable
EPS = 1e-5


def weights_of(generator, head, heads, keys, width, inner, dtype, *, normed, int8):
    """Random weights of a layer, in the form of `FusedLayer`; in int8 with a scale for each output."""

    def random(*shape, scale=1.0, offset=0.0):
        return (torch.randn(*shape, generator=generator) * scale + offset).to(dtype)

    def linear(out, into):
        weight = random(out, into, scale=into**-0.5)
        if not int8:
            return SimpleNamespace(weight=weight)
        scale = weight.float().abs().amax(1) / 127
        return SimpleNamespace(weight=(weight / scale[:, None]).round().to(torch.int8), scale=scale)

    norms = (random(heads + keys, head, scale=0.1, offset=1), random(heads + keys, head, scale=0.1)) if normed else None
    return SimpleNamespace(
        before=SimpleNamespace(weight=random(width, scale=0.1, offset=1), variance_epsilon=EPS),
        between=SimpleNamespace(weight=random(width, scale=0.1, offset=1), variance_epsilon=EPS),
        qkv=linear((heads + 2 * keys) * head, width),
        bias=random((heads + 2 * keys) * head),
        out=linear(width, heads * head),
        gate_up=linear(2 * inner, width),
        down=linear(width, inner),
        norms=norms,
        heads=heads,
        groups=heads // keys,
        head=head,
        scale=head**-0.5,
    )


def in_float64(own, x, cos, sin, slot, keys, values, seen):
    """A decoder layer, written out: hidden states (R, K, D), and the keys and values that it stores.

    Args:
        slot: (R, K); keys, values: (R, HK, S, HEAD).
        seen: bool (R, K, S).
    """

    def normed(x, gain):
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * gain.double()

    def weight(linear):
        return linear.weight.double() * (linear.scale.double()[:, None] if hasattr(linear, "scale") else 1)

    rows, slots, _ = x.shape
    h, hk, head = own.heads, own.heads // own.groups, own.head
    y = (normed(x, own.before.weight) @ weight(own.qkv).T + own.bias.double()).view(rows, slots, -1, head)
    turning, value = y[:, :, : h + hk], y[:, :, h + hk :]
    if own.norms:
        turning = layer_norm(turning, (head,)) * own.norms[0].double() + own.norms[1].double()
    c, s = (table.double()[slot][:, :, None] for table in (cos, sin))
    a, b = turning.chunk(2, -1)
    turning = torch.cat([a * c - b * s, b * c + a * s], -1)
    keys, values = keys.double().clone(), values.double().clone()
    for row in range(rows):
        keys[row][:, slot[row]] = turning[row, :, h:].transpose(0, 1)
        values[row][:, slot[row]] = value[row].transpose(0, 1)
    query = turning[:, :, :h].transpose(1, 2)
    score = query @ keys.repeat_interleave(own.groups, 1).mT * head**-0.5
    share = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    attended = (share @ values.repeat_interleave(own.groups, 1)).transpose(1, 2).reshape(rows, slots, -1)
    x = x + attended @ weight(own.out).T
    gate, up = (normed(x, own.between.weight) @ weight(own.gate_up).T).chunk(2, -1)
    return x + (silu(gate) * up) @ weight(own.down).T, keys, values


@st.composite
def layers(draw):
    """Sizes of a layer, and of a pass with at most 32 rows."""
    copies, images = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    slots = draw(st.integers(1, 32 // (copies * images)))
    return SimpleNamespace(
        copies=copies,
        images=images,
        slots=slots,
        fed=draw(st.integers(1, slots)),
        head=draw(st.sampled_from([64, 128])),
        keys=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 7])),
        width=draw(st.sampled_from([48, 128])),
        inner=draw(st.sampled_from([32, 80])),
        splits=draw(st.sampled_from([1, 2, 3])),
        prompt=draw(st.sampled_from([1, 5])),
        normed=draw(st.booleans()),
        int8=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def one_layer(sizes, dtype):
    """Hidden states and cache after the kernels, and after the formulas in float64."""
    from zipar_train.decoding.kernels.fused_decoder import Buffers, FusedDecoder, block

    generator = torch.Generator().manual_seed(sizes.seed)
    rows, end, capacity, columns = sizes.copies * sizes.images, 150, 160, 192
    own = weights_of(
        generator, sizes.head, sizes.keys * sizes.groups, sizes.keys, sizes.width, sizes.inner, dtype,
        normed=sizes.normed, int8=sizes.int8,
    )  # fmt: skip
    m, wide = rows * sizes.slots, own.heads * sizes.head

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    start = torch.randint(sizes.prompt, end - sizes.slots + 1, (sizes.images,), generator=generator)
    count = torch.full((end + 1,), sizes.fed)
    padding = torch.rand(rows, sizes.prompt, generator=generator) < 0.5 if sizes.prompt > 1 else None
    angle = torch.rand(end, sizes.head // 2, generator=generator) * 6
    visible = (torch.rand(end, columns, generator=generator) < 0.7) & (torch.arange(columns) < end)
    visible[:, :end] |= torch.eye(end, dtype=torch.bool)
    x, keys, values = random(m, sizes.width), *(random(rows, sizes.keys, capacity, sizes.head) for _ in range(2))

    ahead = torch.arange(sizes.fed)
    slot = (start[:, None] + ahead).repeat(sizes.copies, 1)
    seen = visible[slot][:, :, :capacity] & (torch.arange(capacity) <= slot[:, -1:])[:, None]
    if padding is not None:
        seen[:, :, : sizes.prompt] &= ~padding[:, None]
    given_x = x.view(rows, sizes.slots, -1)[:, : sizes.fed].double()
    expected = in_float64(own, given_x, angle.cos(), angle.sin(), slot, keys, values, seen)

    nothing = torch.full((m, 1), torch.nan, dtype=dtype)  # rows that are not fed must not matter
    fused = object.__new__(FusedDecoder)
    fused.heads, fused.groups, fused.head, fused.device = own.heads, own.groups, own.head, torch.device("cpu")
    fused.launch = {"INTERPRETED": True, "PDL": False}
    fused.cos, fused.sin, fused.plan = angle.cos(), angle.sin(), range(end)
    fused.visible = visible
    fused.splits = lambda rows: sizes.splits
    partial = rows * sizes.keys * sizes.splits * block(sizes.slots * sizes.groups, least=16) * (sizes.head + 2)
    made = Buffers(
        hidden=x, query=nothing.repeat(1, wide), attended=nothing.repeat(1, wide), inner=nothing.repeat(1, sizes.inner),
        given=torch.zeros(0), partial=torch.full((partial,), torch.nan), scratch=torch.zeros(0),
        arrived=torch.zeros(rows * sizes.keys, dtype=torch.int32),
    )  # fmt: skip
    state = SimpleNamespace(tokens=torch.zeros(sizes.images, 1), prompt=torch.zeros(rows, 1), padding=padding)
    before = keys.clone()
    fused.layer(own, keys, values, state, (start, count), made, sizes.slots)
    assert not made.arrived.any()
    untouched = torch.ones(rows, capacity, dtype=torch.bool).scatter(1, slot, False)
    assert torch.equal(keys.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched])
    return (x.view(rows, sizes.slots, -1)[:, : sizes.fed], keys, values), expected


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.slow(60)
@given(layers())
@settings(max_examples=40)
def test_a_layer_is_the_formulas_in_float32(sizes):
    for found, expected in zip(*one_layer(sizes, torch.float32), strict=True):
        assert distance(found, expected) <= 1e-6


@pytest.mark.slow(40)
@given(layers(), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=20)
def test_a_layer_is_the_formulas_up_to_the_rounding_of_its_dtype(sizes, dtype):
    """Six roundings to the dtype, each of at most half an eps, lie between the input and the output."""
    for found, expected in zip(*one_layer(sizes, dtype), strict=True):
        assert distance(found, expected) <= 3 * torch.finfo(dtype).eps


def stock_llama(grid, *, prompt):
    """A Llama with row ends, whose four queries share two keys."""
    family = StockLlama(grid, prompt=prompt)
    config = LlamaConfig(
        vocab_size=12, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    family.model = LlamaForCausalLM(config)
    return family


@pytest.mark.slow(60)
@pytest.mark.parametrize(("window", "lookahead", "guidance"), [(3, 0, 2.0), (2, 0, 1.0), (1, 0, 2.0), (1, 4, 2.0)])
def test_theorem_of_fused_passes(monkeypatch, window, lookahead, guidance):
    """The logits of the kernels are those of a teacher-forced pass of the same layers, in float32."""
    from zipar_train.decoding.kernels.fused_decoder import FusedDecoder

    monkeypatch.setattr(theorem, "Decoder", FusedDecoder)
    family = llamagen(3, 3, head=32, dtype=torch.float32)
    assert fuse_for_inference(family.model, least=UNPACKED)
    plan = Plan.zipar(family.grid, window=window)
    sampling = SamplingParams(guidance=guidance, lookahead=lookahead)
    theorem.check_theorem(family, plan, sampling, dense(plan), tolerance=1e-3)


SAMPLING = [
    SamplingParams(guidance=2.0),
    SamplingParams(guidance=2.0, lookahead=3, top_k=4, temperature=0.8),
    SamplingParams(top_p=0.7, lookahead=6),
    SamplingParams(temperature=0, guidance=2.0),
]


@pytest.mark.slow(60)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", ["llamagen", "stock", "lumina", "emu3", "simplear", "janus", "llamagen-t2i"])
def test_fused_passes_generate_the_codes_of_plain_ones(kind, sampling):
    """For every family, in float32, with padded captions; passes of more rows than the kernels take are plain."""
    if kind == "stock":
        family = stock_llama(Grid(3, 3, row_end=True), prompt=3)
        condition = [0, 2]
    else:
        family = small.family(kind, 2, head=32, grid=(2, 4))
        with torch.no_grad():
            for parameter in family.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
        condition = small.a_batch(kind, family).condition
        if isinstance(condition, Prompts) and sampling.guidance != 1:
            condition = small_guided(family, condition)
    assert fuse_for_inference(family.model, least=UNPACKED)
    plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
    seeds = code_seeds([0, 1], plan.grid.num_codes, seed=0)
    plain, fused = both(family, plan)
    assert torch.equal(plain(condition, seeds, sampling), fused(condition, seeds, sampling))
    assert plain.passes(2) == fused.passes(2)
    assert fused.buffers


@pytest.mark.slow(20)
def test_fused_passes_of_another_batch_size_and_guidance():
    """One decoder: two rows are a guided image, then two images without guidance."""
    family = small.family("llamagen", 2, head=32, grid=(2, 4))
    assert fuse_for_inference(family.model, least=UNPACKED)
    plan = Plan.zipar(family.grid, window=2)
    plain, fused = both(family, plan)
    for labels, guidance in (([0], 2.0), ([1, 2], 1.0), ([2], 2.0)):
        seeds, sampling = code_seeds(list(range(len(labels))), 8, seed=1), SamplingParams(guidance=guidance)
        assert torch.equal(fused(labels, seeds, sampling), plain(labels, seeds, sampling))
        buffers = fused.buffers
        assert {(len(each.given), len(each.arrived)) for each in buffers.values()} == {(len(labels), 4)}


@pytest.mark.slow(20)
@torch.inference_mode()
def test_drafts_are_those_of_plain_passes():
    """All codes after each pass, those that are not final included; wrong drafts would only cost passes."""
    family = small.family("llamagen", 2, head=32, grid=(4, 4))
    assert fuse_for_inference(family.model, least=UNPACKED)
    seeds, sampling = code_seeds([0, 1], 16, seed=1), SamplingParams(guidance=2.0, lookahead=6)
    tokens = []
    for decoder in both(family, Plan.zipar(family.grid, window=2)):
        decoder([0, 2], seeds, sampling)
        state = decoder.state
        state.begin(state.prompt.clone(), None, seeds)
        seen = []
        for shape in islice(decoder._ahead(state, sampling.lookahead), 4):
            decoder.run_pass(shape, sampling)
            seen.append(state.tokens[:, :16].clone())
        tokens.append(torch.stack(seen))
    assert torch.equal(*tokens)
    assert (tokens[0][0] != tokens[0][-1]).any()


def both(family, plan):
    """A decoder without the kernels and one with them."""
    from zipar_train.decoding.kernels.fused_decoder import FusedDecoder

    return Decoder(family, plan), FusedDecoder(family, plan)


def small_guided(family, condition):
    """Captions whose unconditional prompts need no text tokenizer."""
    family.drop = lambda prompts, where: Prompts(prompts.ids * 0 + 5, prompts.padding.flip(0))
    return condition
