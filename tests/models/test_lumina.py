"""Lumina-mGPT against transformers' own Chameleon, from a checkpoint in the published layout."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import every_verb
from safetensors.torch import load_file, save_file
from theorem import check_captioned_theorem
from torch import nn
from torch.nn.functional import interpolate, silu
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from zipar_train import Plan, ZipARModule, load
from zipar_train.decoding.decoder import Decoder
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.models.tokenizers.chameleon import VQGAN, load_chameleon_vq
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import Model, Words
from zipar_train.recipe.schema import Draw

HEIGHT, WIDTH, CODES = 4, 6, 10
END = 4 + CODES
ROW_END = END + 607
WORDS = [
    "Generate",
    "an",
    "image",
    "of",
    "96x64",
    "64x64",
    "according",
    "to",
    "the",
    "following",
    "prompt:",
    "a",
    "blue",
    "red",
    "car",
    "house",
    "small",
]
RESERVED = {
    "<reserved08706>": END + 514,
    "<reserved08799>": ROW_END,
    "<reserved08802>": ROW_END + 3,
    "<reserved08803>": ROW_END + 4,
}
ORDER = [3, 1, 9, 0, 4, 5, 8, 2, 7, 6]  # the code of each row of the codebook
NAMES = {f"IMGIMG{'ABCDEFGHIJ'[row]}Z": 4 + code for row, code in enumerate(ORDER)}
VOCABULARY = (
    {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    | NAMES
    | {"<eoss>": END, "<racm3:break>": END + 1}
    | RESERVED
    | {word: ROW_END + 10 + i for i, word in enumerate(WORDS)}
)
SIZE = max(VOCABULARY.values()) + 1
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "vocabulary_map": VOCABULARY | {"<image>": 3},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
VQ = {
    "num_embeddings": CODES,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1, 2],
    "num_res_blocks": 1,
    "resolution": 64,
}
CAPTIONS = ["a blue car", "a small red house", "car"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Lumina-mGPT as its authors' code saves it, its tokenizer of text, and Meta's of images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lumina")
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**SHAPE, vq_config=VQ))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vqmodel" not in name and parameter.ndim > 1:
                norm = "q_norm" in name or "k_norm" in name
                parameter.copy_(parameter.new_empty(1, parameter.shape[1]).uniform_(0.2, 2) if norm else parameter * 15)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in state:  # heads share a norm in the authors' code
        if "q_norm" in name or "k_norm" in name:
            state[name] = state[name][:1].clone()
    halves = {"one": {}, "two": {}}
    for i, name in enumerate(name for name in state if "vqmodel" not in name):  # deleted before training
        halves["one" if i % 2 else "two"][name] = state[name]
    (folder / "model.safetensors").unlink()
    for half, content in halves.items():
        save_file(content, folder / f"model-{half}.safetensors")
    index = {name: f"model-{half}.safetensors" for half, content in halves.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<racm3:break>", "<eoss>", *RESERVED],
    ).save_pretrained(folder)

    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

    weights = VQGAN(ChameleonVQVAEConfig(**VQ)).state_dict()
    last = len(VQ["channel_multiplier"]) - 1
    theirs = {
        re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", name): 3 * t
        for name, t in weights.items()
    }
    torch.save(
        {"state_dict": theirs | {"loss.discriminator.weight": torch.zeros(1)}, "epoch": 3}, folder / "vqgan.ckpt"
    )
    (folder / "text_tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}}))
    return folder


def section(checkpoint) -> Model:
    words = Words(encoder=str(checkpoint), tokens=24, vocabulary=SIZE)
    return Model(
        family="lumina",
        num_layers=2,
        num_heads=4,
        hidden_size=16,
        ffn_size=24,
        grid=[HEIGHT, WIDTH],
        codebook_size=CODES,
        tokenizer="chameleon",
        tokenizer_weights=str(checkpoint),
        token_prompt=words,
    )


def banless(checkpoint) -> ChameleonForConditionalGeneration:
    """transformers' own Chameleon with the checkpoint's weights, its ban of codes lifted as Lumina-mGPT does."""
    model = ChameleonForConditionalGeneration(ChameleonConfig(**SHAPE, vq_config=VQ)).eval()
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    state = {n: t for part in ("one", "two") for n, t in load_file(checkpoint / f"model-{part}.safetensors").items()}
    state = {n: t.expand(4, -1) if "q_norm" in n or "k_norm" in n else t for n, t in state.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and all("vqmodel" in name for name in missing)
    return model


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_next_token_draws_what_transformers_draws(checkpoint, guidance):
    """Greedy, one prompt at a time, row ends forced, guidance away from the image's start alone; every code."""
    theirs = banless(checkpoint)
    family = load_family(section(checkpoint), read(checkpoint))
    assert family.grid.row_end and family.row_end == ROW_END
    prompts = family.check(CAPTIONS)
    names = {i: name for name, i in VOCABULARY.items()}
    expected = []
    for row in range(3):
        ids = prompts.ids[row][~prompts.padding[row]][None]
        said = [names[i] for i in ids[0].tolist()]
        assert " ".join(said) == (
            f"<s> Generate an image of 96x64 according to the following prompt: {CAPTIONS[row]} <reserved08706> "
            "<racm3:break> <reserved08802> <reserved08803>"
        )
        away = {} if guidance == 1 else {"negative_prompt_ids": ids[:, -3:], "guidance_scale": guidance}

        def allowed(batch, sent, start=ids.shape[1]):
            return [ROW_END] if (len(sent) - start) % (WIDTH + 1) == WIDTH else list(range(4, END))

        drawn = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=HEIGHT * (WIDTH + 1),
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            **away,
        )
        expected.append(drawn[0, ids.shape[1] :].view(HEIGHT, WIDTH + 1)[:, :-1] - 4)
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    draw = Draw(guidance=guidance, temperature=0.0)
    ours = Decoder(family, plan)(CAPTIONS, torch.zeros(3, HEIGHT * WIDTH), draw)
    assert torch.equal(ours, torch.stack(expected))
    assert len(torch.unique(ours)) > 3


@pytest.mark.parametrize("window", [7, 4, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("streamlined", [False, True])
def test_theorem(checkpoint, window, guidance, streamlined):
    """Row ends, norms of queries and keys, prompts of two lengths; the drawing body alike."""
    family = load_family(section(checkpoint), read(checkpoint), dtype=torch.float64)
    check_captioned_theorem(family, CAPTIONS, window=window, guidance=guidance, streamlined=streamlined)


@pytest.mark.parametrize(
    ("name", "raster", "passes"), [("512", 1024, 32 + 31 * 15), ("768", 2304, 753), ("1024", 4096, 64 + 63 * 15)]
)
def test_names_and_counts_are_the_published(name, raster, passes):
    """Built on no device, against transformers' model at its default, published sizes."""
    with torch.device("meta"):
        theirs = ChameleonForConditionalGeneration(ChameleonConfig(vocabulary_map={"<image>": 8711}))
    assert sum(p.numel() for p in theirs.parameters()) == 7_043_090_432  # 7.04 B
    ours = build(load_recipe(f"lumina-mgpt-7b-{name}").model, device="meta", empty=True)
    renamed, mine = ours.renamed(theirs.state_dict()), ours.model.state_dict()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in mine.items()}
    assert ours.row_end == 8803
    rows = ours.grid.height
    plans = {w: Plan.zipar(ours.grid, window=w, prompt=ours.prompt_length) for w in (16, ours.grid.row_length)}
    assert plans[16].passes == passes  # at 768, the paper's 67 % fewer than 2,352
    assert plans[ours.grid.row_length].passes == raster == rows * (ours.grid.row_length - 1)  # row ends cost no pass


class Block(nn.Module):
    """taming-transformers' residual block, in our words."""

    def __init__(self, state, name):
        super().__init__()
        self.state, self.name = state, name

    def forward(self, x):
        def part(kind, h):
            return nn.functional.group_norm(h, 32, *self.of(kind), eps=1e-6)

        h = nn.functional.conv2d(silu(part("norm1", x)), *self.of("conv1"), padding=1)
        h = nn.functional.conv2d(silu(part("norm2", h)), *self.of("conv2"), padding=1)
        if f"{self.name}.nin_shortcut.weight" in self.state:
            x = nn.functional.conv2d(x, *self.of("nin_shortcut"))
        return x + h

    def of(self, kind):
        return self.state[f"{self.name}.{kind}.weight"], self.state[f"{self.name}.{kind}.bias"]


def tamings_decoder(state, z):
    """taming-transformers' decoder by its own names of tensors, written a second time."""

    def conv(name, x, padding=0):
        return nn.functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    h = conv("decoder.conv_in", conv("post_quant_conv", z), 1)
    h = Block(state, "decoder.mid.block_1")(h)
    name = "decoder.mid.attn_1"
    n = nn.functional.group_norm(h, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], eps=1e-6)
    q, k, v = (conv(f"{name}.{part}", n).flatten(2).transpose(1, 2) for part in "qkv")
    attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(h)
    h = Block(state, "decoder.mid.block_2")(h + conv(f"{name}.proj_out", attended))
    for level in reversed(range(len(VQ["channel_multiplier"]))):
        for block in range(VQ["num_res_blocks"] + 1):
            h = Block(state, f"decoder.up.{level}.block.{block}")(h)
        if level:
            h = conv(f"decoder.up.{level}.upsample.conv", interpolate(h, scale_factor=2.0, mode="nearest"), 1)
    out = nn.functional.group_norm(h, 32, state["decoder.norm_out.weight"], state["decoder.norm_out.bias"], eps=1e-6)
    return conv("decoder.conv_out", silu(out), 1)


def test_the_image_tokenizer_is_metas(checkpoint):
    """Decoding against a second implementation, encoding against transformers', both in the vocabulary's order."""
    state = torch.load(checkpoint / "vqgan.ckpt", weights_only=True)["state_dict"]
    tokenizer = load_chameleon_vq(str(checkpoint), codes=CODES)
    codes = torch.randint(CODES, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    row_of = torch.tensor([ORDER.index(code) for code in range(CODES)])
    exact = {name: tensor.double() for name, tensor in state.items()}
    expected = tamings_decoder(exact, exact["quantize.embedding.weight"][row_of[codes]].permute(0, 3, 1, 2))
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (2, 3, 64, 96)
    assert (pixels - (127.5 * expected + 128).clamp(0, 255)).abs().max() < 1.1
    tokenizer.model.double()
    assert (tokenizer.images(codes) - expected).abs().max() < 1e-10 * expected.abs().max()
    tokenizer.model.float()
    pixels = torch.randint(256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    theirs = ChameleonForConditionalGeneration(ChameleonConfig(**SHAPE, vq_config=VQ)).model
    theirs.vqmodel.load_state_dict({n: t for n, t in state.items() if not n.startswith(("decoder.", "loss."))})
    ids = theirs.get_image_tokens(pixels / 127.5 - 1)
    assert torch.equal(tokenizer.encode(pixels), ids.view(2, 4, 6).long() - 4)
    assert len(ids.unique()) > 2


def test_a_folder_without_metas_files_is_told_where_they_are(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"holds no vqgan.ckpt.*facebookresearch/chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)
    (tmp_path / "vqgan.ckpt").write_bytes((checkpoint / "vqgan.ckpt").read_bytes())
    (tmp_path / "text_tokenizer.json").write_text('{"model": {"vocab": {"IMGIMGAZ": 5}}}')
    with pytest.raises(ValueError, match="is no vocabulary of Chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)
    (tmp_path / "text_tokenizer.json").write_bytes((checkpoint / "text_tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="a codebook of 10 rows and a vocabulary of 10 codes, the recipe's model 11"):
        load_chameleon_vq(str(tmp_path), codes=11)
    torch.save({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match="is no image tokenizer of Chameleon"):
        load_chameleon_vq(str(tmp_path), codes=CODES)


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint):
    family = build(section(checkpoint).model_copy(update={"codebook_size": CODES + 1}))
    with pytest.raises(ValueError, match=rf"'<eoss>' has the id {END}, the model counts on {END + 1}"):
        family.check(CAPTIONS)


def test_from_pictures_to_a_checkpoint_for_transformers(checkpoint, clip, tmp_path, run):
    words = f"{{encoder: {checkpoint}, tokens: 24, vocabulary: {SIZE}}}"
    model = [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.hidden_size=16",
        "model.ffn_size=24",
        f"model.codebook_size={CODES}",
        f"model.grid=[{HEIGHT},{WIDTH}]",
        f"model.token_prompt={words}",
    ]
    every_verb(run, tmp_path, "lumina-mgpt-7b-768", model, checkpoint=checkpoint, clip=clip, windows=[7, 3, 2])
    before = banless(checkpoint).state_dict()
    after = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    names = [name for name in after if "vqmodel" not in name]
    assert names == [name for name in before if "vqmodel" not in name]
    changed = [name for name in names if not torch.equal(after[name], before[name])]
    assert changed and all("proj" in name for name in changed)
    assert not any("vqmodel" in n for f in (tmp_path / "hf").glob("*.safetensors") for n in load_file(f))
    again, tuned = load(tmp_path / "hf"), load(tmp_path / "run")
    assert torch.equal(again.generate(CAPTIONS, window=3).codes, tuned.generate(CAPTIONS, window=3).codes)


def test_everything_trained_is_exported_and_norms_do_not_decay(checkpoint, tmp_path):
    family = load_family(section(checkpoint), read(checkpoint))
    decays, others = ZipARModule(family, windows={7: 1}).optimizer().param_groups
    assert decays["weight_decay"] > others["weight_decay"] == 0
    norms = {p for name, p in family.model.named_parameters() if "norm" in name}
    assert norms == set(others["params"]) and norms.isdisjoint(decays["params"])
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.fill_(7)
    whole = family.published(str(checkpoint))
    assert whole.model.rotary_emb.inv_freq[0] == 1  # it works as it is, too
    whole.save_pretrained(tmp_path)
    state = ChameleonForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    before = banless(checkpoint).state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight":
            assert (tensor[4:END] == 7).all() and torch.equal(tensor[END:], before[name][END:])
        elif "vqmodel" not in name:
            assert (tensor == 7).all(), name


def test_a_folder_of_another_model_is_named(checkpoint, tmp_path):
    family = load_family(section(checkpoint), read(checkpoint))
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    save_file({"model.norm.weight": torch.zeros(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no checkpoint of ChameleonForConditionalGeneration. .* missing"):
        family.published(str(tmp_path))
