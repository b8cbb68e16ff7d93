"""CLIP score: the similarity of an image and its caption, as LlamaGen and the paper measure it (ViT-B/32)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from zipar_train.models.pretrained import pretrained


class Clip:
    """CLIP model of transformers, for CLIP scores.

    Args:
        source: A hub id or folder, for example `openai/clip-vit-base-patch32`.
        device: Device of the model.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(self, source: str, *, device: torch.device):
        from transformers import CLIPModel, CLIPProcessor

        named = {"key": "evaluate.clip", "what": "no CLIP"}
        self.processor = pretrained(CLIPProcessor, source, **named)
        self.model = pretrained(CLIPModel, source, **named).eval().requires_grad_(False).to(device)
        text = self.model.config.text_config
        if len(self.processor.tokenizer) > text.vocab_size:
            raise ValueError(
                f"evaluate.clip = {source}: its tokenizer has {len(self.processor.tokenizer):,} tokens, its model "
                f"knows {text.vocab_size:,}. They do not belong together: download the folder again"
            )
        self.device, self.longest = device, text.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the cosine similarity of each image and its caption, float32 (B,), on the CPU.

        The CLIP score is their mean (0.287 in the paper).

        Args:
            pixels: uint8 (B, 3, height, width).
            captions: A caption for each image.
        """
        text = self.processor(
            text=list(captions), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        images = self.processor(images=list(pixels), return_tensors="pt")
        found = self.model(**{name: t.to(self.device) for name, t in {**text, **images}.items()})
        return cosine_similarity(found.image_embeds, found.text_embeds).float().cpu()
