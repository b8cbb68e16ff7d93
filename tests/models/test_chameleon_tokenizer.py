"""Chameleon's image tokenizer, which Lumina-mGPT uses, against Meta's from their published files."""

from pathlib import Path

import pytest
import torch
from lumina_files import CODES, ORDER, SHAPE, VQ, published
from torch import nn
from torch.nn.functional import interpolate, silu
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from zipar_train.models.tokenizers.chameleon import load_chameleon_vq


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("lumina"))


class Block(nn.Module):
    """taming-transformers' residual block, in our words."""

    def __init__(self, state, name):
        super().__init__()
        self.state, self.name = state, name

    def forward(self, x):
        def part(kind, h):
            return nn.functional.group_norm(h, 32, *self.of(kind), eps=1e-6)

        h = nn.functional.conv2d(silu(part("norm1", x)), *self.of("conv1"), padding=1)
        h = nn.functional.conv2d(silu(part("norm2", h)), *self.of("conv2"), padding=1)
        if f"{self.name}.nin_shortcut.weight" in self.state:
            x = nn.functional.conv2d(x, *self.of("nin_shortcut"))
        return x + h

    def of(self, kind):
        return self.state[f"{self.name}.{kind}.weight"], self.state[f"{self.name}.{kind}.bias"]


def tamings_decoder(state, z):
    """taming-transformers' decoder by its own names of tensors, written a second time."""

    def conv(name, x, padding=0):
        return nn.functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    h = conv("decoder.conv_in", conv("post_quant_conv", z), 1)
    h = Block(state, "decoder.mid.block_1")(h)
    name = "decoder.mid.attn_1"
    n = nn.functional.group_norm(h, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], eps=1e-6)
    q, k, v = (conv(f"{name}.{part}", n).flatten(2).transpose(1, 2) for part in "qkv")
    attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(h)
    h = Block(state, "decoder.mid.block_2")(h + conv(f"{name}.proj_out", attended))
    for level in reversed(range(len(VQ["channel_multiplier"]))):
        for block in range(VQ["num_res_blocks"] + 1):
            h = Block(state, f"decoder.up.{level}.block.{block}")(h)
        if level:
            h = conv(f"decoder.up.{level}.upsample.conv", interpolate(h, scale_factor=2.0, mode="nearest"), 1)
    out = nn.functional.group_norm(h, 32, state["decoder.norm_out.weight"], state["decoder.norm_out.bias"], eps=1e-6)
    return conv("decoder.conv_out", silu(out), 1)


def test_the_image_tokenizer_is_metas(checkpoint):
    """Decoding against a second implementation, encoding against transformers', both in the vocabulary's order."""
    state = torch.load(checkpoint / "vqgan.ckpt", weights_only=True)["state_dict"]
    tokenizer = load_chameleon_vq(str(checkpoint), codes=CODES)
    codes = torch.randint(CODES, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    row_of = torch.tensor([ORDER.index(code) for code in range(CODES)])
    exact = {name: tensor.double() for name, tensor in state.items()}
    expected = tamings_decoder(exact, exact["quantize.embedding.weight"][row_of[codes]].permute(0, 3, 1, 2))
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (2, 3, 64, 96)
    assert (pixels - (127.5 * expected + 128).clamp(0, 255)).abs().max() < 1.1
    tokenizer.model.double()
    assert (tokenizer.images(codes) - expected).abs().max() < 1e-10 * expected.abs().max()
    tokenizer.model.float()
    pixels = torch.randint(256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    theirs = ChameleonForConditionalGeneration(ChameleonConfig(**SHAPE, vq_config=VQ)).model
    theirs.vqmodel.load_state_dict({n: t for n, t in state.items() if not n.startswith(("decoder.", "loss."))})
    ids = theirs.get_image_tokens(pixels / 127.5 - 1)
    assert torch.equal(tokenizer.encode(pixels), ids.view(2, 4, 6).long() - 4)
    assert len(ids.unique()) > 2


def test_a_folder_without_metas_files_is_told_where_they_are(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"holds no vqgan.ckpt.*facebookresearch/chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)
    (tmp_path / "vqgan.ckpt").write_bytes((checkpoint / "vqgan.ckpt").read_bytes())
    (tmp_path / "text_tokenizer.json").write_text('{"model": {"vocab": {"IMGIMGAZ": 5}}}')
    with pytest.raises(ValueError, match="is not a vocabulary of Chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)
    (tmp_path / "text_tokenizer.json").write_bytes((checkpoint / "text_tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="a codebook of 10 rows and a vocabulary of 10 codes, the recipe's model 11"):
        load_chameleon_vq(str(tmp_path), codes=11)
    torch.save({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match="is not an image tokenizer of Chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)
