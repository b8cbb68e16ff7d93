"""Int8 weights: a product against float64, a model against one with the same weights in float, and what is loaded."""

from pathlib import Path

import pytest
import small
import torch
from families import llamagen
from theorem import drawn_and_seen
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from zipar_train import Grid, Plan
from zipar_train.decoding import load_fused, memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.generator import Generator, load
from zipar_train.decoding.int8 import Int8Linear, int8_layers, to_int8
from zipar_train.decoding.onednn import packed
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import build, teacher_forced
from zipar_train.models.restore import LoadedWeights
from zipar_train.plan.masks import dense
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams


def rounded(x):
    """A matrix as it is after rounding each of its rows to 255 equal steps around zero, in float64."""
    step = x.float().abs().amax(-1, keepdim=True) / 127  # in float32 as in the layer: bfloat16 numbers are often ties
    return (x.float() / step).round().double() * step


@pytest.mark.parametrize("shape", [(1, 64), (2, 1, 64), (3, 5, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["with_rounded_input", "with_exact_input"])
def test_the_product_is_that_of_the_rounded_weight(shape, dtype, way):
    torch.manual_seed(0)
    weight, x = torch.randn(100, 64), torch.randn(shape).to(dtype)
    layer = Int8Linear(weight)
    product = getattr(layer, way)(x)
    exact = linear(rounded(x) if way == "with_rounded_input" else x.double(), rounded(weight))
    assert product.dtype == dtype and product.shape == (*shape[:-1], 100)
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)  # sums in float32
    assert (product.double() - linear(x.double(), weight.double())).norm() <= 0.02 * exact.norm()
    assert torch.equal(layer(x), layer.with_rounded_input(x))  # on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_output_is_rounded_to_its_own_scale(monkeypatch, dtype):
    """By at most half a step, with rows of very different sizes, a few at a time."""
    monkeypatch.setattr("zipar_train.decoding.int8.AT_ONCE", 5 * 48)
    torch.manual_seed(0)
    weight = (torch.randn(32, 48) * torch.logspace(-3, 3, 32)[:, None]).to(dtype)
    weight[5] = 0
    layer = Int8Linear(weight)
    assert layer.weight.dtype == torch.int8 and layer.weight.shape == weight.shape and layer.weight.is_contiguous()
    assert layer.scale.dtype == torch.float32 and layer.scale.shape == (32,)
    error = (layer.weight * layer.scale[:, None].double() - weight.double()).abs()
    assert (error <= layer.scale[:, None] * 0.5001).all()
    assert layer.weight.abs().amax(1).tolist() == [0 if row == 5 else 127 for row in range(32)]


def test_a_row_gets_the_same_output_in_any_batch():
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(2304, 768)), torch.randn(33, 768)
    x[3] = 0
    whole = layer(x)
    assert not whole[3].any()
    for rows in (1, 2, 7, 16):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_integer_sums_do_not_saturate():
    layer = Int8Linear(torch.ones(16, 2048))
    torch.testing.assert_close(layer(torch.ones(2, 2048)), torch.full((2, 16), 2048.0))


def test_scales_stay_in_float32_when_a_model_is_converted():
    layer = Int8Linear(torch.randn(4, 8))
    scale, weight = layer.scale.clone(), layer.weight.clone()
    nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.scale, scale) and torch.equal(layer.weight, weight)
    assert layer.to("meta").scale.device == layer.weight.device == torch.device("meta")


class Reference(nn.Module):
    """A linear layer with a float weight that was rounded, and an input that may be."""

    def __init__(self, layer, *, rounds_input):
        super().__init__()
        self.weight, self.rounds_input = rounded(layer.weight.detach()), rounds_input
        self.bias = layer.bias

    def forward(self, x):
        product = linear(rounded(x) if self.rounds_input else x.double(), self.weight).to(x.dtype)
        return product if self.bias is None else product + self.bias


def linears(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("rounds_input", [True, False])
@pytest.mark.parametrize("kind", ["llamagen", "lumina", "emu3", "simplear"])
def test_a_model_generates_the_codes_of_one_with_rounded_float_weights(monkeypatch, kind, rounds_input):
    """Against transformers' own layers, each product in float64; with lookahead too."""
    if not rounds_input:
        monkeypatch.setattr(Int8Linear, "forward", Int8Linear.with_exact_input)
    stock, family, floats = (small.family(kind, 2, head=32) for _ in range(3))
    for each in (stock, family, floats):
        with torch.no_grad():
            for parameter in each.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
    for name in linears(stock.model.model):
        layer = stock.model.model.get_submodule(name)
        stock.model.model.set_submodule(name, Reference(layer, rounds_input=rounds_input))
    assert fuse_for_inference(family.model, int8=True)
    assert not linears(family.model.model) and len(int8_layers(family.model)) == 2 * 4
    plan, condition = Plan.zipar(stock.grid, window=2, prompt=stock.prompt_length), small.a_batch(kind, stock).condition
    codes, logits = drawn_and_seen(stock, plan, SamplingParams(), condition, images=2)
    drawn, seen = drawn_and_seen(family, plan, SamplingParams(), condition, images=2)
    assert torch.equal(drawn, codes)
    assert (seen - logits).abs().max() < 1e-4 * logits.abs().max()
    seeds = code_seeds([0, 1], plan.grid.num_codes, seed=0)
    ahead = Decoder(family, plan)(condition, seeds, SamplingParams(lookahead=5))
    assert torch.equal(ahead.flatten(1), codes)
    with torch.no_grad():
        exact = teacher_forced(floats, plan, codes, condition, dense(plan))
    assert (exact - logits).abs().max() > 1e-3 * logits.abs().max()  # rounding matters


@pytest.fixture
def saved():
    """A recipe and weights, as read from a file."""
    torch.manual_seed(0)
    recipe = load_recipe("digits-base", small.TINY)
    return recipe, LoadedWeights(Path("random"), recipe, build(recipe.model).model.state_dict(), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_as_they_are_in_their_file(saved, dtype):
    """Not as converted to the dtype of the computation; everything else is in that dtype, and the file unchanged."""
    recipe, weights = saved
    before = {name: tensor.clone() for name, tensor in weights.state.items()}
    generator = Generator(recipe, weights, device="cpu", dtype=dtype, int8=True)
    model = generator.inference_family.model
    assert {p.dtype for p in model.parameters()} == {model.lm_head.weight.dtype, model.dtype} == {dtype}
    out, scale = to_int8(weights.state["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(model.model.layers[0].out.weight, out)
    assert torch.equal(model.model.layers[0].out.scale, scale[:, 0])
    assert type(model.lm_head) is type(packed(model.lm_head.weight))  # and not an nn.Linear
    assert generator.generate([0, 3], window=2).codes.shape == (2, 8, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.saved.state.items())
    assert all(p.dtype == dtype for p in generator.load_family().model.parameters())


def test_frequencies_and_norms_are_those_of_a_float_model():
    """Chameleon's norms of queries and keys, and rotary frequencies, which are in no file."""
    family = small.family("lumina", 1)
    weights = LoadedWeights(Path("random"), None, family.model.state_dict(), {})
    floats, ours = (
        load_fused.load_fused(family.section, weights, dtype=torch.bfloat16, device="cpu", int8=int8).model.model
        for int8 in (False, True)
    )
    assert ours.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(ours.rotary_emb.inv_freq, floats.rotary_emb.inv_freq)
    for mine, theirs in zip(ours.layers[0].norms, floats.layers[0].norms, strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)


class LargestFloat(TorchDispatchMode):
    """Elements of the largest new float tensor of any operation."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta":
                fresh = tensor.untyped_storage().data_ptr() not in known
                self.most = max(self.most, tensor.numel() * fresh)
        return result


def test_one_weight_at_a_time_is_copied(saved):
    """Loading makes no float tensor larger than the largest of the joined weights; in float it copies the model."""
    recipe, weights = saved
    with LargestFloat() as seen:
        load_fused.load_fused(recipe.model, weights, dtype=torch.float32, device="cpu", int8=True)
    assert 0 < seen.most <= 2 * 32 * 16
    family = load_fused.load_fused(recipe.model, weights, dtype=torch.float32, device="cpu", int8=True)
    left = {p.data_ptr() for p in family.model.parameters()}
    assert left <= {tensor.data_ptr() for tensor in weights.state.values()}  # still those of the file


def test_what_a_batch_needs_counts_the_products(saved):
    recipe, weights = saved
    floats, whole = (Generator(recipe, weights, device="cpu", int8=int8).inference_family for int8 in (False, True))
    plan = Plan.raster(Grid(8, 8))
    need = {"rows": 2 * 5, "slots": 64}
    more = memory.decode_bytes(whole, plan, 5, **need) - memory.decode_bytes(floats, plan, 5, **need)
    assert more == 10 * (64 * 8 + 16 * 9)  # gate and up, the largest: sums in int32 and float32, rows in both too
    layer = Int8Linear(torch.randn(6, 4)).to("meta")
    assert layer.work_bytes(10, 2) == 6 * 4 * 2 + 10 * 6 * 4


def test_layers_that_cannot_be_rounded_are_refused(saved, monkeypatch):
    recipe, weights = saved
    family = llamagen(8, 8)
    family.model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(16, dtype=torch.float64))
    monkeypatch.setattr(load_fused, "load_family", lambda *given, **how: family)
    Generator(recipe, weights, device="cpu")
    with pytest.raises(ValueError, match="int8 weights need .* leave out --int8, in Python int8=True"):
        Generator(recipe, weights, device="cpu", int8=True)


def test_load_passes_int8_on(saved, tmp_path):
    recipe, weights = saved
    from safetensors.torch import save_file

    save_file(weights.state, tmp_path / "model.safetensors")
    overrides = [*small.TINY, f"model.weights={tmp_path}/model.safetensors"]
    for int8 in (False, True):
        generator = load("digits-base", overrides=overrides, device="cpu", int8=int8)
        assert generator.int8 is int8 and bool(int8_layers(generator.inference_family.model)) is int8
