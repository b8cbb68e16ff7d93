"""A tiny SimpleAR in the published layout, with its tokenizer of text and a tiny Cosmos tokenizer."""

import json
from pathlib import Path

import cosmos_files
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from zipar_train.recipe.model import Model, Words

HEIGHT, WIDTH = 4, 5
SPECIAL = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]  # simpar/train/train.py
TEXTS = ["A highly realistic image of a small blue red car house", "An image of bad blurry"]
WORDS = 60  # ids of the text tokenizer's vocabulary
FIRST = WORDS + 1 + len(SPECIAL)  # and <|endoftext|>
VOCABULARY = FIRST + cosmos_files.CODES
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CAPTIONS = ["a blue car", "a small red house", "car"]


def checkpoint_in(folder: Path, **changes) -> Qwen2ForCausalLM:
    """Save a checkpoint with random weights; the words' embeddings are small, so that all codes are likelier."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "embed" in name else 1.0 if "proj" in name else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape) + name.endswith("norm.weight"))
        model.model.embed_tokens.weight[:FIRST] *= 0.1
    model.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    cosmos_files.save_cosmos(folder)
    return model


def text_tokenizer(special: list[str] = SPECIAL) -> Qwen2Tokenizer:
    """A byte-pair tokenizer of Qwen2 that knows the words of the captions, with SimpleAR's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=WORDS, show_progress=False))
    model = json.loads(words.to_str())["model"]
    assert len(model["vocab"]) == WORDS
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def section(checkpoint: Path, *, tokens: int = 20, **changes) -> Model:
    """The recipe's section of such a checkpoint."""
    words = Words(
        encoder=str(checkpoint),
        tokens=tokens,
        vocabulary=VOCABULARY,
        prompt_prefix="A highly realistic image of ",
        negative_prompt="An image of bad blurry",
    )
    model = {
        "family": "simplear",
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_size": 16,
        "ffn_size": 24,
        "grid": [HEIGHT, WIDTH],
        "codebook_size": cosmos_files.CODES,
        "tokenizer": "cosmos",
        "tokenizer_weights": str(checkpoint),
        "token_prompt": words,
    }
    return Model(**model | changes)
