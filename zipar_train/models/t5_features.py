"""Conversion of captions to features of a T5 encoder, and of features to a prompt of fixed length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.models.pretrained import pretrained
from zipar_train.recipe.model import Text


class Captions(NamedTuple):
    """The condition of B images: left-padded features, zero at padding."""

    features: Tensor  # (B, P, F)
    padding: Tensor  # bool (B, P)


class Width:
    """The check that caption features have the dimension the model requires; their number is arbitrary.

    Features beyond the prompt length are truncated later, as in the original.
    """

    fingerprint = None  # captions themselves are not checked

    def __init__(self, text: Text):
        self.wanted = text.features

    def loaded(self) -> "Width":
        return self

    def misfit(self, caption: str, features: Any = None) -> str:
        """Return why the features of a caption do not fit; empty if they do, or if there are none yet."""
        if features is None or features.shape[1] == self.wanted:
            return ""
        return f"caption features are {features.shape[1]} wide, the model's {self.wanted}: make them with its encoder"


class TextEncoder:
    """A frozen T5 encoder (LlamaGen: flan-t5-xl), loaded on first use.

    Captions are lower-cased, and white space is collapsed. LlamaGen also removes URLs, file names and similar text from
    web captions.
    """

    def __init__(self, text: Text):
        self.text = text

    def load(self, device: torch.device) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        source = self.text.encoder
        if source is None:
            raise ValueError(
                "model.t5_features.encoder is null, so captions cannot be read: set it to a T5 (google/flan-t5-xl, or "
                "a folder), or use shards that hold features"
            )
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # as in LlamaGen
        named = {"key": "model.t5_features.encoder", "what": "no T5 encoder"}
        tokenizer = pretrained(AutoTokenizer, source, **named)
        model = pretrained(T5EncoderModel, source, dtype=dtype, **named).eval().requires_grad_(False)
        width, tokens = model.config.d_model, model.config.vocab_size
        if width != self.text.features:
            raise ValueError(
                f"model.t5_features.encoder = {source}: its features are {width} wide, not {self.text.features}"
            )
        if len(tokenizer) > tokens or tokenizer.pad_token_id is None:
            lacks = "no padding token" if tokenizer.pad_token_id is None else f"{len(tokenizer):,} tokens"
            raise ValueError(
                f"model.t5_features.encoder = {source}: its tokenizer has {lacks}, its model knows {tokens:,} tokens. "
                "They do not belong together: download the folder again"
            )
        self.tokenizer, self.model = tokenizer, model.to(device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """Return features (n, F) of each caption, where n <= P is its number of tokens."""
        if not hasattr(self, "model"):
            self.load(device)
        clean = [" ".join(caption.lower().split()) for caption in captions]
        tokens = self.tokenizer(
            clean, padding=True, truncation=True, max_length=self.text.tokens, return_tensors="pt"
        ).to(device)
        hidden = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [row[real] for row, real in zip(hidden, tokens.attention_mask.bool(), strict=True)]


def left_padded(features: Sequence[Tensor], text: Text, device: torch.device) -> Captions:
    """Return features (n, F) of each image as a left-padded prompt (B, P, F); at most P features are kept.

    Raises:
        ValueError: If features have another dimension, or are empty.
    """
    prompt = torch.zeros(len(features), text.tokens, text.features, device=device)
    padding = torch.ones(len(features), text.tokens, dtype=torch.bool, device=device)
    for row, feature in enumerate(features):
        if feature.ndim != 2 or feature.shape[1] != text.features or not len(feature):
            raise ValueError(f"caption features of shape {list(feature.shape)}, not (tokens, {text.features})")
        kept = min(len(feature), text.tokens)
        prompt[row, -kept:] = feature[:kept].to(prompt)
        padding[row, -kept:] = False
    return Captions(prompt, padding)
