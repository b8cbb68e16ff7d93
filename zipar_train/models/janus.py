"""Janus-Pro: a Llama that reads text and generates 24 x 24 codes of LlamaGen's VQ-16 (arXiv 2501.17811).

Image codes have their own embedding, aligner and head, separate from the text model's. Names and layers are those of
transformers' JanusForConditionalGeneration, without the parts that are not used to generate images (the vision tower,
the text head).
"""

from typing import Any

from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

from zipar_train.models.conditions import Condition
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.recipe.model import Model

SIZES = {"1B": (24, 16, 2048, 5632), "7B": (30, 32, 4096, 11008)}  # layers, heads, hidden size, feed-forward size
VOCABULARY = 102400
CODE = 8  # dimension of a code's embedding before the aligner
START = "<begin_of_image>"
ASK = "<|User|>: {}\n\n<|Assistant|>:" + START  # deepseek-ai/Janus, generation_inference.py
LEFT_OUT = ("model.vision_model.", "model.aligner.", "model.vqmodel.", "lm_head.")


class JanusImagesConfig(LlamaConfig):
    """LlamaConfig of the text model plus the codebook size."""

    model_type = "janus-images"

    def __init__(self, codes: int = 16384, **kw: Any):
        self.codes = codes
        super().__init__(**kw)


class JanusImages(LlamaForCausalLM):
    """A text model whose head predicts codes."""

    config_class = JanusImagesConfig

    def __init__(self, config: JanusImagesConfig):
        super().__init__(config)
        width = config.hidden_size
        parts = JanusVQVAEConfig(
            embed_dim=CODE, num_embeddings=config.codes, projection_dim=width, image_token_embed_dim=width
        )
        self.generation_embeddings = nn.Embedding(config.codes, CODE)
        self.generation_aligner = JanusVQVAEAlignerMLP(parts)
        self.lm_head = JanusVQVAEHead(parts)
        self.post_init()


class Janus(TextToImage):
    """The family Janus-Pro: text-conditional, H x W codes without row ends."""

    hf_class, hub = JanusForConditionalGeneration, "deepseek-community/Janus-Pro-1B:"

    def __init__(self, model: Model):
        depth, heads, width, feed_forward = (
            SIZES[model.size] if model.size else (model.num_layers, model.num_heads, model.hidden_size, model.ffn_size)
        )
        assert model.token_prompt and depth and heads and width  # checked by the recipe
        self.section, self.grid, self.codebook_size = model, model.raster, model.codebook_size
        self.prompt_length, self.prompter = model.prompt, self.build_prompter(model)
        self.model = JanusImages(
            JanusImagesConfig(
                codes=model.codebook_size,
                vocab_size=model.token_prompt.vocabulary or VOCABULARY,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                hidden_size=width,
                intermediate_size=feed_forward or 4 * width,
                max_position_embeddings=self.prompt_length + self.grid.num_codes,
                rms_norm_eps=1e-6,
                tie_word_embeddings=False,
            )
        )

    def build_prompter(self, model: Model) -> Prompter:
        assert model.token_prompt
        return Prompter(model.token_prompt, ask=ASK, keep=(START,))

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        return any(name.startswith(("model.language_model.", "model.generation_")) for name in state)

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(LEFT_OUT):
            return None
        name = name.replace("model.language_model.", "model.", 1).replace("model.generation_head.", "lm_head.", 1)
        return name.replace("model.generation_", "generation_", 1), tensor

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Replace words by visible padding tokens, as in the original: `tokens[i, 1:-1] = pad_id`."""
        assert isinstance(condition, Prompts)
        return self.prompter.pad_caption(condition, where)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.generation_aligner(self.model.generation_embeddings(tokens))
