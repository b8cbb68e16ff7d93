"""The model that a benchmark measures: a recipe's, with random weights and nothing downloaded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from zipar_train.models.family import Family, build
from zipar_train.models.token_prompts import Prompter
from zipar_train.recipe.schema import Model, Recipe


class Ids(NamedTuple):
    input_ids: list[int]


class AnyWords:
    """In the place of a tokenizer of text: one id for each word, which means nothing.

    Guidance leads some families away from a negative caption, which is tokenized when images are drawn. Of the
    conditions that a benchmark makes, this is the only text.
    """

    bos_token_id, pad_token_id = 0, 1

    def __init__(self, prompter: Prompter):
        self.most = prompter.text.tokens - len(prompter.after) - 1  # the first token comes before

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def __call__(self, text: str, **settings: Any) -> Ids:
        return Ids([2] * min(len(text.split()), self.most))


def subject(recipe: Recipe, grid: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Family:
    """The recipe's generator on a grid of rows and columns, its random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    family = build(on_grid(recipe.model, grid), dtype=dtype, device=device)
    words = getattr(family, "words", None)
    if isinstance(words, Prompter):
        words.tokenizer = AnyWords(words)
    return family


def on_grid(model: Model, grid: Sequence[int]) -> Model:
    """A recipe's model on another grid, without its tokenizer of images."""
    return model.model_copy(update={"grid": list(grid), "tokenizer": None, "tokenizer_weights": None})
