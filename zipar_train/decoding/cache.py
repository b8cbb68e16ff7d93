"""Keys and values of a plan's slots, written where the pass says and read whole."""

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, slots, head width), for a `transformers` model."""

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots
        self.write: Tensor | None = None  # slot numbers of the pass in progress, (K,)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, head = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.slots, head)
        self.values = value_states.new_zeros(rows, heads, self.slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.write is not None
        self.keys.index_copy_(2, self.write, key_states)
        self.values.index_copy_(2, self.write, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots


class SlotCache(Cache):
    """A SlotLayer for each of the model's layers.

    Never-written slots hold zeros. A plan's mask never shows them, nor the sink that padding writes to.
    """

    def __init__(self, layers: int, slots: int):
        self.slot_layers = [SlotLayer(slots) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def aim(self, slots: Tensor) -> None:
        """The next pass writes its K keys to these slots, int64 (K,)."""
        for layer in self.slot_layers:
            layer.write = slots
