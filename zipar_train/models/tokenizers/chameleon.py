"""Chameleon's image tokenizer, 16 pixels per code: transformers' encoder, plus a decoder, which transformers lacks.

facebookresearch/chameleon, `tokenizer/vqgan.ckpt`, is taming-transformers' VQGAN without attention between its levels.
The decoder is that of JanusVQVAE, which has the same origin, with this attention removed.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ChameleonVQVAE
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from zipar_train.io.files import regular
from zipar_train.models.files import Checksums, find, innermost, read_file, tensors
from zipar_train.models.filling import filled
from zipar_train.models.tokenizers.vq16 import to_bytes

CHUNK = 4  # images per pass through the convolutions
WEIGHTS, VOCABULARY = "vqgan.ckpt", "text_tokenizer.json"
MARK = "IMGIMG"  # prefix of codes in the vocabulary; the codebook row follows in letters (A is 0), then a Z
FIRST = 4  # smallest id of a code, after four special tokens


class VQGAN(ChameleonVQVAE):
    """ChameleonVQVAE with a decoder, whose levels are numbered in order of use; taming numbers them from the finest."""

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__(config)
        shape = ("embed_dim", "latent_channels", "base_channels", "channel_multiplier", "num_res_blocks")
        self.decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**{name: getattr(config, name) for name in shape}))
        for level in self.decoder.up:
            level.attn = nn.ModuleList()


class ChameleonVQ:
    """A tokenizer whose codes are numbered as in the language model's vocabulary.

    Args:
        code_of_row: The code of each codebook row, int64 (V,): the vocabulary orders the codes differently.
        sha256: Checksum of the weights' file; None: random weights.
    """

    def __init__(self, model: VQGAN, code_of_row: Tensor, *, sha256: str | None = None):
        self.model, self.code_of_row, self.sha256 = model.eval().requires_grad_(False), code_of_row, sha256
        self.row_of_code = torch.argsort(code_of_row)
        self.stride, self.codebook_size = 2 ** (len(model.config.channel_multiplier) - 1), len(code_of_row)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, 3, height, width), multiples of the stride, to codes, int64 (B, H, W)."""
        model = self.model.to(pixels.device)
        rows, columns = (side // self.stride for side in pixels.shape[-2:])
        found = []
        for chunk in pixels.split(CHUNK):
            found.append(model.encode(chunk / 127.5 - 1).image_tokens.view(-1, rows, columns))
        return self.code_of_row.to(pixels.device)[torch.cat(found)]

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, H, W) to pixels, uint8 (B, 3, height, width), resized to `size` if given."""
        return torch.cat([to_bytes(self.images(chunk), size=size) for chunk in codes.split(CHUNK)])

    @torch.inference_mode()
    def images(self, codes: Tensor) -> Tensor:
        """Decode codes (B, H, W) to float images (B, 3, height, width), roughly in -1 .. 1."""
        model = self.model.to(codes.device)
        entries = model.quantize.embedding(self.row_of_code.to(codes.device)[codes]).permute(0, 3, 1, 2).contiguous()
        return model.decoder(model.post_quant_conv(entries))


def load_chameleon_vq(source: str | None, *, codes: int) -> ChameleonVQ:
    """Load the tokenizer from the folder that Meta published, with `vqgan.ckpt` and `text_tokenizer.json`.

    Args:
        source: The folder; None: random weights.
        codes: Codebook size.

    Raises:
        ValueError: If a file is missing or damaged, or if the codebook size is not `codes`.
    """
    if source is None:
        return ChameleonVQ(VQGAN(ChameleonVQVAEConfig(num_embeddings=codes)), torch.arange(codes))
    path = find(source)
    for name in (WEIGHTS, VOCABULARY):
        if not (path / name).is_file():
            raise ValueError(
                f"model.tokenizer_weights = {path} holds no {name}. Checkpoints of transformers have no decoder of "
                "images: give the folder `tokenizer` of Meta's Chameleon (github.com/facebookresearch/chameleon)"
            )
    checksums: Checksums = {}
    state = innermost(tensors(read_file(path / WEIGHTS, checksums=checksums), where=path / WEIGHTS))
    state = {_rename(name, state): t for name, t in state.items() if not name.startswith("loss.")}  # training losses
    what = "is not an image tokenizer of Chameleon. Give the published file"
    model = filled(lambda: VQGAN(_config(state)), state, where=path / WEIGHTS, what=what)
    order = _order(path / VOCABULARY)
    if not len(order) == model.config.num_embeddings == codes:
        raise ValueError(
            f"{path} has a codebook of {model.config.num_embeddings} rows and a vocabulary of {len(order)} codes, the "
            f"recipe's model {codes}. Give the published folder, or fix model.codebook_size"
        )
    return ChameleonVQ(model, order, sha256=checksums[path / WEIGHTS])


def _order(path: Path) -> Tensor:
    """Read the code of each codebook row, int64 (V,), from the vocabulary.

    Raises:
        ValueError: If the file is not a vocabulary of Chameleon.
    """
    try:
        ids = {
            name: i
            for name, i in json.loads(regular(path).read_bytes())["model"]["vocab"].items()
            if name.startswith(MARK)
        }
        digits = str.maketrans("ABCDEFGHIJ", "0123456789")
        rows = {int(name.removeprefix(MARK).removesuffix("Z").translate(digits)): i - FIRST for name, i in ids.items()}
        order = torch.tensor([rows[row] for row in range(len(rows))])
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"ids of codes are not {FIRST} .. {FIRST + len(order) - 1}")
        return order
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a vocabulary of Chameleon ({error!r}). Give the published file") from None


def _rename(name: str, state: dict[str, Tensor]) -> str:
    match = re.match(r"decoder\.up\.(\d+)\.(.*)", name)
    return f"decoder.up.{_levels(state) - 1 - int(match[1])}.{match[2]}" if match else name


def _levels(state: dict[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", name) for name in state) if m), default=0)


def _config(state: dict[str, Tensor]) -> ChameleonVQVAEConfig:
    """Infer the architecture from the shapes of tensors; invalid shapes raise errors of many classes."""
    base = len(state["encoder.conv_in.weight"])
    levels = (f"encoder.down.{i}.block.0.conv1.weight" for i in range(_levels(state)))
    return ChameleonVQVAEConfig(
        num_embeddings=len(state["quantize.embedding.weight"]),
        embed_dim=state["quantize.embedding.weight"].shape[1],
        latent_channels=state["quant_conv.weight"].shape[1],
        base_channels=base,
        channel_multiplier=[len(state[name]) // base for name in levels],
        num_res_blocks=sum(bool(re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)) for name in state),
    )
