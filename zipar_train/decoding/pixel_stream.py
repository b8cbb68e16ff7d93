"""Decoding of codes to pixels while the next batch is being generated."""

import torch
from torch import Tensor

from zipar_train.models.tokenizers.base import Tokenizer


class PixelStream:
    """Decoder of code batches to pixels; on a GPU it uses its own stream, in parallel with generation.

    Raises:
        ValueError: If the tokenizer needs more to decode than to encode, and it cannot be loaded.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        if prepare := getattr(tokenizer, "prepare", None):  # of tokenizers that decode with more than they encode with
            prepare()
        self.tokenizer = tokenizer
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batches: list[Tensor] = []

    def add(self, codes: Tensor) -> None:
        """Start decoding codes, int64 (B, H, W); they must not be changed afterwards."""
        if self.stream is None:
            self.batches.append(self.tokenizer.decode(codes).cpu())
            return
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        with torch.cuda.stream(self.stream):
            self.batches.append(self.tokenizer.decode(codes).to("cpu", non_blocking=True))
        codes.record_stream(self.stream)

    def all(self) -> Tensor:
        """Wait for all batches and return their pixels, uint8 (B, 3, px, px), on the CPU."""
        if self.stream is not None:
            self.stream.synchronize()
        return torch.cat(self.batches)


def decoded(tokenizer: Tokenizer, device: torch.device, codes: Tensor) -> Tensor:
    """Return the pixels of codes, uint8 (B, 3, px, px), on the CPU."""
    stream = PixelStream(tokenizer, device)
    stream.add(codes.to(device))
    return stream.all()
