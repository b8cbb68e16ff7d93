"""LlamaGen, class-conditional, at any size (FoundationVision/LlamaGen, autoregressive/models/gpt.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from zipar_train.models.modeling_llamagen import LlamaGenConfig, LlamaGenForCausalLM
from zipar_train.models.vq import build_tokenizer
from zipar_train.sections import Model

SIZES = {  # depth, heads, width: the published models, gpt.py
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


def feed_forward(width: int) -> int:
    """LlamaGen's hidden width of the feed-forward: two thirds of 4 width, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // 256) * 256


class LlamaGen:
    """A Llama over codes, prompted by one class token; label `classes` is the null class of guidance.

    The original trains with dropout 0.1 on tokens, residuals and feed-forwards; transformers' Llama has none.
    """

    prompt_length = 1

    def __init__(self, model: Model):
        depth, heads, width = SIZES[model.size] if model.size else (model.depth, model.heads, model.width)
        assert depth and heads and width  # the recipe has checked it
        self.grid, self.codes, self.classes = model.raster, model.codes, model.classes
        self.tokenizer = build_tokenizer(model)
        config = LlamaGenConfig(
            codes=model.codes,
            classes=model.classes,
            rows=self.grid.height,
            columns=self.grid.width,
            prompt=self.prompt_length,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            hidden_size=width,
            intermediate_size=model.feed_forward or feed_forward(width),
            max_position_embeddings=self.prompt_length + self.grid.codes,
        )
        self.model = LlamaGenForCausalLM(config)

    def check(self, condition: Sequence[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(condition, device=self.model.device)
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
            raise ValueError(f"labels must be a list of class numbers, not {condition!r}")
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is not a class of this model: use 0 .. {self.classes - 1}")
        return labels.long()

    def drop(self, condition: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, self.classes, condition)

    def prompt(self, condition: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(self.codes + condition)[:, None]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def logits(self, embeddings: Tensor, positions: Tensor, mask: Any, cache: Cache | None = None) -> Tensor:
        attention = "flex_attention" if isinstance(mask, BlockMask) else "sdpa"
        if self.model.config._attn_implementation != attention:  # flex would add a bool mask instead of applying it
            self.model.set_attn_implementation(attention)
        hidden = self.model.model(
            inputs_embeds=embeddings,
            position_ids=(positions + self.prompt_length)[None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return self.model.lm_head(hidden)
