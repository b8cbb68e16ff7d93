"""LlamaGen as a transformers model: Llama with a 2-D rotary embedding and classes beside the codes.

Stands alone (transformers, torch and rope.py), so that an exported folder can carry it and load anywhere.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from .rope import Rope2D


class LlamaGenConfig(LlamaConfig):
    """LlamaConfig plus the grid.

    Input ids 0 .. codes - 1 are image codes; codes .. codes + classes - 1 are classes; the last id is the null class
    of classifier-free guidance. The head predicts codes alone.
    """

    model_type = "llamagen"

    def __init__(
        self, codes: int = 16384, classes: int = 1000, rows: int = 24, columns: int = 24, prompt: int = 1, **kw
    ):
        self.codes, self.classes, self.rows, self.columns, self.prompt = codes, classes, rows, columns, prompt
        kw.setdefault("rms_norm_eps", 1e-5)
        for unused in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kw[unused] = None
        kw["vocab_size"] = codes + classes + 1
        kw["tie_word_embeddings"] = False
        super().__init__(**kw)


class LlamaGenForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM whose positions lie on a grid and whose head knows no classes."""

    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        head = config.hidden_size // config.num_attention_heads
        self.model.rotary_emb = Rope2D(head, config.columns, config.prompt)
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.post_init()

    def loss_function(self, *, logits, labels, vocab_size=None, **kwargs):
        """transformers' causal loss over codes; class tokens among the labels are no targets."""
        labels = labels.masked_fill(labels >= self.config.codes, -100)
        return ForCausalLMLoss(logits=logits, labels=labels, vocab_size=self.config.codes, **kwargs)


AutoConfig.register("llamagen", LlamaGenConfig)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM)
LlamaGenConfig.register_for_auto_class()
LlamaGenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
