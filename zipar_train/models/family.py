"""What the rest of zipar-train may ask of a generator, and the table of families.

A family is one file and one line in the table.

Shapes: B images, S slots, P prompt tokens, N = H W codes of an image, V codes in the codebook, D the model's width.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from zipar_train.models.additive import additive, computed_in
from zipar_train.models.attention import attention_kernels
from zipar_train.models.filling import allocate, find_frequencies
from zipar_train.models.t5_features import Width
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.models.tokenizers.base import Tokenizer
from zipar_train.plan.grid import Grid
from zipar_train.plan.masks import mask_padding
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import Model

FAMILIES = {  # name: module and class, imported when asked for
    "llamagen": ("zipar_train.models.llamagen.family", "LlamaGen"),
    "llamagen-t2i": ("zipar_train.models.llamagen.family", "LlamaGenT2I"),
    "janus": ("zipar_train.models.janus", "Janus"),
    "lumina": ("zipar_train.models.lumina", "Lumina"),
    "emu3": ("zipar_train.models.emu3", "Emu3"),
}


class Family(Protocol):
    """An autoregressive image generator."""

    grid: Grid
    model: PreTrainedModel  # a transformers model: save and load, adapters, checkpointing for free
    codes: int  # V
    prompt_length: int  # P

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Tensors of a checkpoint in transformers' layout by the names of `model`; None if it is no such checkpoint."""

    def published(self, source: str | None) -> PreTrainedModel:
        """A model that plain transformers loads, with these weights; what draws nothing is as in checkpoint `source`.

        Raises:
            ValueError: if that is needed, and is no checkpoint of this family.
        """

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Codes <-> pixels; its weights are read when it is first asked for."""

    def check(self, condition: Any) -> Any:
        """The condition of B images as the family keeps it, on the model's device: labels int64 (B,), or captions.

        Raises:
            ValueError: for a condition the family does not know.
        """

    def drop(self, condition: Any, where: Tensor) -> Any:
        """The condition with the images `where`, bool (B,), made unconditional: label dropout, and guidance."""

    def prompt(self, condition: Any) -> Tensor:
        """Input embeddings of the prompt, (B, P, D)."""

    def padding(self, condition: Any) -> Tensor | None:
        """Prompt tokens that are padding, bool (B, P), which no other token sees; None: none are."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings (B, S, D) of tokens (B, S): image codes 0 .. V-1, or ROW_END where the grid has row ends."""

    def hidden(self, embeddings: Tensor, positions: Tensor, mask: Any, cache: Cache | None = None) -> Tensor:
        """What the model's body makes of S slots, (B, S, D).

        Args:
            embeddings: (B, S, D).
            positions: raster positions, int64 (S,) or (B, S); the prompt stands at -P .. -1.
            mask: who sees whom: dense (1 or B, 1, S, keys), bool, or 0 and -infinity in the embeddings' type; or a
                BlockMask.
            cache: receives the keys and values, and returns all that the mask speaks of.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over image codes, (..., V), of hidden states (..., D)."""


class Fits(Protocol):
    """Whether captions fit a model's prompt."""

    @property
    def fingerprint(self) -> str | None:
        """Of all that decides it; None: captions of any length fit."""

    def loaded(self) -> "Fits":
        """This, with what it needs loaded.

        Raises:
            ValueError: if that cannot be.
        """

    def misfit(self, caption: str, features: Any = None) -> str:
        """Why a caption, or its features (n, F), does not fit; empty: it does."""


def build(
    model: Model, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", empty: bool = False
) -> Family:
    """The recipe's generator with random weights drawn from torch's global generator, or with none yet.

    Args:
        empty: allocate the weights and leave them as they are, for weights that come from a file.
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
    """What tells whether captions fit the recipe's model, without its weights; None: it is prompted by classes."""
    if model.t5_features is not None:
        return Width(model.t5_features)
    if model.token_prompt is None:
        return None
    module, name = FAMILIES[model.family]
    with torch.device("meta"):
        words: Prompter = getattr(import_module(module), name)(model).words
    return words


def teacher_forced(family: Family, plan: Plan, codes: Tensor, condition: Any, mask: Any) -> Tensor:
    """What the model predicts for every code of given images when it is decoded along the plan: one parallel pass.

    Args:
        codes: int64 (B, N) in raster order.
        condition: of B images, checked.
        mask: the plan's, dense (bool, or 0 and -infinity) or block, on the model's device.

    Returns:
        Logits (B, N, V) in raster order: row n is the prediction of code n.
    """
    return family.head(target_hidden_states(family, plan, codes, condition, mask))


def target_hidden_states(family: Family, plan: Plan, codes: Tensor, condition: Any, mask: Any) -> Tensor:
    """The hidden states (B, N, D) that `teacher_forced` predicts from: all logits at once may be too many."""
    source, position, slots = _tables(plan, codes.device)
    tokens = torch.where(source >= 0, codes.index_select(1, source.clamp(min=0)), ROW_END)
    embeddings = torch.cat([family.prompt(condition), family.embed(tokens)], dim=1)
    if (padding := family.padding(condition)) is not None:
        mask = mask_padding(mask, padding)
    mask = additive(mask, computed_in(embeddings))
    with attention_kernels(codes.device):
        hidden = family.hidden(embeddings, position, mask)
    return hidden.index_select(1, slots)  # its backward pass adds rows; that of `hidden[:, slots]` sorts indices first


@lru_cache(maxsize=64)
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On the device, once: sources after the prompt, positions of all slots, and the slot that predicts each code."""
    drawing = np.flatnonzero(plan.target >= 0)
    slots = drawing[plan.target[drawing].argsort()]
    source = torch.tensor(plan.source[plan.prompt :], device=device)
    return source, torch.tensor(plan.position, device=device), torch.tensor(slots, device=device)


def conditions(model: Model, images: int) -> Any:
    """B conditions that mean nothing, for measurements: classes in turn, or captions at random."""
    if model.t5_features:
        return [torch.randn(model.t5_features.tokens, model.t5_features.features) for _ in range(images)]
    if model.token_prompt:
        ids = torch.randint(model.token_prompt.vocabulary or 1000, (images, model.token_prompt.tokens))
        return Prompts(ids, torch.zeros_like(ids, dtype=torch.bool))
    return [k % (model.num_classes or 1) for k in range(images)]
