"""The theorem: what the decoder saw while drawing is what one teacher-forced pass over its images gives."""

import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import grids, windows
from theorem import check_theorem, drawn_and_seen, grouped

from zipar_train import Grid, Plan
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.onednn import Packed, packed
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import teacher_forced
from zipar_train.plan.masks import block, dense
from zipar_train.recipe.schema import SamplingParams


@pytest.mark.slow
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    data=st.data(),
    stand_in=st.sampled_from(["nearest", "completed", "released"]),
    first_row=st.sampled_from(["complete", "overlapping"]),
    guidance=st.sampled_from([1.0, 2.5]),
)
@settings(max_examples=80)
def test_theorem_of_llamagen(height, width, data, stand_in, first_row, guidance):
    family, window = llamagen(height, width), data.draw(st.integers(1, width))
    plan = Plan.zipar(family.grid, window=window, stand_in=stand_in, first_row=first_row)
    check_theorem(family, plan, SamplingParams(guidance=guidance), dense(plan))


@pytest.mark.slow
@given(grid=grids(), prompt=st.integers(1, 4), data=st.data(), guidance=st.sampled_from([1.0, 2.5]))
@settings(max_examples=60)
def test_theorem_with_row_ends_previews_and_longer_prompts(grid, prompt, data, guidance):
    family = StockLlama(grid, prompt=prompt)
    plan = Plan.zipar(grid, **data.draw(windows(grid)), prompt=prompt)
    check_theorem(family, plan, SamplingParams(guidance=guidance, top_k=4, top_p=0.9, temperature=0.8), dense(plan))


@pytest.mark.slow
@pytest.mark.parametrize(("window", "guidance"), [(5, 1.0), (3, 2.0), (2, 1.0), (1, 2.0)])
@pytest.mark.parametrize("kind", [dense, block])
def test_theorem_with_padded_captions(window, guidance, kind):
    """Whatever stands where padding is, nothing else changes: no token sees it."""
    family = llamagen_t2i(4, 5)
    plan = Plan.zipar(family.grid, window=window, prompt=3)
    captions = family.check([torch.randn(n, 6) for n in (3, 1, 2)])
    codes, seen = drawn_and_seen(family, plan, SamplingParams(guidance=guidance), captions, images=3)
    forced_codes, forced_captions = codes, captions
    if guidance != 1:
        null = family.drop(captions, torch.ones(3, dtype=torch.bool))
        forced_codes = torch.cat([codes, codes])
        forced_captions = type(captions)(*(torch.cat(both) for both in zip(captions, null, strict=True)))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        forced = teacher_forced(family, plan, forced_codes, forced_captions, kind(plan))
    assert (forced - seen).abs().max() <= 1e-10
    noise = captions.features + 9 * captions.padding[..., None] * torch.randn(3, 3, 6)
    again, also = drawn_and_seen(family, plan, SamplingParams(), captions._replace(features=noise), images=3)
    plain, saw = drawn_and_seen(family, plan, SamplingParams(), captions, images=3)
    assert torch.equal(plain, again)
    assert (also - saw).abs().max() <= 1e-10
    shown = captions._replace(padding=torch.zeros_like(captions.padding))
    assert (drawn_and_seen(family, plan, SamplingParams(), shown, images=3)[1] - saw).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("window", "guidance"), [(6, 1.0), (3, 2.0), (2, 1.0), (1, 2.0)])
def test_theorem_with_the_block_mask(window, guidance):
    """FlexAttention runs uncompiled here: inductor has no CPU kernel for masks that capture tensors."""
    family = llamagen(6, 6)
    plan = Plan.zipar(family.grid, window=window)
    labels = torch.tensor([0, 2])
    codes, seen = drawn_and_seen(family, plan, SamplingParams(guidance=guidance), labels)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        forced = teacher_forced(family, plan, codes, labels, block(plan))
    assert (forced - seen[:2]).abs().max() <= 1e-10
    again, _ = drawn_and_seen(family, plan, SamplingParams(guidance=guidance), labels)  # and drawing goes back to sdpa
    assert torch.equal(again, codes)


def check_theorem_with_both_masks(device: str, side: int, window: int) -> None:
    """Drawn in float64, then in one pass of each mask; FlexAttention in float32, as compiled kernels take it.

    A head is 64 wide: compiled FlexAttention refuses less than 16.
    """
    family = llamagen(side, side, head=64, device=device)
    plan = Plan.zipar(family.grid, window=window)
    labels = torch.tensor([0, 2], device=device)
    codes, seen = drawn_and_seen(family, plan, SamplingParams(guidance=2.0), labels)
    with torch.no_grad():
        forced = teacher_forced(family, plan, codes, labels, dense(plan, device=device))
        assert (forced - seen[:2]).abs().max() <= 1e-10 * forced.abs().max()
        family.model.to(torch.float32)
        flex = teacher_forced(family, plan, codes, labels, block(plan, device=device))
    assert (flex - forced).abs().max() <= 1e-3 * forced.abs().max()
    assert forced.std() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("window", [24, 16, 4, 1])
def test_theorem_on_a_gpu(window):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check_theorem_with_both_masks("cuda", 24, window)


@pytest.mark.parametrize("window", [12, 4, 1])
def test_theorem_as_on_a_gpu(window):
    """The same on the CPU, where FlexAttention runs uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        check_theorem_with_both_masks("cpu", 12, window)


def test_the_widest_window_is_a_stock_causal_model():
    """Greedy codes equal transformers' own generate, and logits a causal forward with no mask of ours."""
    family = llamagen(5, 6)
    plan = Plan.raster(family.grid)
    labels = torch.tensor([0, 1, 2])
    codes, seen = drawn_and_seen(family, plan, SamplingParams(temperature=0), labels)
    prompt = family.codebook_size + labels[:, None]
    generated = family.model.generate(prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False)[:, 1:]
    assert torch.equal(codes, generated)
    with torch.no_grad():
        causal = family.model(torch.cat([prompt, codes[:, :-1]], dim=1)).logits
    assert (causal - seen).abs().max() <= 1e-10


def test_the_widest_window_with_row_ends_is_a_stock_causal_model():
    grid = Grid(4, 5, row_end=True)
    family, labels = StockLlama(grid, prompt=3), torch.tensor([0, 1])
    codes, seen = drawn_and_seen(family, Plan.raster(grid, prompt=3), SamplingParams(), labels)
    ends = torch.full((2, 4, 1), family.codebook_size)
    raster = torch.cat([codes.view(2, 4, 5), ends], dim=2).flatten(1)[:, :-1]
    prompt = (family.codebook_size + 1 + labels)[:, None].expand(-1, 3)
    with torch.no_grad():
        causal = family.model(torch.cat([prompt, raster], dim=1)).logits[:, 2:, : family.codebook_size]
    keep = [grid.rows[row].position + column for row in range(4) for column in range(5)]
    assert (causal[:, keep] - seen).abs().max() <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("window", [6, 4, 2, 1])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_is_the_same_in_any_batch(window, guidance):
    family = llamagen(6, 6, dtype=torch.float32)
    decoder, sampling = Decoder(family, Plan.zipar(family.grid, window=window)), SamplingParams(guidance=guidance)
    labels, numbers = [k % 3 for k in range(16)], code_seeds(list(range(16)), 36, seed=5)
    whole = decoder(labels, numbers, sampling)
    for size in (1, 3):
        parts = [decoder(labels[i : i + size], numbers[i : i + size], sampling) for i in range(0, 16, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(decoder(labels, numbers, sampling), whole)
    assert not torch.equal(decoder(labels, code_seeds(list(range(16)), 36, seed=6), sampling), whole)


def test_guidance_of_one_is_none_and_more_is_more():
    family = llamagen(4, 4)
    plan, labels = Plan.zipar(family.grid, window=2), torch.tensor([0, 1])
    plain, seen = drawn_and_seen(family, plan, SamplingParams(temperature=0), labels)
    assert seen.shape[0] == 2
    guided, seen = drawn_and_seen(family, plan, SamplingParams(temperature=0, guidance=3.0), labels)
    assert seen.shape[0] == 4
    mixed = seen[2:] + (seen[:2] - seen[2:]) * 3.0
    assert torch.equal(guided, mixed.argmax(-1))
    assert not torch.equal(plain, guided)


def test_a_plan_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="does not fit a model of 4 x 4 codes"):
        Decoder(llamagen(4, 4), Plan.raster(Grid(5, 4)))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 0), "float32"), ((2, -1), "int64"), ((1, 0), "int64"), ((0,), "int64")]
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_numbers_that_are_no_seeds_are_refused(adaptive, shape, dtype, guidance):
    """Numbers below 1 would all be seed 0, the same noise for every code of every image."""
    family = llamagen(4, 4)
    decoder = AdaptiveDecoder(family, window=2) if adaptive else Decoder(family, Plan.raster(family.grid))
    *images, more = shape
    numbers = torch.rand(*images, decoder.numbers + more).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"make them with zipar_train.code_seeds.range.2., {decoder.numbers}, seed=0"):
        decoder([0, 1], numbers, SamplingParams(guidance=guidance))


def test_packed_weights_draw_the_same_codes():
    """float32; the whole model is packed, and what it saw equals one teacher-forced pass of the stock model."""
    plain, family = (llamagen(6, 6, dtype=torch.float32) for _ in range(2))
    assert fuse_for_inference(family.model, least=0)
    assert not any(type(module) is torch.nn.Linear for module in family.model.modules())
    assert sum(isinstance(module, Packed) for module in family.model.modules()) == 2 * 4 + 1
    labels, sampling = torch.tensor([0, 2, 1]), SamplingParams()
    for window in (6, 3, 1):
        plan = Plan.zipar(family.grid, window=window)
        codes, seen = drawn_and_seen(family, plan, sampling, labels)
        assert torch.equal(codes, drawn_and_seen(plain, plan, sampling, labels)[0])
        with torch.no_grad():
            forced = teacher_forced(plain, plan, codes, labels, dense(plan))
        assert (forced - seen).abs().max() <= 1e-4 * forced.abs().max()


@pytest.mark.parametrize("window", [5, 3, 1])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_theorem_between_the_drawing_body_and_the_stock_one(window, guidance):
    """2-D rotation and prompts that rotate by zero, and a stock Llama of grouped queries and row ends.

    The stock model's norms are float32 in a float64 model, the drawing body's are not.
    """
    for make in (lambda: llamagen(5, 5), lambda: grouped(Grid(5, 4, row_end=True))):
        stock, family = make(), make()
        assert fuse_for_inference(family.model)
        plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length)
        labels = torch.tensor([0, 2, 1])
        codes, seen = drawn_and_seen(family, plan, SamplingParams(guidance=guidance), labels)
        with torch.no_grad():
            forced = teacher_forced(family, plan, codes, labels, dense(plan))
            assert (forced - seen[:3]).abs().max() <= 1e-10
            assert (forced - teacher_forced(stock, plan, codes, labels, dense(plan))).abs().max() <= 1e-5


def test_models_that_are_no_stock_llamas_stay_as_they_are():
    family = llamagen(4, 4)
    family.model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
    body = family.model.model
    assert not fuse_for_inference(family.model)
    assert family.model.model is body


@pytest.mark.parametrize("window", [6, 3, 1])
def test_theorem_in_bfloat16(window):
    """To rounding: 8 bits of it, through two layers of large weights."""
    family = llamagen(6, 6, dtype=torch.bfloat16)
    plan, labels = Plan.zipar(family.grid, window=window), torch.tensor([0, 2, 1])
    codes, seen = drawn_and_seen(family, plan, SamplingParams(), labels)
    with torch.no_grad():
        forced = teacher_forced(family, plan, codes, labels, dense(plan))
    off = (forced - seen).float().square().mean().sqrt() / forced.float().square().mean().sqrt()
    assert off < 0.02


def test_only_large_weights_in_float32_or_a_supported_bfloat16_are_packed():
    def count(family, least):
        fuse_for_inference(family.model, least=least)
        return sum(isinstance(module, Packed) for module in family.model.modules())

    assert count(llamagen(2, 2), 0) == 0
    assert count(llamagen(2, 2, dtype=torch.float32), 48 * 16 + 1) == 0
    assert count(llamagen(2, 2, dtype=torch.float32), 48 * 16) == 2 * 2  # queries, keys and values; gate and up
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert count(llamagen(2, 2, dtype=torch.bfloat16), 48 * 16) == 2 * 2 * supported


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU")
def test_a_packed_bfloat16_product_equals_the_plain_one():
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    layer = packed(weight, least=0)
    assert isinstance(layer, Packed)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-7, atol=1e-2)


def test_an_image_does_not_see_the_one_before():
    """The cache is used again; another batch size, an interrupted image and another condition leave no trace."""
    family, sampling = llamagen(5, 5), SamplingParams(guidance=2.0)
    plan = Plan.zipar(family.grid, window=2)
    numbers = code_seeds([0, 1], 25, seed=0)
    fresh = Decoder(family, plan)([0, 1], numbers, sampling)
    decoder = Decoder(family, plan)

    def interrupt(targets, logits):
        if 12 in targets[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder([2, 2], numbers.flip(0), sampling, observe=interrupt)
    cache = decoder.state.cache.slot_layers[0]
    memory = cache.keys.data_ptr()
    assert torch.equal(decoder([0, 1], numbers, sampling), fresh)
    assert cache.keys.data_ptr() == memory
    assert torch.equal(decoder([1], numbers[1:], sampling), fresh[1:])
