"""Key-value cache over a plan's slots: each pass writes its own slots and reads only those written so far."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, slots, head width), for a `transformers` model."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.slots = keys.shape[2]
        self.fed: Tensor | None = None  # slots of the current pass, which reads slots 0 .. seen - 1
        self.seen = self.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a slot cache is allocated before the first pass")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None and self.fed is not None
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if len(self.fed) == 1:
                kept.index_copy_(2, self.fed[0], new)
            else:
                kept.scatter_(2, self.fed[:, None, :, None].expand_as(new), new)
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots


class SlotCache(Cache):
    """Static cache with one `SlotLayer` per model layer, allocated once per batch size and reused for every image.

    A plan's mask hides the slots that the current image has not written, so keys of earlier images are never visible.

    Memory is allocated here and not in the first pass. A pass that allocates would be compiled separately by
    torch.compile, possibly during CUDA graph capture, where compilation fails.

    Args:
        model: Its config gives the shapes; keys and values have its dtype and device.
        rows: R = B, or 2 B under guidance.
        slots: Number of slots of the plan.
    """

    def __init__(self, model: PreTrainedModel, *, rows: int, slots: int):
        config = model.config.get_text_config()
        heads, width = head_shape(config)

        def zeros() -> Tensor:  # finite: masked keys have an attention weight of zero
            return torch.zeros(rows, heads, slots, width, dtype=model.dtype, device=model.device)

        self.slot_layers = [SlotLayer(zeros(), zeros()) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.slot_layers))

    def begin_pass(self, fed: Tensor, seen: int) -> None:
        """Set the slots that the next pass writes to; it attends to slots 0 .. seen - 1.

        Args:
            fed: int64 (1 or rows, K).
            seen: Number of slots attended to.
        """
        for layer in self.slot_layers:
            layer.fed, layer.seen = fed, seen


def head_shape(config: Any) -> tuple[int, int]:
    """Return the number of key-value heads of a text model, and the width of a head."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads or config.num_attention_heads, width
