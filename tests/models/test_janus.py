"""Janus-Pro against transformers' own image generation, from a checkpoint in the published layout."""

import json
from pathlib import Path

import pytest
import torch
from commands import every_verb
from theorem import check_captioned_theorem
from transformers import JanusConfig, JanusForConditionalGeneration

from zipar_train import Plan, load
from zipar_train.decoding.decoder import Decoder
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.models.token_prompts import Prompts
from zipar_train.recipe.model import Model, Words
from zipar_train.recipe.schema import SamplingParams

TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "num_image_tokens": 9,
    "projection_dim": 16,
    "depth": 2,
    "mlp_ratio": 2.0,
}
VQ = {
    "embed_dim": 8,
    "num_embeddings": 24,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 3,
    "projection_dim": 16,
    "image_token_embed_dim": 16,
}
WORDS = [
    "<pad>",
    "<bos>",
    "<unk>",
    "<begin_of_image>",
    "<|User|>",
    "<|Assistant|>",
    ":",
    "a",
    "blue",
    "red",
    "car",
    "house",
    "small",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Janus-Pro with its tokenizer of text, as published: sharded safetensors."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("janus")
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(
        JanusConfig(text_config={"model_type": "llama", **TEXT}, vision_config=VISION, vq_config=VQ)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<begin_of_image>", "<|User|>", "<|Assistant|>", ":"],
    ).save_pretrained(folder)
    return folder


def section(checkpoint, *, tokens=12) -> Model:
    return Model(
        family="janus",
        num_layers=2,
        num_heads=2,
        hidden_size=16,
        ffn_size=24,
        grid=[3, 3],
        codebook_size=24,
        tokenizer="vq16",
        tokenizer_weights=str(checkpoint),
        token_prompt=Words(encoder=str(checkpoint), tokens=tokens, vocabulary=20),
    )


CAPTIONS = ["a blue car", "a small red house", "car"]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_next_token_draws_what_transformers_draws(checkpoint, guidance):
    """Greedy, padded prompts of several lengths, guidance; every code of every image."""
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    theirs = JanusForConditionalGeneration.from_pretrained(checkpoint).eval()
    family = load_family(section(checkpoint), read(checkpoint))
    prompts = family.check(CAPTIONS)
    assert prompts.padding.sum(1).tolist() != [0, 0, 0]
    theirs.generation_config.update(bos_token_id=1, pad_token_id=0, max_length=40, do_sample=False)
    theirs.generation_config.generation_kwargs = {"boi_token_id": 3}
    expected = theirs.generate(
        prompts.ids,
        attention_mask=(~prompts.padding).long(),
        generation_mode="image",
        guidance_scale=guidance,
        do_sample=False,
    )
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    sampling = SamplingParams(guidance=guidance, temperature=0.0)
    ours = Decoder(family, plan)(CAPTIONS, torch.zeros(3, 9, dtype=torch.long), sampling).flatten(1)
    assert torch.equal(ours, expected)
    assert len(torch.unique(ours)) > 3
    pixels = family.tokenizer.decode(ours.view(3, 3, 3))
    with torch.no_grad():
        original = theirs.decode_image_tokens(expected)
    assert (pixels - (original.permute(0, 3, 1, 2) * 127.5 + 128).clamp(0, 255).to(torch.uint8)).abs().max() <= 1


@pytest.mark.parametrize("window", [3, 2, 1])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("streamlined", [False, True])
def test_theorem(checkpoint, window, guidance, streamlined):
    """Padded prompts of several lengths; the drawing body alike."""
    family = load_family(section(checkpoint), read(checkpoint), dtype=torch.float64)
    check_captioned_theorem(family, CAPTIONS, window=window, guidance=guidance, streamlined=streamlined)


def test_names_and_counts_are_the_published():
    """Built on no device: ours have namesakes in transformers' model, and these in ours but for what draws nothing."""
    for size, text in {
        "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
        "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32},
    }.items():
        width = text["hidden_size"]
        parts = {"projection_dim": width, "image_token_embed_dim": width}
        with torch.device("meta"):
            theirs = JanusForConditionalGeneration(
                JanusConfig(
                    text_config={
                        "model_type": "llama",
                        "vocab_size": 102400,
                        **text,
                        "num_key_value_heads": text["num_attention_heads"],
                        "tie_word_embeddings": False,
                    },
                    vq_config=parts,
                    vision_config={"projection_dim": width},
                )
            )
        words = Words(encoder="nowhere", tokens=64)
        ours = build(
            Model(family="janus", size=size, grid=[24, 24], codebook_size=16384, token_prompt=words),
            device="meta",
            empty=True,
        )
        renamed = ours.renamed(theirs.state_dict())
        mine = ours.model.state_dict()
        assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in mine.items()}


@pytest.mark.slow
def test_from_pictures_to_a_checkpoint_for_transformers(checkpoint, clip, tmp_path, run):
    model = [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.hidden_size=16",
        "model.ffn_size=24",
        "model.codebook_size=24",
        "model.grid=[3,3]",
        f"model.token_prompt={{encoder: {checkpoint}, tokens: 12, vocabulary: 20}}",
    ]
    every_verb(run, tmp_path, "janus-pro-1b", model, checkpoint=checkpoint, clip=clip, windows=[3, 2, 1])
    before, after = (JanusForConditionalGeneration.from_pretrained(f) for f in (checkpoint, tmp_path / "hf"))
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
    assert changed and all(".language_model.layers." in name for name in changed)
    again, tuned = load(tmp_path / "hf"), load(tmp_path / "run")
    assert torch.equal(again.generate(CAPTIONS, window=2).codes, tuned.generate(CAPTIONS, window=2).codes)


def test_mistakes_are_named(checkpoint, tmp_path):
    family = load_family(section(checkpoint), read(checkpoint))
    mistakes = {
        ("",): "is empty",
        ("a car", 3): "is empty, or not text",
        ("a " * 9,): r"takes \d+ tokens with what surrounds it, the prompt has 12",
    }
    for captions, message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            family.check(list(captions))
    with pytest.raises(ValueError, match="captions must be a list"):
        family.check("a car")
    wrong = section(checkpoint).model_copy(
        update={"token_prompt": Words(encoder=str(tmp_path), tokens=12, vocabulary=20)}
    )
    with pytest.raises(ValueError, match="no tokenizer of text can be loaded"):
        build(wrong).check(["a car"])
    with pytest.raises(ValueError, match="does not fit the model of this recipe"):
        load_family(section(checkpoint).model_copy(update={"hidden_size": 32}), read(checkpoint))
    llamagen = Model(
        family="llamagen",
        num_layers=2,
        num_heads=2,
        hidden_size=16,
        ffn_size=24,
        grid=[3, 3],
        codebook_size=24,
        num_classes=3,
    )
    with pytest.raises(ValueError, match="does not fit the model"):
        load_family(llamagen, read(checkpoint))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        read(broken)
    name = next(iter(index["weight_map"]))
    for weight_map, message in (
        ({name: "gone.safetensors"}, "gone.safetensors"),
        ({name: "../x.safetensors"}, "outside"),
    ):
        (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            read(broken)


def test_unconditional_prompts_keep_their_frame(checkpoint):
    family = load_family(section(checkpoint), read(checkpoint))
    prompts = family.check(CAPTIONS)
    dropped = family.drop(prompts, torch.tensor([True, False, True]))
    assert isinstance(dropped, Prompts)
    assert torch.equal(dropped.ids[1], prompts.ids[1])
    for row in (0, 2):
        assert set(dropped.ids[row].tolist()) == {0, 1, 3} and dropped.ids[row, -1] == 3
    assert torch.equal(dropped.padding, prompts.padding)
