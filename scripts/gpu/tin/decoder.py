"""Codes to pixels: codebook and decoder of swasun's VQ-VAE (github.com/swasun/VQ-VAE-Images), four pixels a code.

Layers and names as in its `results/shuffled/model_ema.pth`; the encoder's weights in the file are not used and may be
missing. Its residual blocks begin with a ReLU in place, so the skipped connection carries rectified numbers too.

    python scripts/gpu/tin/decoder.py vqvae_f4_512.pth smaller/vqvae_f4_512.pth    # leaves the encoder out: 1.3 MB
"""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from zipar_train.io.files import sha256, write_atomic

USED = ("_vq_vae._embedding.", "_decoder.")  # beginnings of the names that are read


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self._block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, hidden, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return relu(x) + self._block(x)


class Decoder(nn.Module):
    """A `zipar_train.models.tokenizers.base.Tokenizer` that decodes only.

    Args:
        codes: size of the codebook.
        depth: numbers of a code's vector.
        width, hidden: channels of the body and inside a residual block.
    """

    stride = 4  # pixels a code, each way

    def __init__(self, *, codes: int = 512, depth: int = 64, width: int = 128, hidden: int = 32):
        super().__init__()
        self.sha256: str | None = None
        self._vq_vae = nn.ModuleDict({"_embedding": nn.Embedding(codes, depth)})
        stack = nn.ModuleDict({"_layers": nn.ModuleList([Residual(width, hidden) for _ in range(2)])})
        self._decoder = nn.ModuleDict(
            {
                "_conv_1": nn.Conv2d(depth, width, 3, padding=1),
                "_residual_stack": stack,
                "_conv_trans_1": nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
                "_conv_trans_2": nn.ConvTranspose2d(width // 2, 3, 4, 2, 1),
            }
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Colours (B, 3, 4 H, 4 W), about -1 .. 1, of codes (B, H, W)."""
        parts: Any = self._decoder
        x = parts["_conv_1"](self._vq_vae["_embedding"](codes).permute(0, 3, 1, 2))
        for layer in parts["_residual_stack"]["_layers"]:
            x = layer(x)
        return parts["_conv_trans_2"](relu(parts["_conv_trans_1"](relu(x))))

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: int | None = None) -> Tensor:
        """Pixels, uint8 (B, 3, px, px), of codes (B, H, W)."""
        colours = self(codes)
        if size is not None and colours.shape[-1] != size:
            colours = interpolate(colours, size=(size, size), mode="bicubic", antialias=True)
        return (colours * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def load_decoder(path: Path, *, device: torch.device) -> Decoder:
    """The decoder with the weights of a file, of which nothing is executed.

    Raises:
        ValueError: if the file is damaged or of another model.
    """
    decoder = Decoder()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        decoder.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith(USED)})
    except Exception as error:  # damaged bytes fail in a dozen ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{path} is not the weights of swasun's VQ-VAE ({reason}). Fetch it again") from error
    decoder.sha256 = sha256(path)
    return decoder.requires_grad_(False).to(device).eval()


def shrink(path: Path, out: Path) -> None:
    """Write the part of a file that is used: half of its bytes.

    Raises:
        ValueError: if the file is damaged or of another model.
    """
    load_decoder(path, device=torch.device("cpu"))
    state = torch.load(path, map_location="cpu", weights_only=True)
    buffer = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in state.items() if name.startswith(USED)}, buffer)
    write_atomic(out, buffer.getvalue())


if __name__ == "__main__":
    try:
        shrink(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"decoder: {error}")
