"""Captions to the features of a T5 encoder, and features to a prompt of fixed length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.models.pretrained import pretrained
from zipar_train.recipe.schema import Text


class Captions(NamedTuple):
    """The condition of B images: left-padded features, zero where they are padding."""

    features: Tensor  # (B, P, F)
    padding: Tensor  # bool (B, P)


class Width:
    """What features of captions must be for a model that is prompted by them: of its width, however many.

    More than the prompt's length are cut off, as the original does.
    """

    fingerprint = None  # nothing about a caption itself

    def __init__(self, text: Text):
        self.wanted = text.features

    def loaded(self) -> "Width":
        return self

    def misfit(self, caption: str, features: Any = None) -> str:
        """Why the features of a caption do not fit; empty: they do, or there are none yet."""
        if features is None or features.shape[1] == self.wanted:
            return ""
        return f"caption features are {features.shape[1]} wide, the model's {self.wanted}: make them with its encoder"


class TextEncoder:
    """A frozen T5 (LlamaGen: flan-t5-xl), loaded when first used.

    LlamaGen also strips URLs, file names and the like from web captions; here a caption is lower-cased and its white
    space collapsed, no more.
    """

    def __init__(self, text: Text):
        self.text = text

    def load(self, device: torch.device) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        source = self.text.encoder
        if source is None:
            raise ValueError(
                "model.t5_features.encoder is null, so captions cannot be read: set it to a T5 (google/flan-t5-xl, or a "
                "folder), or use shards that hold features"
            )
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # as LlamaGen runs it
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
                f"model.t5_features.encoder = {source}: its tokenizer has {lacks}, its model knows {tokens:,} tokens. They do "
                "not belong together: download the folder again"
            )
        self.tokenizer, self.model = tokenizer, model.to(device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """Features (n, F) of each caption, n its tokens, at most P."""
        if not hasattr(self, "model"):
            self.load(device)
        clean = [" ".join(caption.lower().split()) for caption in captions]
        tokens = self.tokenizer(
            clean, padding=True, truncation=True, max_length=self.text.tokens, return_tensors="pt"
        ).to(device)
        hidden = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [row[real] for row, real in zip(hidden, tokens.attention_mask.bool(), strict=True)]


def left_padded(features: Sequence[Tensor], text: Text, device: torch.device) -> Captions:
    """Features (n, F) of each image as a prompt: at the right, zeros to their left; at most P are kept.

    Raises:
        ValueError: for features of another width.
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
