"""Codes to pixels and back."""

from typing import Protocol

import torch
from torch import Tensor

from zipar_train.recipe.schema import Model


class Tokenizer(Protocol):
    @property
    def stride(self) -> int:
        """Pixels a code, each way."""

    @property
    def sha256(self) -> str | None:
        """Of the file it was read from."""

    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Pixels, uint8 (B, 3, height, width), of codes (B, H, W); resized to `size`, as LlamaGen does.

        Args:
            size: height and width in pixels; None: as decoded.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes, int64 (B, H, W), of pixels uint8 (B, 3, px, px)."""


class Palette:
    """Images whose pixels already are codes: code i is colour i.

    Args:
        colours: uint8 (V, 3).
    """

    stride, sha256 = 1, None

    def __init__(self, colours: Tensor):
        self.colours = colours

    @classmethod
    def grey(cls, levels: int) -> "Palette":
        """`levels` even steps from black to white."""
        ramp = torch.linspace(0, 255, levels).round().to(torch.uint8)
        return cls(ramp[:, None].expand(-1, 3).contiguous())

    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        pixels = self.colours.to(codes.device)[codes].permute(0, 3, 1, 2).contiguous()
        if size is None or pixels.shape[-2:] == size:
            return pixels
        from zipar_train.models.tokenizers.vq16 import to_bytes

        return to_bytes(pixels / 127.5 - 1, size=size)

    def encode(self, pixels: Tensor) -> Tensor:
        """The nearest colour of every pixel."""
        flat = pixels.permute(0, 2, 3, 1).float()
        colours = self.colours.to(pixels.device).float()
        return torch.cdist(flat.reshape(len(flat), -1, 3), colours[None]).argmin(-1).reshape(flat.shape[:3])


def build_tokenizer(model: Model) -> Tokenizer | None:
    """The recipe's tokenizer, its weights read; None: codes only.

    Raises:
        ValueError: if the weights cannot be read, or do not fit.
    """
    if model.tokenizer == "vq16":
        from zipar_train.models.tokenizers.vq16 import load_vq16

        return load_vq16(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "emu3":
        from zipar_train.models.tokenizers.emu3 import load_emu3_vq

        return load_emu3_vq(model.tokenizer_weights, codes=model.codebook_size)
    if model.tokenizer == "chameleon":
        from zipar_train.models.tokenizers.chameleon import load_chameleon_vq

        return load_chameleon_vq(model.tokenizer_weights, codes=model.codebook_size)
    return Palette.grey(model.codebook_size) if model.tokenizer == "palette" else None
