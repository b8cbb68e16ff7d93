"""The base class of generators whose body is a Llama: attention, logits and the image tokenizer."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from zipar_train.models.cache_argument import cache_arguments
from zipar_train.models.tokenizers.base import Tokenizer, build_tokenizer
from zipar_train.plan.grid import Grid
from zipar_train.plan.masks import Mask
from zipar_train.recipe.model import Model

Own = TypeVar("Own", bound="LlamaFamily")


class LlamaFamily:
    """The part of a `Family` that generators with a Llama as their body have in common.

    Attributes:
        section: The recipe's section `model`.
    """

    section: Model
    grid: Grid
    codebook_size: int
    prompt_length: int
    model: Any  # a transformers model

    def on(self: Own, sides: Sequence[int]) -> Own:
        """Return the family on another grid, by its rows and columns of codes, with the same weights."""
        other = copy(self)
        other.section = self.section.on(sides)
        other.grid = other.section.raster
        return other

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return build_tokenizer(self.section)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def hidden(self, embeddings: Tensor, positions: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        attention = "flex_attention" if isinstance(mask, BlockMask) else "sdpa"
        if self.model.config._attn_implementation != attention:  # not flex: it would add a bool mask
            self.model.set_attn_implementation(attention)
        return self.model.model(
            inputs_embeds=embeddings,
            position_ids=self.position_ids(positions),
            attention_mask=mask,
            **cache_arguments(self.model.model, cache),
        ).last_hidden_state

    def position_ids(self, positions: Tensor) -> Tensor:
        """Return what the model rotates by, int64 (1 or B, S), for raster positions (S,) or (B, S)."""
        return (positions + self.prompt_length).view(-1, positions.shape[-1])

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)
