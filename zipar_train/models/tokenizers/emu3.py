"""Emu3's image tokenizer, 8 pixels per code, as transformers' Emu3VQVAE."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Emu3VQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig

from zipar_train.io.files import regular
from zipar_train.models.files import find, read_folder
from zipar_train.models.filling import filled
from zipar_train.models.tokenizers.vq16 import fingerprint, to_bytes

CHUNK = 4  # images per pass through the convolutions


class Emu3VQ:
    """A tokenizer between images and codes of Emu3's codebook.

    Args:
        sha256: Checksum of the weights; None: random weights.
    """

    def __init__(self, model: Emu3VQVAE, *, sha256: str | None = None):
        self.model, self.sha256 = model.eval().requires_grad_(False), sha256
        self.stride, self.codebook_size = model.spatial_scale_factor, model.config.codebook_size

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), multiples of the stride, to codes, int64 (B, H, W)."""
        model, size = self.model.to(pixels.device), torch.tensor([pixels.shape[-2:]])
        found = []
        for chunk in pixels.split(CHUNK):
            images = chunk / 127.5 - 1
            found += model.encode(images, size.expand(len(chunk), 2)).image_tokens
        return torch.stack(found)

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), resized to `size` if given."""
        model = self.model.to(codes.device)
        return torch.cat([to_bytes(model.decode(chunk).float(), size=size) for chunk in codes.split(CHUNK)])


def load_emu3_vq(source: str | None, *, codes: int) -> Emu3VQ:
    """Load the tokenizer from an Emu3 checkpoint in transformers' layout.

    Args:
        source: The checkpoint; None: random weights.
        codes: Codebook size.

    Raises:
        ValueError: If the folder contains no tokenizer, or if the codebook size is not `codes`.
    """
    if source is None:
        return Emu3VQ(Emu3VQVAE(Emu3VQVAEConfig(codebook_size=codes)))
    path = find(source)
    if not path.is_dir():
        raise ValueError(
            f"model.tokenizer_weights = {path}: give the folder of an Emu3 checkpoint, or BAAI/Emu3-Gen-hf:"
        )
    state = read_folder(path, prefix="vqmodel.") or read_folder(path, prefix="model.vqmodel.")
    state = {name.partition("vqmodel.")[2]: tensor for name, tensor in state.items()}
    config, what = _config(path), "holds no image tokenizer of Emu3. Give the published checkpoint"
    model = filled(lambda: Emu3VQVAE(config), state, where=path, what=what, device="cpu")
    if model.config.codebook_size != codes:
        raise ValueError(
            f"{path} has a codebook of {model.config.codebook_size} codes, the recipe's model one of {codes}"
        )
    return Emu3VQ(model, sha256=fingerprint(state))


def _config(path: Path) -> Emu3VQVAEConfig:
    try:
        return Emu3VQVAEConfig(**json.loads(regular(path / "config.json").read_bytes())["vq_config"])
    except Exception as error:  # from JSON, or from transformers' validation
        raise ValueError(f"{path}/config.json describes no vq_config of Emu3 ({error!r})") from None
