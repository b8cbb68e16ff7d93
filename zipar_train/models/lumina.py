"""Lumina-mGPT: Chameleon, a Llama with normalised queries and keys, with a row-end token after every row of codes.

arXiv 2408.02657; Alpha-VLLM/Lumina-mGPT, lumina_mgpt/data/item_processor.py and inference_solver.py. Chameleon in
transformers suppresses image codes in its output; this module uses its body and only the codes' rows of its head.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedModel

from zipar_train.models.conditions import Condition
from zipar_train.models.files import read_folder
from zipar_train.models.filling import filled
from zipar_train.models.pretrained import pretrained
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.models.tokenizers.chameleon import FIRST
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.model import Model

SIZES = {"7B": (32, 32, 4096, 11008)}  # layers, heads, hidden size, feed-forward size: ChameleonConfig
VOCABULARY = 65536
ROW_END_AFTER = 8803 - 8196  # ids from the end of the codes to <reserved08799>
START = "<racm3:break>"
PATCH = 2  # codes per side of the unit in which the prompt gives image sizes
LEFT_OUT = "model.vqmodel."
HEAD = "lm_head.weight"


def side(codes: int) -> str:
    """Return the token that encodes a side of the image, given in codes."""
    return f"<reserved{8800 + codes // PATCH:05d}>"


class LuminaImagesConfig(ChameleonConfig):
    """ChameleonConfig plus the codebook size."""

    model_type = "lumina-images"

    def __init__(self, codes: int = 8192, **kw: Any):
        self.codes = codes
        super().__init__(**kw)


class LuminaImages(ChameleonForConditionalGeneration):
    """A Chameleon without its image tokenizer, whose head predicts codes only.

    The original is trained with dropout 0.05 and a z-loss; this model has neither.
    """

    config_class = LuminaImagesConfig

    def __init__(self, config: LuminaImagesConfig):
        super().__init__(config)
        del self.model.vqmodel
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.post_init()


class Lumina(TextToImage):
    """The family Lumina-mGPT: text-conditional, H x W codes with row ends."""

    hf_class, hub = ChameleonForConditionalGeneration, "Alpha-VLLM/Lumina-mGPT-7B-768:"

    def __init__(self, model: Model):
        depth, heads, width, feed_forward = (
            SIZES[model.size] if model.size else (model.num_layers, model.num_heads, model.hidden_size, model.ffn_size)
        )
        assert model.token_prompt and depth and heads and width  # checked by the recipe
        self.section, self.grid, self.codebook_size = model, model.raster, model.codebook_size
        self.prompt_length, self.heads = model.prompt, heads
        self.row_end = FIRST + model.codebook_size + ROW_END_AFTER
        self.prompter = self.build_prompter(model)
        self.model = LuminaImages(
            LuminaImagesConfig(
                codes=model.codebook_size,
                vocab_size=model.token_prompt.vocabulary or VOCABULARY,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=model.num_kv_heads or heads,
                hidden_size=width,
                intermediate_size=feed_forward or 4 * width,
                max_position_embeddings=self.prompt_length + max(grid.num_tokens for grid in model.rasters),
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                vocabulary_map={"<image>": FIRST - 1},  # images are never an input
                tie_word_embeddings=False,
            )
        )

    def build_prompter(self, model: Model) -> Prompter:
        assert model.token_prompt
        rows, columns = model.grid
        return Prompter(
            model.token_prompt,
            ask=f"Generate an image of {16 * columns}x{16 * rows} according to the following prompt:\n"
            "{}<reserved08706>",
            after=(START, side(rows), side(columns)),
            ids={"<eoss>": FIRST + model.codebook_size, "<reserved08799>": self.row_end},
        )

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        head = state.get(HEAD)  # names are the same; its head also has rows for words
        return head is not None and head.ndim == 2 and len(head) > self.codebook_size

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(LEFT_OUT):
            return None
        if name == HEAD:
            return name, tensor[FIRST : FIRST + self.codebook_size]
        return name, self.of_each_head(name, tensor)

    def of_each_head(self, name: str, tensor: Tensor) -> Tensor:
        """Repeat a q or k norm that heads share in the authors' files for each head, as transformers stores it."""
        if ".q_norm." not in name and ".k_norm." not in name:
            return tensor
        heads = self.heads if ".q_norm." in name else self.model.config.num_key_value_heads
        if not tensor.ndim or not 0 < len(tensor) < heads:
            return tensor
        return tensor.repeat_interleave(heads // len(tensor), dim=0)

    def load_hf_model(self, folder: Path) -> PreTrainedModel:
        """Load the authors' files, with norms that transformers does not load, and possibly no image tokenizer."""
        state = {name: self.of_each_head(name, tensor) for name, tensor in read_folder(folder).items()}
        what = f"no {self.hf_class.__name__}"
        config = pretrained(ChameleonConfig, folder, key="model.weights", what=what)

        def make() -> PreTrainedModel:
            whole: Any = self.hf_class(config).to(dtype=self.model.dtype)  # type: ignore[call-arg]
            if not any(name.startswith(LEFT_OUT) for name in state):
                del whole.model.vqmodel
            return whole

        wrong = f"is not a checkpoint of {self.hf_class.__name__}. Give the published one"
        return filled(make, state, where=folder, what=wrong)

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Reduce prompts to the image start and the image size, as in the original (inference_solver.py).

        The released ZipAR code replaces the words by visible padding instead.
        """
        assert isinstance(condition, Prompts)
        return self.prompter.drop_caption(condition, where)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(torch.where(tokens == ROW_END, self.row_end, tokens + FIRST))
