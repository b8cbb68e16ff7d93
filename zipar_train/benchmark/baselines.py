"""The released ZipAR decoders, reimplemented on the package's models as a baseline for its decoder."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.sampling import guide, sample
from zipar_train.decoding.state import prompts
from zipar_train.models.family import Family
from zipar_train.plan.masks import mask_padding
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import SamplingParams


class InsertedLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, tokens, head width), in raster order and without gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []  # places of the current pass's tokens, ascending

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if not keys.shape[2]:  # the prompt, as one
            keys, values = key_states, value_states
        else:
            for token, place in enumerate(self.places):
                keys = torch.cat([keys[:, :, :place], key_states[:, :, token, None], keys[:, :, place:]], dim=2)
                values = torch.cat([values[:, :, :place], value_states[:, :, token, None], values[:, :, place:]], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class InsertedCache(Cache):
    """Cache that inserts each new token by concatenation, as in the released decoder for Lumina-mGPT."""

    def __init__(self, layers: int):
        self.inserted = [InsertedLayer() for _ in range(layers)]
        super().__init__(layers=list(self.inserted))

    def begin_pass(self, places: list[int]) -> None:
        for layer in self.inserted:
            layer.places = places


@torch.inference_mode()
def eager_loop(family: Family, condition: Any, seeds: Tensor, sampling: SamplingParams, *, window: int) -> Tensor:
    """Generate B images as the released ZipAR decoders do, see `EagerLoop`.

    Args:
        family: The generator.
        condition: Conditions of B images.
        seeds: (B, N), see `sampling.code_seeds`.
        sampling: How codes are sampled.
        window: The window, in codes.

    Returns:
        Codes, int64 (B, N): those of `Decoder(..., released=True)` on a plan with `stand_in="released"`.
    """
    grid = family.grid
    plan = Plan.zipar(grid, window=window, stand_in="released", prompt=family.prompt_length)
    loop = EagerLoop(family, plan, condition, seeds, sampling)
    for step in range(plan.passes):
        loop.run_pass([i for i in range(len(plan)) if plan.step[i] == step])
    return torch.cat([loop.generated[target] for target in range(grid.num_codes)], dim=1)


class EagerLoop:
    """The passes of the released ZipAR decoders (ThisisBillhe/ZipAR 2a5695c), with the package's family.

    Each pass is a Python loop with lists and concatenation, unfused attention, the head applied to every input, and one
    sampling call per row. The two released decoders differ in their cache:

    * Without row ends (LlamaGen, generate_zipar.py), the cache is in raster order and attended to as a whole, including
      unwritten slots.
    * With row ends (Lumina-mGPT, modeling_chameleon.py, lines 572 to 585), the cache is in raster order without gaps,
      and new tokens are inserted by concatenation. Emu3's decoder is not released; it has the same schedule.

    Prompts and their padding are those of the family. The released decoder for Lumina-mGPT does not mask padding.

    Args:
        family: The generator.
        plan: A plan on the family's grid.
        condition: Conditions of B images.
        seeds: (B, N), see `sampling.code_seeds`.
        sampling: How codes are sampled.

    Attributes:
        generated: The codes so far by their raster index, each int64 (B, 1).
        memory: The cache.
    """

    def __init__(self, family: Family, plan: Plan, condition: Any, seeds: Tensor, sampling: SamplingParams):
        self.family, self.plan, self.sampling = family, plan, sampling
        self.prompt, self.padding = prompts(family, family.check(condition), guided=sampling.guidance != 1)
        self.seeds = seeds.to(family.model.device)
        self.row_end = torch.full((len(seeds), 1), ROW_END, device=family.model.device)
        self.memory = (_Inserted if family.grid.row_end else _Whole)(family, plan, rows=len(self.prompt))
        self.generated: dict[int, Tensor] = {}

    def run_pass(self, inputs: Sequence[int]) -> None:
        """Run a pass that feeds these slots of the plan; the first pass also feeds the prompt."""
        family, plan, sampling, generated = self.family, self.plan, self.sampling, self.generated
        positions = [int(plan.position[i]) for i in inputs]
        fed = [int(plan.source[i]) for i in inputs if plan.position[i] >= 0]
        parts = [self.prompt] if positions[0] < 0 else []
        if fed:
            tokens = torch.cat([self.row_end if source == ROW_END else generated[source] for source in fed], dim=1)
            parts.append(family.embed(tokens).repeat(len(self.prompt) // len(self.seeds), 1, 1))
        mask, places = self.memory.begin_pass(positions)
        if self.padding is not None:
            mask = mask_padding(mask, self.padding, slots=places[None])
        with sdpa_kernel(SDPBackend.MATH):
            position = torch.tensor(positions, device=family.model.device)
            logits = family.head(family.hidden(torch.cat(parts, dim=1), position, mask, self.memory.cache))
        if sampling.guidance != 1:
            logits = guide(logits, sampling.guidance)
        for column, i in enumerate(inputs):
            target = int(plan.target[i])
            if target >= 0:
                codes = sample(
                    logits[:, column],
                    self.seeds[:, target],
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                )
                generated[target] = codes[:, None]


class _Whole:
    """LlamaGen's cache: a slot for each raster position, with attention to all earlier ones, written or not."""

    def __init__(self, family: Family, plan: Plan, *, rows: int):
        self.prompt, self.slots, self.device = plan.prompt, plan.prompt + plan.grid.num_codes, family.model.device
        self.cache = SlotCache(family.model, rows=rows, slots=self.slots)
        self.causal = torch.tril(torch.ones(self.slots, self.slots, dtype=torch.bool, device=self.device))

    def begin_pass(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Start a pass; return its mask (1, 1, K, keys), and the places (K,) of its queries among the keys."""
        places = torch.tensor(positions, device=self.device) + self.prompt
        self.cache.begin_pass(places[None], self.slots)
        return self.causal[None, None, places], places

    def forget(self, first: int) -> None:
        """Do nothing: a pass attends to all places, and writes to its own again."""


class _Inserted:
    """Lumina-mGPT's cache: the tokens fed so far, in raster order; each query attends to those up to its own."""

    def __init__(self, family: Family, plan: Plan, *, rows: int):
        self.device = family.model.device
        self.cache = InsertedCache(family.model.config.get_text_config().num_hidden_layers)
        self.held: list[int] = []  # positions, ascending

    def begin_pass(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        for position in positions:
            insort(self.held, position)
        found = [bisect_left(self.held, position) for position in positions]
        self.cache.begin_pass(found)
        places = torch.tensor(found, device=self.device)
        return (torch.arange(len(self.held), device=self.device) <= places[:, None])[None, None], places

    def forget(self, first: int) -> None:
        """Remove the tokens from place `first` on, so that a pass inserts them again."""
        del self.held[first:]
        for layer in self.cache.inserted:
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, :first], layer.values[:, :, :first]
