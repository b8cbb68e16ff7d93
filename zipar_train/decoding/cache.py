"""Keys and values of a plan's slots: each pass writes its own and reads no further than the plan has come."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, slots, head width), for a `transformers` model."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.slots = keys.shape[2]
        self.fed: Tensor | None = None  # the pass in progress feeds these slots, and reads 0 .. seen - 1
        self.seen = self.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a slot cache is allocated before the first pass")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None and self.fed is not None
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if self.fed.ndim == 1:
                kept.index_copy_(2, self.fed, new)
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
    """A SlotLayer for each of the model's layers, allocated once and used for every image of a batch size.

    A plan's mask never shows slots that this image has not written, so what an earlier image left there is unseen.

    Memory is allocated here and not in the first pass: a pass that allocates is different work from those after it.
    torch.compile would compile it once more, possibly while a CUDA graph is captured, where it fails.

    Args:
        model: its config gives the shape; its dtype and device are those of the keys and values.
        rows: R, B or 2 B under guidance.
        slots: of the plan.
    """

    def __init__(self, model: PreTrainedModel, *, rows: int, slots: int):
        config = model.config.get_text_config()
        heads, width = head_shape(config)

        def zeros() -> Tensor:  # finite: unseen keys are multiplied by a weight of zero
            return torch.zeros(rows, heads, slots, width, dtype=model.dtype, device=model.device)

        self.slot_layers = [SlotLayer(zeros(), zeros()) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.slot_layers))

    def begin_pass(self, fed: Tensor, seen: int) -> None:
        """The next pass writes its keys to the slots `fed`, and attends to slots 0 .. seen - 1.

        Args:
            fed: int64 (K,), or (rows, K) where each row has slots of its own.
        """
        for layer in self.slot_layers:
            layer.fed, layer.seen = fed, seen


def head_shape(config: Any) -> tuple[int, int]:
    """The number of key heads of a text model, and the width of a head."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads or config.num_attention_heads, width
