"""NVIDIA's Cosmos tokenizer of discrete video, 16 pixels per code, from its published TorchScript files.

NVIDIA/Cosmos-Tokenizer, cosmos_tokenizer/video_lib.py. An image is a video of one frame, as in SimpleAR
(simpar/data/extract_token.py, generate.py). A code is an index of finite scalar quantization with the levels
(8, 8, 8, 5, 5, 5): 64,000 codes. TorchScript is interpreted by PyTorch; loading or running it executes no Python.
"""

import hashlib
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor

from zipar_train.io.errors import truncate
from zipar_train.io.files import open_regular, sha256_of
from zipar_train.models.files import find
from zipar_train.models.tokenizers.vq16 import to_bytes

STRIDE = 16  # pixels per code in each direction
CHUNK = 4  # images per pass through the convolutions
ENCODER, DECODER = "encoder.jit", "decoder.jit"
HUB = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
REMEDY = f"Give the folder of {HUB}, with {ENCODER} and {DECODER}"


class Part:
    """One of the two TorchScript files.

    It is applied in bfloat16, as the authors do, on a CPU in float32 where possible. On CPUs, PyTorch has no pooling of
    3 dimensions in bfloat16, which the encoder needs (nvidia-cosmos/cosmos-predict1, issue 143). A decoder that was
    traced in bfloat16 converts the codes' entries to it, and fails with other weights.

    Args:
        module: The module in the file.
        path: The file, for errors.
    """

    def __init__(self, module: Any, path: Path):
        self.module, self.path = module, path
        self.dtypes: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.bfloat16)}  # by device, to try

    def __call__(self, x: Tensor) -> Any:
        """Apply the module.

        Raises:
            ValueError: If it cannot be applied; names the file and the remedy.
        """
        reasons = []
        for dtype in self.dtypes.get(x.device.type, (torch.bfloat16,)):
            module = self.module.to(device=x.device, dtype=dtype)
            try:
                found = module(x.to(dtype) if x.is_floating_point() else x)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, torch.jit.Error) as error:
                reasons.append((str(error).strip().splitlines() or [""])[-1])
                continue
            self.dtypes[x.device.type] = (dtype,)
            return found
        raise self.wrong(f"fails on {x.device} ({truncate(reasons[0], length=200)})")

    def wrong(self, problem: str) -> ValueError:
        return ValueError(f"{self.path} is not a part of a Cosmos tokenizer of discrete video: it {problem}. {REMEDY}")


class CosmosDV:
    """A tokenizer between images and indices of finite scalar quantization.

    Args:
        encoder: Maps float pixels (B, 3, 1, height, width) in -1 .. 1 to indices (B, 1, H, W) and more.
        decoder: Maps indices (B, 1, H, W) to float pixels (B, 3, 1, height, width), roughly in -1 .. 1.
        codes: Codebook size.
        sha256: Checksum of both files.
    """

    stride = STRIDE

    def __init__(self, encoder: Part, decoder: Part, *, codes: int, sha256: str):
        self.encoder, self.decoder, self.codebook_size, self.sha256 = encoder, decoder, codes, sha256

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), multiples of the stride, to codes, int64 (B, H, W).

        Raises:
            ValueError: If the file is not an encoder, or its codebook is larger than the recipe's.
        """
        return torch.cat([self._indices(chunk) for chunk in pixels.split(CHUNK)])

    def _indices(self, pixels: Tensor) -> Tensor:
        found = self.encoder((pixels / 127.5 - 1)[:, :, None])
        codes = found[0] if isinstance(found, tuple | list) and found else found
        shape = (len(pixels), 1, *(side // STRIDE for side in pixels.shape[-2:]))
        if not isinstance(codes, Tensor) or codes.dtype not in (torch.int32, torch.int64) or codes.shape != shape:
            raise self.encoder.wrong(f"returns no indices of shape {list(shape)} first")
        low, high = (int(code) for code in torch.aminmax(codes))
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"{self.encoder.path} returns the codes {low:,} and {high:,}, the recipe's model has "
                f"{self.codebook_size:,}: it is the tokenizer of another model. {REMEDY}, or fix model.codebook_size"
            )
        return codes[:, 0].long()

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), resized to `size` if given.

        Raises:
            ValueError: If the file is not a decoder.
        """
        return torch.cat([to_bytes(self._images(chunk), size=size) for chunk in codes.split(CHUNK)])

    def _images(self, codes: Tensor) -> Tensor:
        """Decode codes (B, H, W) to float images (B, 3, height, width), roughly in -1 .. 1."""
        found = self.decoder(codes[:, None].int())
        shape = (len(codes), 3, 1, *(STRIDE * side for side in codes.shape[-2:]))
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != shape:
            raise self.decoder.wrong(f"returns no pixels of shape {list(shape)}")
        return found[:, :, 0].float()


def load_cosmos(source: str | None, *, codes: int) -> CosmosDV:
    """Load the tokenizer from the folder that NVIDIA published, with `encoder.jit` and `decoder.jit`.

    Whether they are a tokenizer is seen when they are used.

    Args:
        source: The folder, or its hub id with a colon at the end.
        codes: Codebook size.

    Raises:
        ValueError: If there is no source, or if a file is missing or not TorchScript.
    """
    if source is None:
        raise ValueError(
            f"model.tokenizer_weights is null, and model.tokenizer = cosmos is TorchScript files. {REMEDY}, or {HUB}:"
        )
    parts, checksums = [], []
    for name in (ENCODER, DECODER):
        path = find(f"{source}{name}" if source.endswith(":") else Path(source) / name)
        try:
            with open_regular(path) as file:
                checksums.append(sha256_of(file))
        except OSError as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else error
            raise ValueError(f"model.tokenizer_weights = {source}: {path}: {reason}. {REMEDY}, or {HUB}:") from error
        parts.append(Part(_scripted(path), path))
    return CosmosDV(*parts, codes=codes, sha256=hashlib.sha256("".join(checksums).encode()).hexdigest())


def _scripted(path: Path) -> Any:
    """Load a TorchScript file on the CPU.

    Raises:
        ValueError: If it is not one; names it.
    """
    try:
        with catch_warnings():  # PyTorch 2.14 deprecates TorchScript; there is no other published form of the weights
            filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        reason = truncate((str(error).strip().splitlines() or [""])[0], length=200)
        raise ValueError(f"{path} is not a TorchScript file ({reason}). {REMEDY}, or copy it again") from error
