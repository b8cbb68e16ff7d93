"""Families for tests: stock Llamas with longer prompts and row-end tokens, so that plans are tested beyond LlamaGen."""

from pathlib import Path

import torch
from commands import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from zipar_train.decoding.generator import Generator
from zipar_train.models.cache_argument import cache_arguments
from zipar_train.models.family import build
from zipar_train.models.restore import LoadedWeights
from zipar_train.plan.grid import Grid
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import Model, Text


class StockLlama:
    """A one-dimensional Llama: ids 0 .. V-1 are codes, V the row end, above that the prompts' tokens.

    The prompt of label n is P times its token; a null prompt is P times the last id.
    """

    tokenizer = None

    def __init__(self, grid: Grid, *, codes: int = 7, prompt: int = 1, layers: int = 2, seed: int = 0):
        self.grid, self.codebook_size, self.prompt_length = grid, codes, prompt
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=codes + 5,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=layers,
                num_attention_heads=2,
                initializer_range=0.4,
            )
        ).to(torch.float64)

    def check(self, condition):
        return torch.as_tensor(condition)

    def drop(self, condition, where):
        return torch.where(where, 3, condition)

    def prompt(self, condition):
        return self.model.get_input_embeddings()(self.codebook_size + 1 + condition)[:, None].expand(
            -1, self.prompt_length, -1
        )

    def padding(self, condition):
        return None

    def embed(self, tokens):
        return self.model.get_input_embeddings()(torch.where(tokens == ROW_END, self.codebook_size, tokens))

    def hidden(self, embeddings, positions, mask, cache=None):
        return self.model.model(
            inputs_embeds=embeddings,
            position_ids=(positions + self.prompt_length).view(-1, positions.shape[-1]),
            attention_mask=mask,
            **cache_arguments(self.model.model, cache),
        ).last_hidden_state

    def head(self, hidden):
        return self.model.lm_head(hidden)[..., : self.codebook_size]


def llamagen(
    height: int,
    width: int,
    *,
    codes: int = 7,
    classes: int = 3,
    head: int = 8,
    seed: int = 0,
    dtype=torch.float64,
    device="cpu",
):
    """A LlamaGen with weights large enough that every context matters; the same on every device.

    Args:
        head: width of an attention head. torch.compile's FlexAttention takes 16 and more.
    """
    torch.manual_seed(seed)
    model = Model(
        family="llamagen",
        num_layers=2,
        num_heads=2,
        hidden_size=2 * head,
        ffn_size=3 * head,
        grid=[height, width],
        codebook_size=codes,
        num_classes=classes,
    )
    family = _loud(build(model, dtype=dtype), 20 * (8 / head) ** 0.5)
    family.model.to(device)
    return family


def llamagen_t2i(height: int, width: int, *, codes: int = 7, tokens: int = 3, features: int = 6, seed: int = 0):
    """One prompted by captions."""
    torch.manual_seed(seed)
    text = Text(encoder=None, tokens=tokens, features=features)
    model = Model(
        family="llamagen-t2i",
        num_layers=2,
        num_heads=2,
        hidden_size=16,
        ffn_size=24,
        grid=[height, width],
        codebook_size=codes,
        t5_features=text,
    )
    return _loud(build(model, dtype=torch.float64))


def _loud(family, times: float = 20):
    with torch.no_grad():
        for parameter in family.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(times)
    return family


def random_digits() -> Generator:
    """A generator of the recipe digits-base, tiny, with random weights, on the CPU."""
    torch.manual_seed(0)
    recipe = load_recipe("digits-base", TINY)
    state = build(recipe.model).model.state_dict()
    return Generator(recipe, LoadedWeights(Path("random"), recipe, state, {}), device="cpu")
