"""GLM-Image's image tokenizer, 32 pixels per code: a vision tower and a VQ encoder, and a diffusion stage as decoder.

Encoding is that of source images in diffusers' GlmImagePipeline (`generate_prior_tokens`). Its GlmImageImageProcessor
halves the sides of an image (`smart_resize`), and the vision tower has one code per 16 x 16 pixels of the result.

Decoding needs the package diffusers and the published folder. The diffusion stage starts from noise, so pixels are
one sample of many: here always from the same noise.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.glm_image.configuration_glm_image import GlmImageVQVAEConfig

from zipar_train.io.files import regular
from zipar_train.models.files import find, read_folder
from zipar_train.models.filling import filled
from zipar_train.models.tokenizers.vq16 import fingerprint, to_bytes

CHUNK = 4  # images per pass
HALVED = 2  # `smart_resize` of transformers' image_processing_glm_image.py
STAGE = "vision_language_encoder"  # folder of the autoregressive stage in the published checkpoint


class GlmImageEncoder(nn.Module):
    """The parts of GlmImageModel that turn images into codes, under its names."""

    def __init__(self, vision: GlmImageVisionConfig, vq: GlmImageVQVAEConfig):
        super().__init__()
        self.visual, self.vqmodel = GlmImageVisionModel(vision), GlmImageVQVAE(vq)

    def forward(self, patches: Tensor, sizes: Tensor) -> Tensor:
        """Return codes (B H W) of B images of one size.

        Args:
            patches: (B H W, 3 p p), p the patch size, image by image, row by row.
            sizes: 1, H and W of each image, int64 (B, 3).
        """
        height, width = sizes[0, 1:].tolist()
        features = self.visual(patches, grid_thw=sizes, return_dict=True).pooler_output
        features = features.view(len(sizes), height, width, -1).permute(0, 3, 1, 2)
        return self.vqmodel.encode(features.contiguous()).image_tokens


class GlmImageVQ:
    """A tokenizer between images and codes of GLM-Image.

    Args:
        model: The encoder.
        folder: The published checkpoint, with the diffusion stage; None: encoding only.
        sha256: Checksum of the encoder's weights; None: random weights.
    """

    def __init__(self, model: GlmImageEncoder, *, folder: Path | None = None, sha256: str | None = None):
        self.model, self.folder, self.sha256 = model.eval().requires_grad_(False), folder, sha256
        self.patch: int = model.visual.patch_size  # type: ignore[assignment]
        self.stride, self.codebook_size = HALVED * self.patch, model.vqmodel.config.num_embeddings

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), multiples of the stride, to codes, int64 (B, H, W)."""
        model = self.model.to(pixels.device)
        height, width = (side // self.stride for side in pixels.shape[-2:])
        mean, std = (pixels.new_tensor(each, dtype=torch.float).view(3, 1, 1) for each in MOMENTS)
        found = []
        for chunk in pixels.split(CHUNK):
            small = resize(chunk, [height * self.patch, width * self.patch], InterpolationMode.BICUBIC, antialias=True)
            images = (small - 255 * mean) / (255 * std)
            parts = images.view(len(images), 3, height, self.patch, width, self.patch).permute(0, 2, 4, 1, 3, 5)
            sizes = torch.tensor([[1, height, width]] * len(chunk), device=pixels.device)
            found.append(model(parts.reshape(len(chunk) * height * width, -1), sizes).view(-1, height, width))
        return torch.cat(found)

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), resized to `size` if given.

        The diffusion stage also reads the quoted words of a caption, to write them legibly. Here it gets none.

        Raises:
            ValueError: If diffusers or the weights of the diffusion stage are missing.
        """
        height, width = (self.stride * side for side in codes.shape[1:])
        pipeline, found = self.pipeline.to(codes.device), []
        for chunk in codes.split(CHUNK):
            images = pipeline(
                prompt=[""] * len(chunk),
                prior_token_ids=prior_token_ids(chunk),
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(0) for _ in chunk],
                output_type="pt",
            ).images
            found.append(to_bytes(images.float() * 2 - 1, size=size))
        return torch.cat(found)

    def prepare(self) -> None:
        """Load what decoding needs, before any work.

        Raises:
            ValueError: As in `decode`.
        """
        _ = self.pipeline

    @cached_property
    def pipeline(self) -> Any:
        """The diffusion stage: diffusers' GlmImagePipeline without its autoregressive stage."""
        if self.folder is None:
            raise ValueError(
                "model.tokenizer_weights has no diffusion stage, which turns GLM-Image's codes into pixels. Give the "
                "whole published folder, or zai-org/GLM-Image:, or write the codes alone: generate --codes FILE"
            )
        try:
            from diffusers import GlmImagePipeline
        except ImportError as error:
            raise ValueError(
                f"diffusers, which turns GLM-Image's codes into pixels, cannot be imported ({error}). Install it: "
                "pip install 'zipar-train[diffusion]', or write the codes alone: generate --codes FILE"
            ) from error
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        try:
            pipeline = GlmImagePipeline.from_pretrained(
                self.folder, vision_language_encoder=None, processor=None, dtype=dtype, use_safetensors=True
            )
        except Exception as error:  # from diffusers, transformers or safetensors: many classes
            raise ValueError(
                f"model.tokenizer_weights = {self.folder}: no diffusion stage of GLM-Image can be loaded ({error}). "
                "Download the published folder again"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


MOMENTS = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # of RGB, the image processor's


def prior_token_ids(codes: Tensor) -> Tensor:
    """Return codes (B, H, W) as the diffusion stage takes them, int64 (B, 4 H W): each one twice in both directions.

    Source: diffusers, GlmImagePipeline._upsample_token_ids.
    """
    return codes.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def load_glm_image_vq(source: str | None, *, codes: int) -> GlmImageVQ:
    """Load the tokenizer from a GLM-Image checkpoint.

    Args:
        source: The published folder, or that of its autoregressive stage alone, which cannot decode; None: random
            weights.
        codes: Codebook size.

    Raises:
        ValueError: If the folder contains no tokenizer, or if the codebook size is not `codes`.
    """
    if source is None:
        return GlmImageVQ(GlmImageEncoder(GlmImageVisionConfig(), GlmImageVQVAEConfig(num_embeddings=codes)))
    path = find(source)
    if not path.is_dir():
        raise ValueError(f"model.tokenizer_weights = {path}: give the folder of GLM-Image, or zai-org/GLM-Image:")
    whole = (path / "model_index.json").is_file()
    stage = path / STAGE if whole else path
    state = read_folder(stage, prefix="model.visual.") | read_folder(stage, prefix="model.vqmodel.")
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    configs, what = _configs(stage), "holds no image tokenizer of GLM-Image. Give the published checkpoint"
    model = filled(lambda: GlmImageEncoder(*configs), state, where=stage, what=what, device="cpu")
    if (found := model.vqmodel.config.num_embeddings) != codes:
        raise ValueError(f"{stage} has a codebook of {found} codes, the recipe's model one of {codes}")
    return GlmImageVQ(model, folder=path if whole else None, sha256=fingerprint(state))


def _configs(path: Path) -> tuple[GlmImageVisionConfig, GlmImageVQVAEConfig]:
    try:
        content = json.loads(regular(path / "config.json").read_bytes())
        return GlmImageVisionConfig(**content["vision_config"]), GlmImageVQVAEConfig(**content["vq_config"])
    except Exception as error:  # from JSON, or from transformers' validation
        raise ValueError(f"{path}/config.json describes no image tokenizer of GLM-Image ({error!r})") from None
