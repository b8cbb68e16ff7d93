"""Emu3-Gen: a Llama with grouped-query attention over text and 32,768 image codes, with a row-end token per row.

arXiv 2409.18869; baaivision/Emu3, emu3/mllm. Its vocabulary ends with the image codes; the row end is eight ids before
them. Of the output head, only the codes' rows are kept, because the others are not used to generate images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Emu3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from zipar_train.models.conditions import Condition
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.model import Model

SIZES = {"8B": (32, 32, 8, 4096, 14336)}  # layers, heads, key-value heads, hidden and feed-forward size: Emu3TextConfig
VOCABULARY = 184622
BEFORE = 8  # distance from the row end <|extra_200|>, id 151846, to the first code, id 151854
LEFT_OUT = ("model.vqmodel.", "vqmodel.")
NAMES = (("text_model.model.", "model."), ("text_model.lm_head.", "lm_head."), ("model.text_model.", "model."))
HEAD = "lm_head.weight"


class Emu3ImagesConfig(LlamaConfig):
    """LlamaConfig of the text model plus the codebook size."""

    model_type = "emu3-images"

    def __init__(self, codes: int = 32768, **kw: Any):
        self.codes = codes
        super().__init__(**kw)


class Emu3Images(LlamaForCausalLM):
    """A text model whose head predicts codes only, without the original's dropout of 0.1 on residuals in training."""

    config_class = Emu3ImagesConfig

    def __init__(self, config: Emu3ImagesConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.post_init()


class Emu3(TextToImage):
    """The family Emu3-Gen: text-conditional, H x W codes with row ends."""

    hf_class, hub = Emu3ForConditionalGeneration, "BAAI/Emu3-Gen-hf:"

    def __init__(self, model: Model):
        assert model.token_prompt  # checked by the recipe
        depth, heads, keys, width, feed_forward = model.shape(SIZES)
        self.section, self.grid, self.codebook_size = model, model.raster, model.codebook_size
        self.prompt_length = model.prompt
        vocabulary = model.token_prompt.vocabulary or VOCABULARY
        self.first, self.row_end = vocabulary - model.codebook_size, vocabulary - model.codebook_size - BEFORE
        self.prompter = self.build_prompter(model)
        self.model = Emu3Images(
            Emu3ImagesConfig(
                codes=model.codebook_size,
                vocab_size=vocabulary,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=keys,
                hidden_size=width,
                intermediate_size=feed_forward,
                max_position_embeddings=self.prompt_length + max(grid.num_tokens for grid in model.rasters),
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                tie_word_embeddings=False,
            )
        )

    def build_prompter(self, model: Model) -> Prompter:
        assert model.token_prompt
        rows, columns = model.grid
        return Prompter(
            model.token_prompt,
            ask=f"{{}}<|image start|>{rows}*{columns}<|image token|>",
            keep=("<|image start|>",),
            ids={"<|visual token 000000|>": self.first, "<|extra_200|>": self.row_end},
        )

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        return any(name.startswith(("text_model.", "model.text_model.")) for name in state)

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(LEFT_OUT):
            return None
        for theirs, ours in NAMES:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        return name, tensor[self.first :] if name == HEAD and tensor.ndim else tensor

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Replace captions of the images `where` by the negative prompt, as in the original (image_generation.py)."""
        assert isinstance(condition, Prompts)
        return self.prompter.negative_prompt(condition, where)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(torch.where(tokens == ROW_END, self.row_end, tokens + self.first))
