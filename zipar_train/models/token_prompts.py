"""Prompts from captions as token ids of a text model, left-padded to a fixed length."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.models.files import find
from zipar_train.models.pretrained import pretrained
from zipar_train.recipe.model import Words


class Prompts(NamedTuple):
    """The condition of B images."""

    ids: Tensor  # int64 (B, P)
    padding: Tensor  # bool (B, P): no other token attends to these


class Prompter:
    """A converter from captions to prompts, with the text tokenizer of a generator, loaded on first use.

    Args:
        text: The recipe's section: `encoder` is the tokenizer's hub id or folder, `tokens` the prompt length.
        ask: The prompt template, with `{}` in place of the caption.
        keep: Tokens that an unconditional prompt keeps, besides the first one.
        after: Tokens that follow the template.
        ids: Tokens whose ids must be as the model requires.
        pad: The token for padding, if the tokenizer knows it; else the tokenizer's own.
        exact: Split text exactly as tokenizer.json says, whatever class tokenizer_config.json names.
        size: Number of ids that the tokenizer must have, because codes follow them; None: any.
        bos: Begin prompts with the tokenizer's first token.
    """

    def __init__(
        self,
        text: Words,
        *,
        ask: str,
        keep: Sequence[str] = (),
        after: Sequence[str] = (),
        ids: Mapping[str, int] | None = None,
        pad: str = "",
        exact: bool = False,
        size: int | None = None,
        bos: bool = True,
    ):
        self.pad, self.exact = pad, exact
        self.text, self.ask, self.keep, self.after, self.ids = text, ask, keep, after, ids or {}
        self.size, self.bos = size, bos

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        source, kind = self.text.encoder, PreTrainedTokenizerFast if self.exact else AutoTokenizer
        key, what = "model.token_prompt.encoder", "no tokenizer of text"
        tokenizer = pretrained(kind, str(find(source)), key=key, what=what)
        unknown = tokenizer.unk_token_id
        if self.pad and tokenizer.convert_tokens_to_ids(self.pad) not in (None, unknown):
            tokenizer.pad_token = self.pad
        for token in (*self.keep, *self.after):
            if tokenizer.convert_tokens_to_ids(token) in (None, unknown):
                raise ValueError(
                    f"model.token_prompt.encoder = {source}: its tokenizer knows no {token!r}: it is of another model"
                )
        for token, wanted in self.ids.items():
            if (found := tokenizer.convert_tokens_to_ids(token)) != wanted:
                raise ValueError(
                    f"model.token_prompt.encoder = {source}: {token!r} has the id {found}, the model counts on "
                    f"{wanted}. It is of another model, or model.token_prompt.vocabulary or "
                    "model.codebook_size is not the checkpoint's"
                )
        if self.size is not None and len(tokenizer) != self.size:
            raise ValueError(
                f"model.token_prompt.encoder = {source}: its tokenizer has {len(tokenizer):,} ids, and the model's "
                f"codes follow {self.size:,}. It is of another model, or model.token_prompt.vocabulary or "
                "model.codebook_size is not the checkpoint's"
            )
        if tokenizer.pad_token_id is None or (self.bos and tokenizer.bos_token_id is None):
            raise ValueError(
                f"model.token_prompt.encoder = {source}: its tokenizer lacks a padding token or a first token"
            )
        return tokenizer

    def loaded(self) -> "Prompter":
        """Load the tokenizer, and return this object.

        Raises:
            ValueError: If it cannot be loaded, or belongs to another model.
        """
        _ = self.tokenizer
        return self

    def check(self, condition: Any, device: torch.device) -> Prompts:
        """Convert captions to prompts, or move earlier results of this method, to the device.

        Raises:
            ValueError: If a caption is empty, or has more tokens than the prompt.
        """
        if isinstance(condition, Prompts):
            return Prompts(*(part.to(device) for part in condition))
        if not isinstance(condition, Sequence) or isinstance(condition, str) or not len(condition):
            raise ValueError(f"captions must be a list of texts, not {condition!r}")
        for caption in condition:
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"caption {caption!r} is empty, or not text: describe the image")
        return self.framed([self._whole(caption) for caption in condition], device)

    def framed(self, captions: Sequence[str], device: torch.device) -> Prompts:
        """Return captions in the prompt template, left-padded.

        Raises:
            ValueError: If a caption has more tokens than the prompt.
        """
        length = self.text.tokens
        ids = torch.full((len(captions), length), self.tokenizer.pad_token_id)
        padding = torch.ones(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            found = self._ids(caption)
            if len(found) > length:
                raise ValueError(self._too_long(caption, len(found)))
            ids[row, length - len(found) :] = torch.tensor(found)
            padding[row, length - len(found) :] = False
        return Prompts(ids.to(device), padding.to(device))

    def misfit(self, caption: str, features: Any = None) -> str:
        """Return why a caption does not fit into the prompt; empty if it does."""
        whole = self._whole(caption)
        tokens = len(self._ids(whole))
        return self._too_long(whole, tokens) if tokens > self.text.tokens else ""

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides which captions fit, 16 hexadecimal digits."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        around = [self.text.prompt_prefix, self.text.prompt_suffix]
        parts = [self.ask, self.after, *around, self.text.tokens, vocabulary]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _whole(self, caption: str) -> str:
        """Return a caption with what the recipe puts before and after it."""
        return self.text.prompt_prefix + caption.strip() + self.text.prompt_suffix

    def _ids(self, caption: str) -> list[int]:
        before, after = self.ask.split("{}")
        found = self.tokenizer(f"{before}{caption}{after}", add_special_tokens=False).input_ids
        first = [self.tokenizer.bos_token_id] if self.bos else []
        return [*first, *found, *map(self.tokenizer.convert_tokens_to_ids, self.after)]

    def _too_long(self, caption: str, tokens: int) -> str:
        return (
            f"caption {caption[:60]!r}... takes {tokens} tokens with what surrounds it, the prompt has "
            f"{self.text.tokens}: shorten it, or set model.token_prompt.tokens higher"
        )

    def pad_caption(self, prompts: Prompts, where: Tensor) -> Prompts:
        """Replace the words of the images `where`, bool (B,), by padding tokens that stay visible to attention."""
        kept = {self.tokenizer.bos_token_id, *map(self.tokenizer.convert_tokens_to_ids, self.keep)}
        stays = torch.isin(prompts.ids, torch.tensor(sorted(kept), device=prompts.ids.device))
        ids = prompts.ids.masked_fill(where[:, None] & ~stays, self.tokenizer.pad_token_id)
        return Prompts(ids, prompts.padding)

    def drop_caption(self, prompts: Prompts, where: Tensor) -> Prompts:
        """Hide all prompt tokens of the images `where`, bool (B,), except those that follow the template."""
        words = torch.arange(prompts.ids.shape[1], device=prompts.ids.device) < prompts.ids.shape[1] - len(self.after)
        return Prompts(prompts.ids, prompts.padding | (where[:, None] & words))

    def negative_prompt(self, prompts: Prompts, where: Tensor) -> Prompts:
        """Replace the captions of the images `where`, bool (B,), by the negative prompt."""
        null = self.framed([self.text.negative_prompt], prompts.ids.device)
        at = where[:, None]
        return Prompts(torch.where(at, null.ids, prompts.ids), torch.where(at, null.padding, prompts.padding))
