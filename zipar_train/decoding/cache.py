"""Keys and values of a plan's slots: each pass writes its own and reads no further than the plan has come."""

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, slots, head width), for a `transformers` model."""

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots
        self.fed: Tensor | None = None  # the pass in progress feeds these slots, and reads 0 .. seen - 1
        self.seen = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, head = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.slots, head)
        self.values = value_states.new_zeros(rows, heads, self.slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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
    """

    def __init__(self, layers: int, slots: int):
        self.slot_layers = [SlotLayer(slots) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def aim(self, fed: Tensor, seen: int) -> None:
        """The next pass writes its keys to the slots `fed`, and attends to slots 0 .. seen - 1.

        Args:
            fed: int64 (K,), or (rows, K) where each row has slots of its own.
        """
        for layer in self.slot_layers:
            layer.fed, layer.seen = fed, seen
