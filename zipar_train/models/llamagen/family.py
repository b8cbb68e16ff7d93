"""The family LlamaGen, with a class or caption prompt (FoundationVision/LlamaGen, autoregressive/models/gpt.py)."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.models.conditions import Condition, ConditionInput
from zipar_train.models.llama_family import LlamaFamily
from zipar_train.models.llamagen.modeling_llamagen import LlamaGenConfig, LlamaGenForCausalLM
from zipar_train.models.llamagen.state_dict import SIZES
from zipar_train.models.t5_features import Captions, TextEncoder, left_padded
from zipar_train.recipe.model import Model


def feed_forward(width: int) -> int:
    """Return LlamaGen's feed-forward size: two thirds of 4 times the hidden size, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // 256) * 256


class LlamaGen(LlamaFamily):
    """A Llama over image codes, prompted by one class token; label `classes` is the null class of guidance.

    The original is trained with dropout 0.1 on tokens, residuals and feed-forwards; transformers' Llama has none.
    """

    def __init__(self, model: Model):
        depth, heads, width = (
            SIZES[model.size] if model.size else (model.num_layers, model.num_heads, model.hidden_size)
        )
        assert depth and heads and width  # checked by the recipe
        self.section, self.grid, self.codebook_size, self.classes = (
            model,
            model.raster,
            model.codebook_size,
            model.num_classes or 0,
        )
        self.prompt_length = model.prompt
        self.model = LlamaGenForCausalLM(
            LlamaGenConfig(
                codes=model.codebook_size,
                classes=self.classes,
                features=model.t5_features.features if model.t5_features else 0,
                rows=self.grid.height,
                columns=self.grid.width,
                prompt=self.prompt_length,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                hidden_size=width,
                intermediate_size=model.ffn_size or feed_forward(width),
                max_position_embeddings=self.prompt_length + self.grid.num_codes,
            )
        )

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return None  # not published in transformers' layout, see state_dict.py

    def published(self, source: str | None) -> PreTrainedModel:
        return self.model

    def check(self, condition: ConditionInput) -> Condition:
        if isinstance(condition, Sequence) and any(isinstance(label, str) for label in condition):
            raise ValueError(f"this model is prompted by class numbers, not by {condition!r}")
        labels = torch.as_tensor(condition)  # a list is checked before it goes to a GPU, which avoids a synchronisation
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
            raise ValueError(f"labels must be a list of class numbers, not {condition!r}")
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is not a class of this model: use 0 .. {self.classes - 1}")
        return labels.to(self.model.device).long()

    def drop(self, condition: Condition, where: Tensor) -> Condition:
        assert isinstance(condition, Tensor)
        return torch.where(where, self.classes, condition)

    def prompt(self, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        return self.model.get_input_embeddings()(self.codebook_size + condition)[:, None]

    def padding(self, condition: Condition) -> Tensor | None:
        return None


class LlamaGenT2I(LlamaGen):
    """LlamaGen with a caption prompt: P left-padded T5 features through a small MLP.

    An unconditional caption is replaced by the fixed null features and keeps its padding, as in the original
    (autoregressive/models/generate.py).
    """

    @cached_property
    def encoder(self) -> TextEncoder:
        assert self.section.t5_features
        return TextEncoder(self.section.t5_features)

    def check(self, condition: ConditionInput) -> Condition:
        """Convert captions (str, features (n, F), or an earlier result) to left-padded features on the device.

        Raises:
            ValueError: If the condition is neither, or the features have another dimension.
        """
        text, device = self.section.t5_features, self.model.device
        assert text
        if isinstance(condition, Captions):
            return Captions(*(part.to(device) for part in condition))
        if not isinstance(condition, Sequence) or isinstance(condition, str) or not len(condition):
            raise ValueError(f"captions must be a list of texts, not {condition!r}")
        texts = [caption for caption in condition if isinstance(caption, str)]
        encoded: Sequence[Any] = self.encoder(texts, device) if len(texts) == len(condition) else condition
        features = [each for each in encoded if isinstance(each, Tensor)]
        if len(features) != len(condition):
            raise ValueError(f"captions must be texts, not {condition!r}")
        return left_padded(features, text, device)

    def drop(self, condition: Condition, where: Tensor) -> Condition:
        assert isinstance(condition, Captions)
        null = self.model.get_buffer("caption.null").to(condition.features)
        return Captions(torch.where(where[:, None, None], null, condition.features), condition.padding)

    def prompt(self, condition: Condition) -> Tensor:
        assert isinstance(condition, Captions)
        return self.model.caption(condition.features.to(self.model.dtype))

    def padding(self, condition: Condition) -> Tensor | None:
        assert isinstance(condition, Captions)
        return condition.padding
