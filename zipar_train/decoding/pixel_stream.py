"""From codes to pixels while the next batch is being drawn."""

import torch
from torch import Tensor

from zipar_train.models.tokenizers.base import Tokenizer


class PixelStream:
    """Decodes batches of codes; on a GPU beside the drawing, in a stream of its own, copied to the CPU at once."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        self.tokenizer = tokenizer
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batches: list[Tensor] = []

    def add(self, codes: Tensor) -> None:
        """Codes (B, H, W), which nobody changes any more."""
        if self.stream is None:
            self.batches.append(self.tokenizer.decode(codes).cpu())
            return
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        with torch.cuda.stream(self.stream):
            self.batches.append(self.tokenizer.decode(codes).to("cpu", non_blocking=True))
        codes.record_stream(self.stream)

    def all(self) -> Tensor:
        """Pixels of all batches, uint8 (B, 3, px, px), on the CPU, when they are done."""
        if self.stream is not None:
            self.stream.synchronize()
        return torch.cat(self.batches)
