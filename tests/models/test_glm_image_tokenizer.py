"""GLM-Image's image tokenizer against transformers' encoder and diffusers' pipeline."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from glm_image_files import CODES, StandIn, section, write_checkpoint
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, GlmImageForConditionalGeneration

from zipar_train.decoding.images import Images
from zipar_train.decoding.pixel_stream import PixelStream
from zipar_train.models.tokenizers.base import build_tokenizer
from zipar_train.models.tokenizers.glm_image import load_glm_image_vq, prior_token_ids

STAGE = "vision_language_encoder"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("glm-image"))


def pixels(images, height, width, seed=0):
    """Blurred noise, uint8 (B, 3, height, width)."""
    noise = torch.rand(images, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (255 * interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def test_codes_are_those_of_source_images_in_transformers(checkpoint):
    """Sides halved by its image processor, then the vision tower and the codebook; of more images than a chunk."""
    theirs = GlmImageForConditionalGeneration.from_pretrained(checkpoint / STAGE).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint / "processor")
    tokenizer, images = build_tokenizer(section(checkpoint)), pixels(6, 96, 128)
    assert (tokenizer.stride, tokenizer.codebook_size) == (32, CODES)
    inputs = processor(images=[Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 3, 4]] * 6
    with torch.no_grad():
        features = theirs.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        expected = theirs.get_image_tokens(features).view(6, 3, 4)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, expected) and len(codes.unique()) > 5
    assert torch.equal(load_glm_image_vq(str(checkpoint / STAGE), codes=CODES).encode(images), codes)


def test_codes_for_the_diffusion_stage(tmp_path):
    """As diffusers' `_upsample_token_ids`: nearest, twice as many in both directions, raster order."""
    codes = torch.randint(CODES, (2, 3, 4))
    expected = interpolate(codes[:, None].float(), scale_factor=2, mode="nearest").long().flatten(1)
    assert torch.equal(prior_token_ids(codes), expected)
    previews = torch.randint(CODES, (2, 2, 3))
    Images(codes, torch.tensor([7, 7]), None, previews).save_codes(tmp_path / "codes.safetensors")
    saved = load_file(tmp_path / "codes.safetensors")
    assert saved.keys() == {"codes", "passes", "previews", "prior_token_ids"}
    assert torch.equal(saved["prior_token_ids"], expected) and torch.equal(saved["previews"], previews)
    Images(codes, torch.tensor([7, 7]), None).save_codes(tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors").keys() == {"codes", "passes"}


def test_pixels_by_a_stand_in_for_diffusers(checkpoint, tmp_path, monkeypatch):
    """The same noise for every image, whatever its batch; without the autoregressive stage and its processor."""
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(GlmImagePipeline=StandIn))
    folder = tmp_path / "whole"
    shutil.copytree(checkpoint, folder)
    with pytest.raises(ValueError, match=r"no diffusion stage of GLM-Image can be loaded \(no transformer\)"):
        PixelStream(load_glm_image_vq(str(folder), codes=CODES), torch.device("cpu"))
    (folder / "transformer").mkdir()
    tokenizer = load_glm_image_vq(str(folder), codes=CODES)
    stream, codes = PixelStream(tokenizer, torch.device("cpu")), torch.randint(CODES, (6, 3, 4))
    assert StandIn.loaded[-1:] == [
        {"vision_language_encoder": None, "processor": None, "dtype": torch.float32, "use_safetensors": True}
    ]
    stream.add(codes)
    found = stream.all()
    assert found.shape == (6, 3, 96, 128) and found.dtype == torch.uint8
    assert torch.equal(tokenizer.decode(codes[5:]), found[5:])
    grey = interpolate(codes[:, None].float() / CODES, scale_factor=32)
    noise = found / 127.5 - grey
    assert (noise - noise[:1]).abs().max() < 0.02 and noise[0].std() > 0.1
    assert tokenizer.decode(codes[:1], size=(48, 64)).shape == (1, 3, 48, 64)
    assert tokenizer.pipeline is tokenizer.pipeline


def test_missing_parts_are_named_before_any_work(checkpoint, tmp_path, monkeypatch):
    """Nothing is generated whose pixels cannot be made."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for source, message in (
        (checkpoint / STAGE, "has no diffusion stage, which turns GLM-Image's codes into pixels. Give the whole"),
        (checkpoint, r"pip install 'zipar-train\[diffusion\]', or write the codes alone: generate --codes FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelStream(load_glm_image_vq(str(source), codes=CODES), torch.device("cpu"))
    with pytest.raises(ValueError, match="gone: give the folder of GLM-Image, or zai-org/GLM-Image:"):
        load_glm_image_vq(str(tmp_path / "gone"), codes=CODES)
    with pytest.raises(ValueError, match="has a codebook of 24 codes, the recipe's model one of 25"):
        load_glm_image_vq(str(checkpoint), codes=25)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint / STAGE, broken)
    (broken / "config.json").write_text(json.dumps({"vq_config": {}}))
    with pytest.raises(ValueError, match=r"config.json describes no image tokenizer of GLM-Image \(KeyError"):
        load_glm_image_vq(str(broken), codes=CODES)
    config = json.loads((checkpoint / STAGE / "config.json").read_text())
    config["vision_config"]["depth"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no image tokenizer of GLM-Image. .* missing: visual.blocks.1"):
        load_glm_image_vq(str(broken), codes=CODES)


def write_diffusion_stage(folder: Path) -> None:
    """A tiny diffusion stage beside the autoregressive one, by diffusers itself."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=None,
        text_encoder=T5EncoderModel(text),
        vision_language_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)


def test_pixels_by_diffusers(checkpoint, tmp_path):
    """A tiny random stage, from its folder: the codes decide, and an image does not depend on its batch."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "whole"
    shutil.copytree(checkpoint, folder)
    write_diffusion_stage(folder)
    tokenizer, codes = load_glm_image_vq(str(folder), codes=CODES), torch.randint(CODES, (2, 2, 3))
    upsampled = [diffusers.GlmImagePipeline._upsample_token_ids(each, 2, 3) for each in codes]
    assert torch.equal(prior_token_ids(codes), torch.cat(upsampled))
    found = tokenizer.decode(codes)
    assert found.shape == (2, 3, 64, 96) and found.dtype == torch.uint8
    assert (tokenizer.decode(codes[1:]).int() - found[1:].int()).abs().max() <= 1
    assert (found[0].int() - found[1].int()).abs().max() > 1
