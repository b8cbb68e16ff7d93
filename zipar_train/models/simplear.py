"""SimpleAR: a Qwen2 over text and 64,000 codes of the Cosmos tokenizer, in raster order without row ends.

arXiv 2504.11455; wdrink/SimpleAR. Its vocabulary has the 151,665 ids of Qwen2.5's text tokenizer, seven special tokens
and the image codes (simpar/train/train.py): 215,672 ids, as in the published config.json (issue 7). Input embeddings
and output head are one matrix, `tie_word_embeddings` of Qwen2.5-0.5B-Instruct and Qwen2.5-1.5B-Instruct, which SimpleAR
was trained from. Of the head, only the codes' rows are multiplied, because the others are not used to generate images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

from zipar_train.models.conditions import Condition
from zipar_train.models.files import find
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.recipe.model import Model

SIZES = {  # layers, heads, key-value heads, hidden and feed-forward size: config.json of Qwen2.5-0.5B and -1.5B
    "0.5B": (24, 14, 2, 896, 4864),
    "1.5B": (28, 12, 2, 1536, 8960),
}
VOCABULARY = 215672
CONTEXT = 32768  # tokens that Qwen2.5 knows
START, END = "<|t2i|>", "<|soi|>"  # of a prompt: generate.py
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"  # a Llama has none


class SimpleARImagesConfig(Qwen2Config):
    """Qwen2Config plus the codebook size."""

    model_type = "simplear-images"

    def __init__(self, codes: int = 64000, **kw: Any):
        self.codes = codes
        super().__init__(**kw)


class CodesHead(nn.Linear):
    """An output head whose weight is the last rows of the input embeddings; it has no parameters of its own.

    Args:
        embeddings: The input embeddings, (vocabulary, D).
        codes: Number of rows, V.
    """

    def __init__(self, embeddings: nn.Embedding, codes: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = embeddings.embedding_dim, codes
        self.first = embeddings.num_embeddings - codes
        self.shared = [embeddings]  # in a list, so that the matrix has one name and one parameter
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the codes' rows of the embeddings, (V, D)."""
        return self.shared[0].weight[self.first :]

    def forward(self, hidden: Tensor) -> Tensor:
        if isinstance(self.shared[0].weight, DTensor):  # FSDP gathers a module's weights only when the module is called
            codes = torch.arange(self.first, self.first + self.out_features, device=hidden.device)
            return linear(hidden, self.shared[0](codes))
        return linear(hidden, self.weight)


class SimpleARImages(Qwen2ForCausalLM):
    """A text model whose head predicts codes only."""

    config_class = SimpleARImagesConfig

    def __init__(self, config: SimpleARImagesConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model, self.vocab_size = Qwen2Model(config), config.codes
        self.lm_head = CodesHead(self.model.embed_tokens, config.codes)
        self.post_init()


class SimpleAR(TextToImage):
    """The family SimpleAR: text-conditional, H x W codes without row ends."""

    hf_class, hub = Qwen2ForCausalLM, "Daniel0724/SimpleAR-0.5B-RL:"

    def __init__(self, model: Model):
        assert model.token_prompt  # checked by the recipe
        depth, heads, keys, width, feed_forward = model.shape(SIZES)
        self.section, self.grid, self.codebook_size = model, model.raster, model.codebook_size
        self.prompt_length = model.prompt
        vocabulary = model.token_prompt.vocabulary or VOCABULARY
        self.first = vocabulary - model.codebook_size
        self.prompter = self.build_prompter(model)
        self.shape: dict[str, Any] = {
            "vocab_size": vocabulary,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        }
        self.model = SimpleARImages(SimpleARImagesConfig(codes=model.codebook_size, **self.shape))

    def build_prompter(self, model: Model) -> Prompter:
        assert model.token_prompt
        ask = f"{START}{{}}{END}"
        return Prompter(model.token_prompt, ask=ask, keep=(START, END), size=self.first, bos=False)

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        return EMBEDDINGS in state and BIAS in state

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if self.is_hf_checkpoint(state):
            rows, vocabulary = len(state[EMBEDDINGS]), self.shape["vocab_size"]
            if rows != vocabulary:
                raise ValueError(
                    f"is a Qwen2 of {rows:,} ids, and SimpleAR's text and codes are {vocabulary:,}: it generates no "
                    f"images, or other codes. Give {self.hub} or its folder, or fix model.token_prompt.vocabulary"
                )
            if HEAD in state and not torch.equal(state[HEAD], state[EMBEDDINGS]):
                raise ValueError(
                    f"is a Qwen2 whose {HEAD} differs from its {EMBEDDINGS}, and in SimpleAR they are one matrix. "
                    f"Give {self.hub} or its folder"
                )
        return super().renamed(state)

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        return EMBEDDINGS if name == HEAD else name, tensor

    def published(self, source: str | None) -> PreTrainedModel:
        """Return a Qwen2ForCausalLM with these weights, with the configuration of `source` if it is a checkpoint.

        Its configuration has `rope_theta` also where the authors' model code looks for it, and takes 10,000 otherwise
        (simpar/model/language_model/configuration_qwen2.py). transformers 5 writes only `rope_parameters`.
        """
        if source is not None and (find(source) / "config.json").is_file():
            whole: Any = super().published(source)
        else:
            whole = Qwen2ForCausalLM(Qwen2Config(**self.shape, tie_word_embeddings=True))
            whole.to(dtype=self.model.dtype)
            whole.model.load_state_dict(self.model.model.state_dict())
        whole.config.rope_theta = whole.config.rope_parameters["rope_theta"]
        return whole

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Replace captions of the images `where` by the negative prompt, as in the original (generate.py)."""
        assert isinstance(condition, Prompts)
        return self.prompter.negative_prompt(condition, where)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens + self.first)
