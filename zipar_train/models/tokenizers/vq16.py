"""LlamaGen's VQ-16 image tokenizer as transformers' JanusVQVAE (tokenizer/tokenizer_image/vq_model.py)."""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from zipar_train.io.files import regular
from zipar_train.models.files import Checksums, find, innermost, read_file, read_folder, tensors
from zipar_train.models.filling import filled
from zipar_train.models.names import renamed

STRIDE = 16  # pixels per code in each direction
CHUNK = 16  # images per pass through the convolutions
NAMES = (  # LlamaGen's names, JanusVQVAE's names
    ("encoder.conv_blocks.{}.res.", "encoder.down.{}.block."),
    ("encoder.conv_blocks.{}.", "encoder.down.{}."),
    ("decoder.conv_blocks.{}.res.", "decoder.up.{}.block."),
    ("decoder.conv_blocks.{}.", "decoder.up.{}."),
    *((f"{half}.mid.0.", f"{half}.mid.block_1.") for half in ("encoder", "decoder")),
    *((f"{half}.mid.1.", f"{half}.mid.attn_1.") for half in ("encoder", "decoder")),
    *((f"{half}.mid.2.", f"{half}.mid.block_2.") for half in ("encoder", "decoder")),
)


class VQ16:
    """A tokenizer between images and codes, 16 pixels per code.

    Args:
        model: A model whose codebook rows have length 1.
        sha256: Checksum of the weights' file; None: random weights.
    """

    def __init__(self, model: JanusVQVAE, *, sha256: str | None = None):
        self.model, self.sha256 = model.eval().requires_grad_(False), sha256
        self.stride = 2 ** (len(model.config.channel_multiplier) - 1)
        self.codebook_size = model.config.num_embeddings
        self.roundings: dict[torch.device, float] = {}

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), multiples of 16, to codes, int64 (B, H, W)."""
        model = self.model.to(pixels.device)
        rows, columns = (side // self.stride for side in pixels.shape[-2:])
        found = []
        for chunk in pixels.split(CHUNK):
            images = (chunk / 255 - 0.5) / 0.5
            features = normalize(model.quant_conv(model.encoder(images)), dim=1)
            found.append(model.quantize(features)[2].view(-1, rows, columns))
        return torch.cat(found)

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), on a GPU in bfloat16 if not visible."""
        device = codes.device.type
        half = device == "cuda" and self.rounding(codes.device) < 1
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return torch.cat([to_bytes(self.images(chunk).float(), size=size) for chunk in codes.split(CHUNK)])

    @torch.inference_mode()
    def rounding(self, device: torch.device, *, side: int = 16) -> float:
        """Return the root-mean-square error of pixels decoded in bfloat16, in grey levels 0 .. 255.

        It is measured once per device, on two images of `side` x `side` random codes.
        """
        if device not in self.roundings:
            random = torch.Generator().manual_seed(0)
            codes = torch.randint(self.codebook_size, (2, side, side), generator=random).to(device)
            exact = self.images(codes).clamp(-1, 1)
            with torch.autocast(device.type, torch.bfloat16):
                rounded = self.images(codes).float().clamp(-1, 1)
            self.roundings[device] = float((rounded - exact).square().mean().sqrt() * 127.5)
        return self.roundings[device]

    @torch.inference_mode()
    def images(self, codes: Tensor) -> Tensor:
        """Decode codes (B, H, W) to float images (B, 3, height, width), roughly in -1 .. 1."""
        model = self.model.to(codes.device)
        entries = model.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        return model.decoder(model.post_quant_conv(entries))


def to_bytes(images: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Convert float images (B, 3, height, width), roughly in -1 .. 1, to uint8 pixels, resized to `size`.

    As in LlamaGen (autoregressive/sample/sample_c2i_ddp.py), the floats are resized bicubically without antialiasing,
    then clamped and truncated to bytes.
    """
    if size is not None and images.shape[-2:] != size:
        images = interpolate(images, size=size, mode="bicubic")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def load_vq16(source: str | None, *, codes: int) -> VQ16:
    """Load the tokenizer from a published file (`vq_ds16_c2i.pt`); the architecture is inferred from its tensors.

    Args:
        source: The file, or the folder of a Janus checkpoint in either layout; None: random weights.
        codes: Codebook size.

    Raises:
        ValueError: If the file is not a VQ-16 or is damaged, or if the codebook size is not `codes`.
    """
    if source is None:
        return VQ16(_unit(JanusVQVAE(JanusVQVAEConfig(num_embeddings=codes))))
    path = find(source)
    if path.is_dir():
        return _of_checkpoint(path, codes)
    checksums: Checksums = {}
    state = innermost(tensors(read_file(path, checksums=checksums), where=path))
    ours = _by_our_names(state)
    what = "is not a VQ-16 of LlamaGen. Give vq_ds16_c2i.pt or vq_ds16_t2i.pt"
    model = filled(lambda: JanusVQVAE(inferred_config(ours)), ours, where=path, what=what)
    tokenizer = VQ16(_unit(model), sha256=checksums[path])
    if tokenizer.stride != STRIDE:
        raise ValueError(
            f"{path} is a VQ-{tokenizer.stride}, not a VQ-16: a code is {tokenizer.stride} pixels wide. "
            "Give vq_ds16_c2i.pt or vq_ds16_t2i.pt"
        )
    if tokenizer.codebook_size != codes:
        raise ValueError(
            f"{path} has a codebook of {tokenizer.codebook_size} codes, the recipe's model one of {codes}. "
            "Give the tokenizer that the model was trained with, or fix model.codebook_size"
        )
    return tokenizer


def _of_checkpoint(path: Path, codes: int) -> VQ16:
    """Load the VQ-16 from a Janus-Pro checkpoint in transformers' layout or its authors' (deepseek-ai/Janus)."""
    config = None
    if state := _part(path, "gen_vision_model."):
        state = _by_our_names(state)
    else:
        state = _part(path, "model.vqmodel.")
        try:
            config = JanusVQVAEConfig(**json.loads(regular(path / "config.json").read_bytes())["vq_config"])
        except Exception as error:  # from JSON, or from transformers' validation
            raise ValueError(f"{path}/config.json describes no vq_config of Janus-Pro ({error!r})") from None
    what = "holds no VQ-16 of Janus-Pro. Give the published checkpoint"
    model = filled(lambda: JanusVQVAE(config or inferred_config(state)), state, where=path, what=what)
    if model.config.num_embeddings != codes:
        raise ValueError(
            f"{path} has a codebook of {model.config.num_embeddings} codes, the recipe's model one of {codes}"
        )
    return VQ16(_unit(model), sha256=fingerprint(state))


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in read_folder(path, prefix=prefix).items()}


def _by_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of LlamaGen's file by the names of JanusVQVAE, without the statistics of its training."""
    return {renamed(name, NAMES): tensor for name, tensor in state.items() if name != "quantize.codebook_used"}


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors that are only part of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unit(model: JanusVQVAE) -> JanusVQVAE:
    """Normalise the codebook's rows in place, because JanusVQVAE does so when it decodes, but not when it encodes."""
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(normalize(model.quantize.embedding.weight, dim=-1))
    return model


def inferred_config(state: dict[str, Tensor]) -> JanusVQVAEConfig:
    """Infer the architecture from the shapes of tensors by the names of JanusVQVAE.

    Raises:
        ValueError: If a tensor is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in state or not state[name].ndim:
            raise ValueError(f"it lacks {name}")
        return state[name].shape

    base = shape("encoder.conv_in.weight")[0]
    codes, width = (*shape("quantize.embedding.weight"), 0)[:2]
    levels = 1 + max((int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", name) for name in state) if m), default=0)
    blocks = 1 + max(
        (int(m[1]) for m in (re.match(r"encoder\.down\.0\.block\.(\d+)\.", n) for n in state) if m), default=0
    )
    return JanusVQVAEConfig(
        embed_dim=width,
        num_embeddings=codes,
        latent_channels=shape("quant_conv.weight")[1],
        base_channels=base,
        channel_multiplier=[shape(f"encoder.down.{i}.block.0.conv1.weight")[0] // base for i in range(levels)],
        num_res_blocks=blocks,
    )
