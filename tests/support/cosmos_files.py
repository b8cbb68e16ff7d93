"""A tiny tokenizer in Cosmos' TorchScript layout: a code is a patch of 16 x 16 pixels of one of 12 colours."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

LEVELS = (2, 2, 3)  # of red, green and blue; the first varies fastest, as in FSQuantizer.codes_to_indices
CODES = 12
SIDE = 16


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = x.unfold(3, 16, 16).unfold(4, 16, 16).mean(dim=(-2, -1)) * self.one
        levels = torch.tensor([2, 2, 3], device=x.device).view(3, 1, 1, 1)
        digits = ((patches + 1) / 2 * levels).floor().long().minimum(levels - 1).clamp(min=0)
        weights = torch.tensor([1, 2, 4], device=x.device).view(3, 1, 1, 1)
        return (digits * weights).sum(1).int(), patches, torch.zeros_like(patches)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, indices: Tensor) -> Tensor:
        red, green, blue = indices % 2, indices // 2 % 2, indices // 4
        colours = torch.stack([(red + 0.5) / 2, (green + 0.5) / 2, (blue + 0.5) / 3], dim=1) * 2 - 1
        return (colours * self.one).repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)


def save_cosmos(folder: Path) -> None:
    """Save `encoder.jit` and `decoder.jit` in a folder."""
    save(Encoder(), folder / "encoder.jit")
    save(Decoder(), folder / "decoder.jit")


def save(module: nn.Module, path: Path) -> None:
    """Save a module as TorchScript, which PyTorch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(module), str(path))
