"""The Cosmos tokenizer: pixels and codes of a tiny TorchScript pair against loops, and files that are no tokenizer."""

import hashlib

import pytest
import torch
from cosmos_files import CODES, LEVELS, SIDE, save, save_cosmos
from torch import Tensor, nn

from zipar_train.models.tokenizers.base import build_tokenizer
from zipar_train.models.tokenizers.cosmos import CHUNK, load_cosmos
from zipar_train.recipe.model import Model, Words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos")
    save_cosmos(folder)
    return folder


def colour(code: int) -> list[float]:
    """The three channels of a code, in -1 .. 1: the digits of its number, the first one lowest."""
    channels = []
    for level in LEVELS:
        code, digit = divmod(code, level)
        channels.append((digit + 0.5) / level * 2 - 1)
    return channels


def test_codes_are_the_patches_and_pixels_their_colours(folder):
    """Every code, in rows and columns that differ, in more than one chunk of images."""
    tokenizer = load_cosmos(str(folder), codes=CODES)
    codes = torch.randint(CODES, (CHUNK + 1, 2, 3), generator=torch.Generator().manual_seed(0))
    codes.view(-1)[:CODES] = torch.arange(CODES)
    pixels = tokenizer.decode(codes)
    assert pixels.dtype == torch.uint8 and pixels.shape == (CHUNK + 1, 3, 2 * SIDE, 3 * SIDE)
    for image in range(CHUNK + 1):
        for row in range(2):
            for column in range(3):
                patch = pixels[image, :, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)]
                wanted = torch.tensor(colour(int(codes[image, row, column]))) * 127.5 + 127.5
                assert (patch.float() - wanted.view(3, 1, 1)).abs().max() <= 0.51
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert tokenizer.encode(pixels).dtype == torch.int64
    assert tokenizer.decode(codes, size=(8, 12)).shape == (CHUNK + 1, 3, 8, 12)


def test_the_encoder_sees_one_frame_in_minus_one_to_one(tmp_path):
    """The pixels themselves: a file that returns where they are extreme."""

    class Extremes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            assert x.dim() == 5 and x.shape[1] == 3 and x.shape[2] == 1
            corner = x[:, 0, :, ::16, ::16]
            return ((corner == 1).int() + 2 * (corner == -1).int()).int(), x

    save_cosmos(tmp_path)
    save(Extremes(), tmp_path / "encoder.jit")
    pixels = torch.full((1, 3, 16, 48), 128, dtype=torch.uint8)
    pixels[..., 0], pixels[..., 16] = 255, 0
    assert load_cosmos(str(tmp_path), codes=3).encode(pixels).tolist() == [[[1, 2, 0]]]


class Traced(nn.Module):
    """A decoder as if traced in bfloat16: it fails with weights of another type."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1).to(torch.bfloat16)

    def forward(self, indices: Tensor) -> Tensor:
        assert self.conv.bias is not None
        entries = indices[:, None].to(torch.bfloat16).repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)
        return self.conv(entries / 12)


def test_a_decoder_in_bfloat16_runs_on_a_cpu(tmp_path):
    save_cosmos(tmp_path)
    torch.manual_seed(0)
    decoder = Traced()
    save(decoder, tmp_path / "decoder.jit")
    tokenizer, codes = load_cosmos(str(tmp_path), codes=CODES), torch.arange(12).view(2, 2, 3)
    with torch.no_grad():
        wanted = (127.5 * decoder(codes[:, None])[:, :, 0].float() + 128).clamp(0, 255).to(torch.uint8)
    for _ in range(2):
        assert torch.equal(tokenizer.decode(codes), wanted)
    assert len(wanted.unique()) > 5
    assert torch.equal(tokenizer.encode(pixels_of(codes)), codes)  # this part stays in float32


def pixels_of(codes):
    """Pixels of the tiny tokenizer's codes."""
    colours = torch.tensor([colour(code) for code in range(CODES)])[codes].permute(0, 3, 1, 2)
    return (127.5 * colours + 127.5).to(torch.uint8).repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)


def test_the_recipe_chooses_it(folder):
    words = Words(encoder="none", tokens=4, vocabulary=30)
    section = {"family": "simplear", "num_layers": 1, "num_heads": 1, "hidden_size": 8, "grid": [2, 3]}
    model = Model(codebook_size=CODES, token_prompt=words, tokenizer="cosmos", tokenizer_weights=str(folder), **section)
    tokenizer = build_tokenizer(model)
    assert tokenizer.stride == 16
    files = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("encoder.jit", "decoder.jit")]
    assert tokenizer.sha256 == hashlib.sha256("".join(files).encode()).hexdigest()


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(5, 7)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full([x.shape[0], 1, x.shape[3] // 16, x.shape[4] // 16], -1).int(), x


PIXELS, CODE = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.int64)
REMEDY = "Give the folder of nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Halves(), r"it returns no indices of shape \[1, 1, 1, 1\] first"),
        (Reads(), r"it fails on cpu \(.*mat1 and mat2.*\)"),
        (Nothing(), r"returns the codes -1 and -1, the recipe's model has 12"),
    ],
)
def test_scripts_that_are_no_encoder(tmp_path, module, message):
    save_cosmos(tmp_path)
    save(module, tmp_path / "encoder.jit")
    with pytest.raises(ValueError, match=rf"encoder\.jit .*{message}.*{REMEDY}"):
        load_cosmos(str(tmp_path), codes=CODES).encode(PIXELS)


@pytest.mark.parametrize(
    ("module", "message"), [(Halves(), r"returns no pixels of shape \[1, 3, 1, 16, 16\]"), (Nothing(), "fails on cpu")]
)
def test_scripts_that_are_no_decoder(tmp_path, module, message):
    save_cosmos(tmp_path)
    save(module, tmp_path / "decoder.jit")
    with pytest.raises(ValueError, match=rf"decoder\.jit .*{message}.*{REMEDY}"):
        load_cosmos(str(tmp_path), codes=CODES).decode(CODE)


def test_a_larger_codebook_is_refused(folder):
    """The last code of the file is beyond the recipe's codebook."""
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="returns the codes 11 and 11, the recipe's model has 11.*fix model.codebook"):
        load_cosmos(str(folder), codes=11).encode(white)


def test_files_that_are_no_script(tmp_path):
    with pytest.raises(ValueError, match=rf"tokenizer_weights is null.*{REMEDY}"):
        load_cosmos(None, codes=CODES)
    with pytest.raises(ValueError, match=rf"tokenizer_weights = {tmp_path}: .*encoder\.jit: there is no such file"):
        load_cosmos(str(tmp_path), codes=CODES)
    save_cosmos(tmp_path)
    with pytest.raises(ValueError, match="there is no such file"):
        load_cosmos(str(tmp_path / "encoder.jit"), codes=CODES)
    (tmp_path / "decoder.jit").unlink()
    (tmp_path / "decoder.jit").mkdir()
    with pytest.raises(ValueError, match="is a folder, not a file"):
        load_cosmos(str(tmp_path), codes=CODES)
    (tmp_path / "decoder.jit").rmdir()
    for content in ({"a": torch.zeros(2)}, b"no archive at all"):
        if isinstance(content, bytes):
            (tmp_path / "decoder.jit").write_bytes(content)
        else:
            torch.save(content, tmp_path / "decoder.jit")
        with pytest.raises(ValueError, match=rf"decoder\.jit is not a TorchScript file \(.*\)\. {REMEDY}"):
            load_cosmos(str(tmp_path), codes=CODES)
