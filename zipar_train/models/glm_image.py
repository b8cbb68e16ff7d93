"""GLM-Image's autoregressive stage: a GLM-4 that reads text and generates a small preview and then the image.

Names and layers are those of transformers' GlmImageForConditionalGeneration (zai-org/GLM-Image), without the parts that
only read images (vision tower, VQ-VAE). Codes are the ids 0 .. V-1 of the vocabulary. Of the output head, only the
codes' rows are kept: its other 128 rows are special ids, such as the image's end, which a grid of known size does not
need. A diffusion stage turns codes into pixels, see `tokenizers/glm_image.py`.
"""

from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    GlmImageTextConfig,
    GlmImageTextModel,
)
from transformers.models.glm_image.modeling_glm_image import GlmImagePreTrainedModel

from zipar_train.models.conditions import Condition
from zipar_train.models.text_to_image import TextToImage
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.plan.grid import Grid
from zipar_train.recipe.model import Model

SIZES = {"9B": (40, 32, 2, 4096, 13696)}  # layers, heads, key-value heads, hidden and feed-forward size
VOCABULARY = 168064
SPECIAL = 128  # rows of the published head after those of the codes: vision_vocab_size 16512, 16384 codes
LEFT_OUT = ("model.visual.", "model.vqmodel.")
THEIRS, OURS = "model.language_model.", "model."
HEAD = "lm_head.weight"


class GlmImageCodesConfig(GlmImageTextConfig):
    """GlmImageTextConfig plus the codebook size."""

    model_type = "glm-image-codes"

    def __init__(self, codes: int = 16384, **kw: Any):
        self.codes = codes
        super().__init__(**kw)


class GlmImageCodes(GlmImagePreTrainedModel):
    """The text model with a head that predicts codes."""

    config_class = GlmImageCodesConfig
    _supports_flex_attn = True  # its attention is transformers' AttentionInterface, with any kernel

    def __init__(self, config: GlmImageCodesConfig):
        super().__init__(config)
        self.model = GlmImageTextModel(config)
        self.model.embed_tokens.padding_idx = None
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.post_init()


class GlmImagePrompter(Prompter):
    """A `Prompter` whose prompts are those of GlmImageProcessor.apply_chat_template, as in diffusers' pipeline."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template of the processor, whose file it may lack."""
        tokenizer = super().tokenizer
        with suppress(OSError):  # a folder of a tokenizer alone
            values, _ = GlmImageProcessor.get_processor_dict(tokenizer.name_or_path)
            tokenizer.chat_template = values.get("chat_template") or tokenizer.chat_template
        return tokenizer

    @property
    def fingerprint(self) -> str:
        return sha256(f"{super().fingerprint}{self._framed('{}')}".encode()).hexdigest()[:16]

    def _ids(self, caption: str) -> list[int]:
        text = self._framed(caption)
        special = not text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def _framed(self, caption: str) -> str:
        """Return the caption in the chat template, if there is one, followed by the grids' sizes."""
        if self.tokenizer.chat_template:
            message = {"role": "user", "content": [{"type": "text", "text": caption}]}
            caption = self.tokenizer.apply_chat_template([message], tokenize=False)
        return caption + self.ask.removeprefix("{}")


class GlmImage(TextToImage):
    """The family GLM-Image: text-conditional, a preview and H x W codes, without row ends."""

    hf_class, hub = GlmImageForConditionalGeneration, "zai-org/GLM-Image:vision_language_encoder/"

    def __init__(self, model: Model):
        assert model.token_prompt  # checked by the recipe
        depth, heads, keys, width, feed_forward = model.shape(SIZES)
        self.section, self.grid, self.codebook_size = model, model.raster, model.codebook_size
        self.prompt_length, self.prompter = model.prompt, self.build_prompter(model)
        self.axes = dict[tuple[Grid, torch.device], Tensor]()
        vocabulary = model.token_prompt.vocabulary or VOCABULARY
        self.model = GlmImageCodes(
            GlmImageCodesConfig(
                codes=model.codebook_size,
                vocab_size=vocabulary,
                vision_vocab_size=model.codebook_size + SPECIAL,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=keys,
                hidden_size=width,
                intermediate_size=feed_forward,
                max_position_embeddings=self.prompt_length + max(grid.num_codes for grid in model.rasters),
                rms_norm_eps=1e-5,
                eos_token_id=None,
                pad_token_id=vocabulary - 1,  # needs a number; padding is masked
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": sections(width // heads // 4),  # half of a head is rotated
                },
                tie_word_embeddings=False,
            )
        )

    def build_prompter(self, model: Model) -> Prompter:
        assert model.token_prompt
        sizes = "".join(f"<sop>{each.height} {each.width}<eop>" for each in reversed(model.raster.grids))
        start = f"<|dit_token_{model.codebook_size}|>"  # the id after those of the codes
        return GlmImagePrompter(
            model.token_prompt,
            ask="{}" + sizes + start,
            keep=("<sop>", "<eop>"),
            ids={start: model.codebook_size},
        )

    def position_ids(self, positions: Tensor) -> Tensor:
        """Return time, height and width, int64 (3, 1 or B, S), for raster positions (S,) or (B, S)."""
        key = (self.grid, positions.device)
        if key not in self.axes:
            self.axes[key] = axes(self.grid, prompt=self.prompt_length, device=positions.device)
        return self.axes[key][:, super().position_ids(positions)]

    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        return any(name.startswith(THEIRS) for name in state)

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(LEFT_OUT):
            return None
        if name == HEAD and tensor.ndim and len(tensor) == self.codebook_size + SPECIAL:
            return name, tensor[: self.codebook_size]
        return (OURS + name.removeprefix(THEIRS) if name.startswith(THEIRS) else name), tensor

    def drop(self, condition: Condition, where: Tensor) -> Prompts:
        """Replace captions of the images `where` by the negative prompt; the sizes stay.

        The authors generate without guidance: diffusers' pipeline passes none to this stage.
        """
        assert isinstance(condition, Prompts)
        return self.prompter.negative_prompt(condition, where)


def sections(pairs: int) -> list[int]:
    """Split rotated pairs of a head among time, height and width like the published 8, 12 and 12 of 32."""
    time = pairs // 4
    height = (pairs - time + 1) // 2
    return [time, height, pairs - time - height]


def axes(grid: Grid, *, prompt: int, device: torch.device) -> Tensor:
    """Return time, height and width of each position, int64 (3, P + N), as transformers' `get_rope_index`.

    A text token has its number on all three axes. A code has its grid's start on the first, and its row and column
    from there on the others. The next grid starts beyond the longer side. Rotary embeddings depend on differences
    alone, so padding on the left of a prompt may count.

    Args:
        grid: The grid, with its preview.
        prompt: P.
        device: Of the result.
    """
    found, start = [torch.arange(prompt, device=device).expand(3, -1)], prompt
    for each in grid.grids:
        number = torch.arange(each.height * each.width, device=device)
        cell = [torch.zeros_like(number), number // each.width, number % each.width]
        found.append(start + torch.stack(cell))
        start += max(each.height, each.width)
    return torch.cat(found, dim=1)
