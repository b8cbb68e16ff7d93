"""The interface of image generators to the rest of zipar-train, and the table of families.

A family is one file, one line in the table, and its name in `recipe/model.py`.

Shapes: B images, S slots, P prompt tokens, N = H W codes per image, V codebook size, D hidden size of the model.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from zipar_train.models.additive import additive, computed_in
from zipar_train.models.attention import attention_kernels
from zipar_train.models.conditions import Condition, ConditionInput
from zipar_train.models.filling import allocate, find_frequencies
from zipar_train.models.t5_features import Width
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.models.tokenizers.base import Tokenizer
from zipar_train.plan.grid import Grid
from zipar_train.plan.masks import Mask, mask_padding
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.model import Model

FAMILIES = {  # name: module and class, imported on demand
    "llamagen": ("zipar_train.models.llamagen.family", "LlamaGen"),
    "llamagen-t2i": ("zipar_train.models.llamagen.family", "LlamaGenT2I"),
    "janus": ("zipar_train.models.janus", "Janus"),
    "lumina": ("zipar_train.models.lumina", "Lumina"),
    "emu3": ("zipar_train.models.emu3", "Emu3"),
    "glm-image": ("zipar_train.models.glm_image", "GlmImage"),
    "simplear": ("zipar_train.models.simplear", "SimpleAR"),
}


class Family(Protocol):
    """An autoregressive image generator."""

    grid: Grid
    model: PreTrainedModel  # a transformers model, which supports saving, adapters and activation checkpointing
    codebook_size: int  # V
    prompt_length: int  # P

    def on(self, sides: Sequence[int]) -> "Family":
        """Return the family on another grid, by its rows and columns of codes, with the same weights."""

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename tensors of a published transformers checkpoint to the names of `model`; None if it is not one.

        Raises:
            ValueError: If it is one of this layout, but of another model; says so after the name of the checkpoint.
        """

    def published(self, source: str | None) -> PreTrainedModel:
        """Return a model with these weights that plain transformers loads.

        Args:
            source: The checkpoint that provides the parts that `model` lacks, because they are not used for images.

        Raises:
            ValueError: If such parts are needed, and `source` is not a checkpoint of this family.
        """

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the image tokenizer (codes <-> pixels), whose weights are read on first access; None: codes only."""

    def check(self, condition: ConditionInput) -> Condition:
        """Check the condition of B images, and return it in the family's format on the model's device.

        Args:
            condition: Labels (B,), captions, or an earlier result of this method.

        Raises:
            ValueError: If the condition is not valid for this family.
        """

    def drop(self, condition: Condition, where: Tensor) -> Condition:
        """Make the images `where`, bool (B,), unconditional, for label dropout and classifier-free guidance."""

    def prompt(self, condition: Condition) -> Tensor:
        """Return the input embeddings of the prompt, (B, P, D)."""

    def padding(self, condition: Condition) -> Tensor | None:
        """Return which prompt tokens are padding, bool (B, P); no other token attends to them. None: none are."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Return input embeddings (B, S, D) of tokens (B, S): image codes 0 .. V-1, or ROW_END."""

    def hidden(self, embeddings: Tensor, positions: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        """Run the model's body on S slots, and return the last hidden states (B, S, D).

        Args:
            embeddings: Input embeddings (B, S, D).
            positions: Raster positions, int64 (S,) or (B, S); the prompt has positions -P .. -1.
            mask: Attention visibility: dense (1 or B, 1, S, keys), bool, or 0 and -infinity in the embeddings' dtype;
                or a BlockMask.
            cache: Stores the new keys and values, and returns all keys and values that the mask covers.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits over image codes (..., V) for hidden states (..., D)."""


class Fits(Protocol):
    """A check of whether captions fit a model's prompt."""

    @property
    def fingerprint(self) -> str | None:
        """Return a hash of everything that the check depends on; None: captions of any length fit."""

    def loaded(self) -> "Fits":
        """Load what the check needs, and return the check itself.

        Raises:
            ValueError: If loading fails.
        """

    def misfit(self, caption: str, features: Any = None) -> str:
        """Return why a caption, or its features (n, F), does not fit; empty if it does."""


def build(
    model: Model, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", empty: bool = False
) -> Family:
    """Build the recipe's generator with random weights from torch's global generator, or with uninitialised ones.

    Args:
        empty: Allocate the weights without initialising them, because they will be loaded from a file.
    """
    module, name = FAMILIES[model.family]
    with torch.device("meta" if empty else device):
        family: Family = getattr(import_module(module), name)(model)
    family.model.to(dtype=dtype)  # type: ignore[call-arg]
    if empty:
        allocate(family.model, device=device)
    else:
        find_frequencies(family.model, device=device)
    return family


def fits(model: Model) -> Fits | None:
    """Return the caption check of the recipe's model, built without weights; None if it is prompted by classes."""
    if model.t5_features is not None:
        return Width(model.t5_features)
    if model.token_prompt is None:
        return None
    module, name = FAMILIES[model.family]
    with torch.device("meta"):
        prompter: Prompter = getattr(import_module(module), name)(model).prompter
    return prompter


def teacher_forced(family: Family, plan: Plan, codes: Tensor, condition: Condition, mask: Mask) -> Tensor:
    """Compute the logits of every code of given images, as decoding along the plan would, in one parallel pass.

    Args:
        codes: int64 (B, N) in raster order.
        condition: The checked condition of B images.
        mask: The plan's mask, dense (bool, or 0 and -infinity) or block, on the model's device.

    Returns:
        Logits (B, N, V) in raster order: row n predicts code n.
    """
    return family.head(target_hidden_states(family, plan, codes, condition, mask))


def target_hidden_states(family: Family, plan: Plan, codes: Tensor, condition: Condition, mask: Mask) -> Tensor:
    """Return the hidden states (B, N, D) that predict each code, for callers that cannot store all logits at once."""
    source, position, slots = _tables(plan, codes.device)
    tokens = torch.where(source >= 0, codes.index_select(1, source.clamp(min=0)), ROW_END)
    embeddings = torch.cat([family.prompt(condition), family.embed(tokens)], dim=1)
    if (padding := family.padding(condition)) is not None:
        mask = mask_padding(mask, padding)
    mask = additive(mask, computed_in(embeddings))
    with attention_kernels(codes.device):
        hidden = family.hidden(embeddings, position, mask)
    return hidden.index_select(1, slots)  # faster backward than `hidden[:, slots]`, which sorts indices


@lru_cache(maxsize=64)
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a plan's tables on the device: sources after the prompt, all positions, and the slot for each code."""
    source = torch.tensor(plan.source[plan.prompt :], device=device)
    return source, torch.tensor(plan.position, device=device), torch.tensor(plan.predicting(), device=device)


def conditions(model: Model, images: int) -> ConditionInput:
    """Return placeholder conditions for benchmarks: classes in turn, or random captions."""
    if model.t5_features:
        return [torch.randn(model.t5_features.tokens, model.t5_features.features) for _ in range(images)]
    if model.token_prompt:
        ids = torch.randint(model.token_prompt.vocabulary or 1000, (images, model.token_prompt.tokens))
        return Prompts(ids, torch.zeros_like(ids, dtype=torch.bool))
    return [k % (model.num_classes or 1) for k in range(images)]
