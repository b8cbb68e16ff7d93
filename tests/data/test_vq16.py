"""VQ-16, LlamaGen's image tokenizer: the original's codes and pixels; the weights of another are refused."""

import os

import original
import pytest
import torch
from commands import picture

from zipar_train.data.crops import views
from zipar_train.models.tokenizers.vq16 import load_vq16


@pytest.mark.parametrize("size", [32, 48])
def test_the_tokenizer_is_the_originals(tmp_path, size):
    state, shape = original.random_vq(seed=1)
    state["quantize.embedding.weight"] *= torch.rand(24, 1) + 0.5  # rows of any length
    torch.save({"model": state}, tmp_path / "vq.pt")
    ours = load_vq16(str(tmp_path / "vq.pt"), codes=24)
    pixels = torch.stack([views(picture(i), size, size, "one")[0] for i in range(3)])
    codes = original.vq_encode(state, pixels / 127.5 - 1, **shape)
    assert torch.equal(ours.encode(pixels), codes)
    assert len(codes.unique()) > 3
    theirs = original.vq_decode(state, codes, **shape)
    assert (ours.images(codes) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    off = ours.decode(codes).int() - (127.5 * theirs + 128).clamp(0, 255).to(torch.uint8).int()
    assert off.abs().max() <= 1  # a value on the brink of two bytes
    assert (off == 0).float().mean() > 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mult": (1, 1, 1, 2)}, "is a VQ-8, not a VQ-16: a code is 8 pixels wide"),
        ({"codes": 25}, "has a codebook of 25 codes, the recipe's model one of 24"),
        ("encoder.norm_out.bias", "is not a VQ-16 of LlamaGen. 1 missing: encoder.norm_out.bias"),
        ("quant_conv.weight", "is not a VQ-16 of LlamaGen: it lacks quant_conv.weight"),
        ("cut", "is not a readable file of weights"),
        (None, "is not a VQ-16 of LlamaGen. 1 surplus: loss.weight"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, change, message):
    path = tmp_path / "vq.pt"
    state = original.random_vq(**(change if isinstance(change, dict) else {}))[0]
    if change is None:
        state["loss.weight"] = torch.zeros(1)
    torch.save({"model": {name: tensor for name, tensor in state.items() if name != change}}, path)
    if change == "cut":
        os.truncate(path, 10_000)
    with pytest.raises(ValueError, match=message):
        load_vq16(str(path), codes=24)
