"""The interface of image tokenizers, the palette tokenizer, and the choice by recipe."""

from typing import Protocol

import torch
from torch import Tensor

from zipar_train.recipe.model import Model


class Tokenizer(Protocol):
    @property
    def stride(self) -> int:
        """Return the pixels per code in each direction."""

    @property
    def sha256(self) -> str | None:
        """Return the SHA-256 of the file that the weights come from; None if there is none."""

    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), resized to `size` as in LlamaGen.

        Args:
            size: Height and width in pixels; None: no resizing.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), to codes, int64 (B, H, W)."""


class Palette:
    """A tokenizer with one code per pixel: code i is colour i.

    Args:
        colours: RGB colours, uint8 (V, 3).
    """

    stride, sha256 = 1, None

    def __init__(self, colours: Tensor):
        self.colours = colours

    @classmethod
    def grey(cls, levels: int) -> "Palette":
        """Return a palette of `levels` evenly spaced greys from black to white."""
        ramp = torch.linspace(0, 255, levels).round().to(torch.uint8)
        return cls(ramp[:, None].expand(-1, 3).contiguous())

    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        pixels = self.colours.to(codes.device)[codes].permute(0, 3, 1, 2).contiguous()
        if size is None or pixels.shape[-2:] == size:
            return pixels
        from zipar_train.models.tokenizers.vq16 import to_bytes

        return to_bytes(pixels / 127.5 - 1, size=size)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the nearest colour of every pixel, int64 (B, H, W)."""
        flat = pixels.permute(0, 2, 3, 1).float()
        colours = self.colours.to(pixels.device).float()
        return torch.cdist(flat.reshape(len(flat), -1, 3), colours[None]).argmin(-1).reshape(flat.shape[:3])


def build_tokenizer(model: Model) -> Tokenizer | None:
    """Build the recipe's tokenizer and load its weights; None if the recipe has none.

    Raises:
        ValueError: If the weights cannot be read, or do not fit.
    """
    if model.tokenizer == "vq16":
        from zipar_train.models.tokenizers.vq16 import load_vq16

        return load_vq16(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "emu3":
        from zipar_train.models.tokenizers.emu3 import load_emu3_vq

        return load_emu3_vq(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "glm-image":
        from zipar_train.models.tokenizers.glm_image import load_glm_image_vq

        return load_glm_image_vq(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "chameleon":
        from zipar_train.models.tokenizers.chameleon import load_chameleon_vq

        return load_chameleon_vq(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "cosmos":
        from zipar_train.models.tokenizers.cosmos import load_cosmos

        return load_cosmos(model.tokenizer_weights, codes=model.codebook_size)
    return Palette.grey(model.codebook_size) if model.tokenizer == "palette" else None
