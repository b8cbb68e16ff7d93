"""Janus-Pro: a Llama that reads text and generates 24 x 24 codes of LlamaGen's VQ-16 (arXiv 2501.17811).

Image codes have their own embedding, aligner and head, separate from the text model's. Names and layers are those of
transformers' JanusForConditionalGeneration, without the parts that are not used to generate images (the vision tower,
the text head). Checkpoints in the authors' layout are converted to transformers' first, see janus_original.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

from zipar_train.models import janus_original
from zipar_train.models.conditions import Condition
from zipar_train.models.files import read_folder
from zipar_train.models.filling import filled, unaccounted
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.recipe.model import Model

SIZES = {"1B": (24, 16, 2048, 5632), "7B": (30, 32, 4096, 11008)}  # layers, heads, hidden size, feed-forward size
VOCABULARY = 102400
CODE = 8  # dimension of a code's embedding before the aligner
START = "<begin_of_image>"
ASK = "<|User|>: {}\n\n<|Assistant|>:" + START  # deepseek-ai/Janus, README.md, of Janus-Pro
PAD = "<｜▁pad▁｜>"  # deepseek-ai/Janus, processing_vlm.py
IMAGE = "<image_placeholder>"
GUIDANCE = 5.0  # deepseek-ai/Janus, generation_inference.py
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
        # exact: the published class, LlamaTokenizer, loses spaces in transformers 5.17 (huggingface/transformers#45488)
        return Prompter(model.token_prompt, ask=ASK, keep=(START,), pad=PAD, exact=True)

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return super().renamed(janus_original.for_images(state) if janus_original.is_original(state) else state)

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        return any(name.startswith(("model.language_model.", "model.generation_")) for name in state)

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(LEFT_OUT):
            return None
        name = name.replace("model.language_model.", "model.", 1).replace("model.generation_head.", "lm_head.", 1)
        return name.replace("model.generation_", "generation_", 1), tensor

    def load_hf_model(self, folder: Path) -> PreTrainedModel:
        original = read_folder(folder)
        if not janus_original.is_original(original):
            return super().load_hf_model(folder)
        state = janus_original.to_transformers(original)
        tokenizer = self.prompter.tokenizer

        def make() -> PreTrainedModel:
            language = janus_original.read_config(folder)["language_config"]
            image = tokenizer.convert_tokens_to_ids(IMAGE)
            config = janus_original.transformers_config(language, state, image_token=image)
            return self.hf_class(config).to(dtype=self.model.dtype)  # type: ignore[call-arg, return-value]

        whole: Any = filled(make, state, where=folder, what="is no whole checkpoint of Janus. Give the published one")
        places = whole.model.vision_model.embeddings  # its table of positions is in no file
        places.position_ids = torch.arange(places.num_positions)[None]
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        whole.generation_config.update(**ids, do_sample=True, guidance_scale=GUIDANCE)
        whole.generation_config._from_model_config = False  # else transformers would derive it anew, without these
        whole.generation_config.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(START)}
        return whole

    def original(self, source: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return these weights in the authors' layout: all tensors by name, and the content of config.json.

        Args:
            source: The checkpoint, in either layout, that provides the parts that are not used for images. They are
                unchanged if it is in the authors' layout; else the tensors that the authors' code never reads are
                left out.

        Raises:
            ValueError: If `source` is no checkpoint of Janus, or if the authors' code cannot build its parts.
        """
        state = read_folder(self.base_folder(source))
        if not janus_original.is_original(state):
            whole: Any = self.published(source)
            config = janus_original.original_config(whole.config, self.model.dtype)
            state = janus_original.from_transformers(whole.state_dict())
            head = "language_model.lm_head.weight"  # transformers may have tied it to the embedding
            return state | {head: state[head].clone()}, config
        ours = self.model.state_dict()
        if problems := unaccounted(self.renamed(state) or {}, ours):
            raise ValueError(f"model.weights = {source} is not of the exported model's size. {problems}")
        for name, tensor in state.items():
            renamed = janus_original.for_images({name: tensor})
            if renamed and (found := self.map_tensor(*renamed.popitem())):
                state[name] = ours[found[0]]
        return state, janus_original.read_config(self.base_folder(source))

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Replace words by visible padding tokens, as in the original: `tokens[i, 1:-1] = pad_id`."""
        assert isinstance(condition, Prompts)
        return self.prompter.pad_caption(condition, where)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.generation_aligner(self.model.generation_embeddings(tokens))
