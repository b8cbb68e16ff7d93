"""Lumina-mGPT's published layout at a small size: a checkpoint with its tokenizers, and the recipe's section for it."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from zipar_train.models.tokenizers.chameleon import VQGAN
from zipar_train.recipe.model import Model, Words

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


def published(folder: Path) -> Path:
    """A tiny Lumina-mGPT as its authors' code saves it, its tokenizer of text, and Meta's of images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
