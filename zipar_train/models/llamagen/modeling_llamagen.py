"""LlamaGen as a transformers model: Llama with a 2-D rotary embedding and a class or caption prompt.

This file depends on transformers, torch and rope.py only, so that an exported folder can include it and load anywhere.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from .rope import Rope2D


class LlamaGenConfig(LlamaConfig):
    """LlamaConfig plus the grid and the prompt.

    Input ids 0 .. codes - 1 are image codes. With classes, codes .. codes + classes - 1 are classes and the last id is
    the null class of classifier-free guidance. Without classes, the prompt is caption features of dimension `features`.
    The head predicts codes only.
    """

    model_type = "llamagen"

    def __init__(
        self,
        codes: int = 16384,
        classes: int = 1000,
        features: int = 0,
        rows: int = 24,
        columns: int = 24,
        prompt: int = 1,
        **kw: Any,
    ):
        self.codes, self.classes, self.features = codes, classes, features
        self.rows, self.columns, self.prompt = rows, columns, prompt
        kw.setdefault("rms_norm_eps", 1e-5)
        for unused in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kw[unused] = None
        kw["vocab_size"] = codes + (classes + 1 if classes else 0)
        kw["tie_word_embeddings"] = False
        super().__init__(**kw)


class CaptionPrompt(nn.Module):
    """An MLP from caption features (B, P, features) to embeddings (B, P, D), with the unconditional features `null`."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.features, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("null", torch.randn(config.prompt, config.features) / config.features**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(features), approximate="tanh"))


class LlamaGenForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with positions on a grid and a head that predicts codes only."""

    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        head = config.hidden_size // config.num_attention_heads
        self.model.rotary_emb = Rope2D(head, config.columns, config.prompt)
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        if config.features:
            self.caption = CaptionPrompt(config)
        self.post_init()

    def loss_function(self, *, logits: Tensor, labels: Tensor, vocab_size: int | None = None, **kwargs: Any) -> Tensor:
        """Return transformers' causal loss over codes; class tokens in the labels are ignored."""
        labels = labels.masked_fill(labels >= self.config.codes, -100)
        return ForCausalLMLoss(logits=logits, labels=labels, vocab_size=self.config.codes, **kwargs)


AutoConfig.register("llamagen", LlamaGenConfig)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM)
LlamaGenConfig.register_for_auto_class()
LlamaGenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
