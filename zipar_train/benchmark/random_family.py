"""Model of a benchmark: a recipe's model with random weights, without downloads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from zipar_train.models.family import Family, build
from zipar_train.models.token_prompts import Prompter
from zipar_train.recipe.model import Model


class Ids(NamedTuple):
    input_ids: list[int]


class AnyWords:
    """Dummy text tokenizer that returns the same id for every word.

    Under guidance some families tokenize a negative caption during generation. It is the only text in a benchmark.
    """

    bos_token_id, pad_token_id, bos_token, chat_template = 0, 1, "", None

    def __init__(self, prompter: Prompter):
        self.most = prompter.text.tokens - len(prompter.after) - 1  # minus the first token

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def __call__(self, text: str, **settings: Any) -> Ids:
        return Ids([2] * min(len(text.split()), self.most))


def random_family(model: Model, grid: Sequence[int], *, seed: int, dtype: torch.dtype, device: torch.device) -> Family:
    """Build a recipe's generator on a grid (rows, columns), with random weights."""
    torch.manual_seed(seed)
    family = build(on_grid(model, grid), dtype=dtype, device=device)
    prompter = getattr(family, "prompter", None)
    if isinstance(prompter, Prompter):
        prompter.tokenizer = AnyWords(prompter)
    return family


def on_grid(model: Model, grid: Sequence[int]) -> Model:
    """Return a recipe's model section with another grid and without the image tokenizer."""
    return model.model_copy(update={"grid": list(grid), "tokenizer": None, "tokenizer_weights": None})
