"""A forward pass of few rows in Triton kernels: five per layer and a few around them, driven by tables on the device.

`Decoder` uses it instead of its own pass, which works for any number of rows. Both read and write the same state.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from zipar_train.decoding.fused_llama import FusedLlama, norm
from zipar_train.decoding.kernels import ends, layer
from zipar_train.decoding.state import DecodeState
from zipar_train.models.family import Family
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.schema import SamplingParams

ROWS = (16, 32)  # most rows of a pass; a matrix product has a tile of so many. Above, cuBLAS is faster
BLOCKS = 128  # of attention: about one per multiprocessor
KEYS = 64  # that a block of attention reads at once


@dataclass(frozen=True)
class Buffers:
    """Intermediate results of a pass, at fixed addresses."""

    hidden: Tensor  # (M, D)
    query: Tensor  # (M, H HEAD)
    attended: Tensor  # (M, H HEAD)
    inner: Tensor  # (M, F)
    given: Tensor  # int64 (B, K), tokens fed
    partial: Tensor  # float32, shares of attention
    arrived: Tensor  # int32 (rows HK), blocks of attention that arrived
    scratch: Tensor  # int32 (B, K, 2, V rounded up), logits


class FusedPass:
    """The pass of a family along a plan.

    Args:
        decoder: The decoder of a family that `fits`; the pass uses its tables.

    Raises:
        ValueError: If the kernels do not support the family's layers.
    """

    def __init__(self, decoder: Any):
        family, plan = decoder.family, decoder.plan
        if not fits(family):
            raise ValueError("the Triton kernels do not support this model's layers or sizes: use plain passes")
        body: Any = family.model.base_model
        self.family, self.plan, self.tables, self.body = family, plan, decoder, body
        self.device = family.model.device
        self.interpreted = self.device.type == "cpu"
        self.launch: dict[str, Any] = {"INTERPRETED": self.interpreted, "PDL": has_dependent_launch(self.device)}
        first: Any = body.layers[0]
        self.heads, self.groups, self.head = first.heads, first.groups, first.head
        position = torch.as_tensor(plan.position + plan.prompt, device=self.device)[None]
        cos, sin = body.rotary_emb(torch.empty(1, device=self.device), position_ids=position)
        self.cos, self.sin = (t[0, :, : self.head // 2].float().contiguous() for t in (cos, sin))
        codes = torch.arange(family.codebook_size, device=self.device)[None]
        with torch.no_grad():
            inputs = [family.embed(codes)]
            if plan.grid.row_end:
                inputs.append(family.embed(torch.full_like(codes[:, :1], ROW_END)))
            self.embeddings = torch.cat(inputs, dim=1)[0].to(family.model.dtype).contiguous()
        starts = torch.zeros(len(plan) + 1, dtype=torch.long)
        step = torch.as_tensor(plan.step.copy())
        first_slots = torch.searchsorted(step, torch.arange(plan.passes))
        starts[first_slots] = step.bincount()
        self.of_step = starts.to(self.device)  # number of slots of the step that begins at a slot
        self.buffers: dict[tuple[int, int], Buffers] = {}
        self.counts: dict[int, Tensor] = {}

    def room(self, state: DecodeState, shape: Any, sampling: SamplingParams) -> int | None:
        """Return for how many slots a pass of this shape has room, and prepare it; None if it must be plain.

        Without lookahead it is one of two numbers, so that two CUDA graphs serve all steps of an image.
        """
        rows, fed = len(state.prompt), shape.slots
        if shape.prompt or fed * rows > ROWS[-1] // rows * rows:
            return None
        slots = fed if sampling.lookahead else next(most // rows for most in ROWS if fed <= most // rows)
        self.prepare(state, slots)
        return slots

    def prepare(self, state: DecodeState, slots: int) -> None:
        """Allocate what passes of so many slots need, before they are captured."""
        rows, body = len(state.prompt), self.body
        if (rows, slots) in self.buffers:
            return
        keys, first = self.heads // self.groups, body.layers[0]
        like: dict[str, Any] = {"dtype": self.family.model.dtype, "device": self.device}
        queries = block(slots * self.groups, least=16)
        self.buffers[rows, slots] = Buffers(
            hidden=torch.zeros(rows * slots, self.embeddings.shape[1], **like),
            query=torch.zeros(rows * slots, self.heads * self.head, **like),
            attended=torch.zeros(rows * slots, self.heads * self.head, **like),
            inner=torch.zeros(rows * slots, first.down.weight.shape[1], **like),
            given=torch.zeros(len(state.tokens), slots, dtype=torch.long, device=self.device),
            partial=torch.zeros(rows * keys * self.splits(rows) * queries * (self.head + 2), device=self.device),
            arrived=torch.zeros(rows * keys, dtype=torch.int32, device=self.device),
            scratch=torch.zeros(
                len(state.tokens) * slots * 2 * block(self.family.codebook_size), dtype=torch.int32, device=self.device
            ),
        )
        self.counts[slots] = torch.full_like(self.of_step, slots)

    def splits(self, rows: int) -> int:
        """Return into how many parts attention splits the keys of a row and head."""
        return min(max(BLOCKS // (rows * self.heads // self.groups), 1), 8)

    def __call__(self, state: DecodeState, slots: int, sampling: SamplingParams, *, keep: bool) -> tuple[Tensor, ...]:
        """Run the pass at the state's slots; arguments and results as in `Decoder._pass`.

        Args:
            slots: K, for which `prepare` was called.
        """
        tables, end = self.tables, len(self.plan)
        images, rows, columns = len(state.tokens), len(state.prompt), state.tokens.shape[1]
        count = self.counts[slots] if sampling.lookahead else self.of_step
        made, pdl = self.buffers[rows, slots], self.launch["PDL"]
        how: dict[str, Any] = {"PDL": pdl, "launch_pdl": pdl}
        which = (state.slot, count)
        predicts = self.predicted(state, count, slots) if keep else None
        d = self.embeddings.shape[1]
        ends.feed[(rows * slots,)](
            state.tokens, tables.source, self.embeddings, *which, made.hidden, made.given, images, slots, columns, end,
            len(self.embeddings) - 1, D=d, BD=block(d), **how,
        )  # fmt: skip
        for kernels, kept in zip(self.body.layers, state.cache.slot_layers, strict=True):
            self.layer(kernels, kept.keys, kept.values, state, which, made, slots)
        logits = self.family.head(norm(made.hidden, self.body.norm)).contiguous()
        v = logits.shape[-1]
        ends.choose[(images * slots, 2 if sampling.lookahead else 1)](
            logits, made.scratch, state.seeds, state.tokens, tables.target, tables.above, *which, images, slots,
            columns, end, self.plan.grid.num_codes + 1, sampling.guidance, sampling.temperature or 1.0,
            min(sampling.top_k or v, v), sampling.top_p,
            V=v, BV=block(v), BC=min(block(v), 2048), GUIDED=rows > images, GREEDY=sampling.temperature == 0,
            FILTERED=sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1),
            num_warps=16 if v <= 2**14 else 32, **how,
        )  # fmt: skip
        ends.advance[(images,)](
            state.tokens, tables.source, made.given, *which, state.passes, images, slots, columns, end,
            BK=block(slots), LOOKAHEAD=bool(sampling.lookahead), num_warps=1, **how,
        )  # fmt: skip
        if predicts is None:
            return ()
        slot, target = predicts
        if sampling.lookahead:
            target = target.masked_fill(slot >= state.slot[:, None], self.plan.grid.num_codes + 1)
        return target, logits.view(rows, slots, v)

    def predicted(self, state: DecodeState, count: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Return the slots (B, K) that the next pass feeds, and the targets (B, K) that they predict."""
        ahead = torch.arange(slots, device=self.device)
        slot = state.slot[:, None] + ahead
        target = self.tables.target[slot.clamp(max=len(self.plan))]
        unfed = (ahead >= count[state.slot][:, None]) | (slot >= len(self.plan))
        return slot, target.masked_fill(unfed, self.plan.grid.num_codes + 1)

    def layer(
        self,
        own: Any,
        keys: Any,
        values: Any,
        state: DecodeState,
        which: tuple[Tensor, Tensor],
        made: Buffers,
        slots: int,
    ) -> None:
        """Apply a layer to the hidden states, in five kernels."""
        images, rows, end = len(state.tokens), len(state.prompt), len(self.plan)
        m, h, hk, head = rows * slots, self.heads, self.heads // self.groups, self.head
        d, f = made.hidden.shape[1], made.inner.shape[1]
        how = self.launch | {"launch_pdl": self.launch["PDL"], "num_warps": 4, "num_stages": 4}
        tile = next(most for most in ROWS if m <= most)
        pairs = head // 2 if own.norms else 16
        norm_w, norm_b = own.norms or (None, None)
        layer.qkv[((h + 2 * hk) * (head // 2 // pairs),)](
            made.hidden, own.before.weight, own.qkv.weight, getattr(own.qkv, "scale", None), norm_w, norm_b,
            self.cos, self.sin, *which, made.query, keys, values, images, slots, m, end, keys.shape[2],
            own.before.variance_epsilon, D=d, H=h, HK=hk, HEAD=head, BM=tile, BH=pairs, BK=depth(d), **how,
        )  # fmt: skip
        padding = state.padding
        splits, queries = self.splits(rows), block(slots * self.groups, least=16)
        layer.attend[(rows * hk, splits)](
            made.query, keys, values, self.tables.visible.view(torch.uint8),
            None if padding is None else padding.view(torch.uint8), *which, made.attended, made.partial, made.arrived,
            images, slots, end, keys.shape[2], self.tables.visible.shape[1],
            0 if padding is None else padding.shape[1], own.scale,
            H=h, HK=hk, HEAD=head, SPLITS=splits, BQ=queries, BS=KEYS,
            **how | {"num_stages": 3, "num_warps": 4 if queries < 64 else 8},
        )  # fmt: skip
        layer.add_product[(d // 16,)](
            made.attended, own.out.weight, getattr(own.out, "scale", None), made.hidden, m,
            N=d, D=h * head, BM=tile, BN=16, BK=depth(h * head), **how,
        )  # fmt: skip
        layer.gate_up[(f // 16,)](
            made.hidden, own.between.weight, own.gate_up.weight, getattr(own.gate_up, "scale", None), made.inner, m,
            own.between.variance_epsilon, F=f, D=d, BM=tile, BN=16, BK=depth(d), **how,
        )  # fmt: skip
        layer.add_product[(d // 16,)](
            made.inner, own.down.weight, getattr(own.down, "scale", None), made.hidden, m,
            N=d, D=f, BM=tile, BN=16, BK=depth(f), **how,
        )  # fmt: skip


def fits(family: Family) -> bool:
    """Return True if the kernels support the model: a body after `fuse_for_inference`, of common sizes."""
    body: Any = family.model.base_model
    if not isinstance(body, FusedLlama):
        return False
    own: Any = body.layers[0]
    sizes = (own.before.weight.shape[0], own.down.weight.shape[1], own.heads * own.head)
    return own.head in (32, 64, 128) and all(size % 16 == 0 for size in sizes)


def has_dependent_launch(device: torch.device) -> bool:
    """Return True if the GPU supports programmatic dependent launch: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def block(size: int, *, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size`."""
    return max(least, 1 << (size - 1).bit_length())


def depth(size: int) -> int:
    """Return how much of a product's inner dimension a block reads at once: a power of two that divides it."""
    return gcd(size, 128)
