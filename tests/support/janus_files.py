"""Janus in its authors' layout at a small size: a checkpoint with its tokenizer of text, and the recipe's section."""

import json
from pathlib import Path

import original_janus
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from zipar_train.models.janus import IMAGE, PAD, START
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import Model, Words
from zipar_train.recipe.schema import Recipe

VQ = {"base": 32, "mult": (1, 1), "latent": 32, "embed": 8, "codes": 24, "blocks": 1}
TOWER = {"blocks": 2, "patch": 8}
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", PAD, START, "<|User|>", "<|Assistant|>", IMAGE)
TOKENS = 60  # of a prompt
VOCABULARY = 272
CONFIG = original_janus.config(
    width=16, ffn=24, layers=2, heads=2, vocabulary=VOCABULARY, tower=32, codes=24, positions=128, side=24
)
CAPTIONS = ["a blue car", "a small red house", "car"]


def write_checkpoint(folder: Path, *, layout: str = "sharded", dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    """Write a checkpoint; returns its tensors.

    layout: "sharded": two .bin with an index, as Janus-Pro-7B; "bin": pytorch_model.bin, as Janus-Pro-1B;
        "safetensors": model.safetensors, as derivatives.
    """
    folder.mkdir(exist_ok=True)
    state = original_janus.random_checkpoint(CONFIG, **TOWER, vq=VQ, seed=seed)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names, index = sorted(state), {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_text_tokenizer(folder)
    return state


def write_text_tokenizer(folder: Path) -> None:
    """Write the files of DeepSeek's kind: BPE over bytes, under the name of a class that splits text otherwise."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"Ġc": 256, "ar": 257, "Ġcar": 258}
    tokenizer = Tokenizer(models.BPE(words, [("Ġ", "c"), ("a", "r"), ("Ġc", "ar")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": begin, "eos_token": SPECIAL[1], "pad_token": None, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**named, "tokenizer_class": "LlamaTokenizerFast", "model_max_length": 16384})
    )
    processor = {"processor_class": "VLChatProcessor", "sft_format": "deepseek"}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def original_prompt(folder: Path, caption: str) -> list[int]:
    """The ids of a caption's prompt, from tokenizer.json alone.

    As apply_sft_template_for_multi_turn_prompts (processing_vlm.py) and get_prompt (conversation.py) make it.
    """
    roles, seps = (("<|User|>", caption.strip()), ("<|Assistant|>", "")), ("\n\n", SPECIAL[1])
    text = "".join(f"{role}: {words}{seps[i]}" if words else f"{role}:" for i, (role, words) in enumerate(roles))
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.strip() + START).ids


def section(folder: Path, **changes) -> Model:
    shape = {"num_layers": 2, "num_heads": 2, "hidden_size": 16, "ffn_size": 24, "grid": [3, 3], "codebook_size": 24}
    words = Words(encoder=str(folder), tokens=TOKENS, vocabulary=VOCABULARY)
    sources = {"tokenizer": "vq16", "tokenizer_weights": str(folder), "weights": str(folder)}
    return Model(**{"family": "janus", **shape, **sources, "token_prompt": words, **changes})


def overrides(folder: Path) -> list[str]:
    """Overrides that make a shipped recipe of Janus this model."""
    model = section(folder).model_dump()
    keys = ("num_layers", "num_heads", "hidden_size", "ffn_size", "codebook_size", "grid")
    prompt = f"{{encoder: {folder}, tokens: {TOKENS}, vocabulary: {VOCABULARY}}}"
    sources = [f"model.{key}={folder}" for key in ("weights", "tokenizer_weights")]
    return ["model.size=null", *(f"model.{key}={model[key]}" for key in keys), f"model.token_prompt={prompt}", *sources]


def recipe_of(folder: Path) -> Recipe:
    """The shipped recipe of Janus-Pro-1B as this model."""
    return load_recipe("janus-pro-1b", [*overrides(folder), "zipar.windows={3: 1}", "evaluate.windows=[3]"])
