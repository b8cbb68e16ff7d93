"""Decoder whose passes of few rows are Triton kernels: five per layer and a few around them, driven by device tables.

Passes of more rows, and of the prompt, are those of `Decoder`. Both kinds read and write the same state.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from zipar_train.decoding.decoder import Decoder, Shape
from zipar_train.decoding.fused_llama import FusedLlama, norm
from zipar_train.decoding.kernels import ends, layer
from zipar_train.decoding.kernels.tiles import ONCE, TILES
from zipar_train.decoding.state import DecodeState
from zipar_train.models.family import Family
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import SamplingParams

ROWS = (16, 32)  # most rows of a pass; a matrix product has a tile of so many. Above, cuBLAS is faster
BLOCKS = 128  # of attention: about one per multiprocessor
EMBEDDINGS: WeakKeyDictionary[Family, Tensor] = WeakKeyDictionary()


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


class FusedDecoder(Decoder):
    """Decoder of a family along a plan, as `Decoder`, with Triton kernels.

    Args:
        family: The generator, after `fuse_for_inference`, on its device and in its dtype; it is put into eval mode.
        plan: A plan on the family's grid.
        capture: Replay passes as CUDA graphs. None: only on a GPU.

    Raises:
        ValueError: If the plan does not fit the family, or the kernels do not support its layers.
    """

    def __init__(self, family: Family, plan: Plan, *, capture: bool | None = None):
        check_support(family)
        super().__init__(family, plan, capture=capture)
        self.device, self.body = family.model.device, cast(Any, family.model.base_model)
        self.launch = {"INTERPRETED": self.device.type == "cpu", "PDL": has_dependent_launch(self.device)}
        first = self.body.layers[0]
        self.heads, self.groups, self.head = first.heads, first.groups, first.head
        position = torch.as_tensor(plan.position + plan.prompt, device=self.device)[None]
        cos, sin = self.body.rotary_emb(torch.empty(1, device=self.device), position_ids=position)
        self.cos, self.sin = (t[0, :, : self.head // 2].float().contiguous() for t in (cos, sin))
        self.embeddings = embeddings(family)
        of_step = np.zeros(len(plan) + 1, dtype=np.int64)
        of_step[np.searchsorted(plan.step, np.arange(plan.passes))] = np.bincount(plan.step)
        self.of_step = torch.as_tensor(of_step, device=self.device)  # number of slots of the step that begins at a slot

    def release(self) -> None:
        super().release()
        self.buffers: dict[int, Buffers] = {}
        self.counts: dict[int, Tensor] = {}

    def run_pass(self, shape: Shape, sampling: SamplingParams, *, keep: bool = False) -> tuple[Tensor, ...]:
        assert self.state is not None
        slots = self.room(self.state, shape, sampling)
        if slots is None:
            return super().run_pass(shape, sampling, keep=keep)
        self.prepare(self.state, slots)
        work = partial(self.fused_pass, self.state, slots, sampling, keep=keep)
        return self.captured((slots, sampling, keep), work) if self.capture else work()

    def room(self, state: DecodeState, shape: Shape, sampling: SamplingParams) -> int | None:
        """Return for how many slots a fused pass of this shape has room; None if it must be plain.

        Without lookahead it is one of two numbers, so that two CUDA graphs serve all steps of an image.
        """
        rows, fed = len(state.prompt), shape.slots
        if shape.prompt or fed > ROWS[-1] // rows:
            return None
        return fed if sampling.lookahead else next(most // rows for most in ROWS if fed <= most // rows)

    def prepare(self, state: DecodeState, slots: int) -> None:
        """Allocate what passes of so many slots need, before they are captured."""
        rows = len(state.prompt)
        if slots in self.buffers:
            return
        keys, first = self.heads // self.groups, self.body.layers[0]
        like: dict[str, Any] = {"dtype": self.family.model.dtype, "device": self.device}
        queries = block(slots * self.groups, least=16)
        self.buffers[slots] = Buffers(
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

    def fused_pass(self, state: DecodeState, slots: int, sampling: SamplingParams, *, keep: bool) -> tuple[Tensor, ...]:
        """Run the pass at the state's slots; arguments and results as in `Decoder._pass`.

        Args:
            slots: K, for which `prepare` was called.
        """
        end = len(self.plan)
        images, rows, columns = len(state.tokens), len(state.prompt), state.tokens.shape[1]
        count = self.counts[slots] if sampling.lookahead else self.of_step
        buffers, pdl = self.buffers[slots], self.launch["PDL"]
        how: dict[str, Any] = {"PDL": pdl, "launch_pdl": pdl}
        progress = (state.slot, count)
        predicts = self.predicted(state, count, slots) if keep else None
        d = self.embeddings.shape[1]
        ends.feed[(rows * slots,)](
            state.tokens, self.source, self.embeddings, *progress, buffers.hidden, buffers.given,
            images, slots, columns, end, self.family.codebook_size, D=d, BD=block(d), **how,
        )  # fmt: skip
        for kernels, kept in zip(self.body.layers, state.cache.slot_layers, strict=True):
            self.layer(kernels, kept.keys, kept.values, state, progress, buffers, slots)
        logits = self.family.head(norm(buffers.hidden, self.body.norm)).contiguous()
        v = logits.shape[-1]
        ends.choose[(images * slots, 2 if sampling.lookahead else 1)](
            logits, buffers.scratch, state.seeds, state.tokens, self.target, self.above, *progress, images, slots,
            columns, end, self.plan.grid.num_codes + 1, sampling.guidance, sampling.temperature or 1.0,
            min(sampling.top_k or v, v), sampling.top_p,
            V=v, BV=block(v), BC=min(block(v), 2048), GUIDED=rows > images, GREEDY=sampling.temperature == 0,
            FILTERED=sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1),
            num_warps=16 if v <= 2**14 else 32, **how,
        )  # fmt: skip
        ends.advance[(images,)](
            state.tokens, self.source, buffers.given, *progress, state.passes, images, slots, columns, end,
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
        target = self.target[slot.clamp(max=len(self.plan))]
        unfed = (ahead >= count[state.slot][:, None]) | (slot >= len(self.plan))
        return slot, target.masked_fill(unfed, self.plan.grid.num_codes + 1)

    def layer(
        self,
        own: Any,
        keys: Any,
        values: Any,
        state: DecodeState,
        progress: tuple[Tensor, Tensor],
        buffers: Buffers,
        slots: int,
    ) -> None:
        """Apply a layer to the hidden states, in five kernels."""
        images, rows, end = len(state.tokens), len(state.prompt), len(self.plan)
        m, h, hk, head = rows * slots, self.heads, self.heads // self.groups, self.head
        d, f = buffers.hidden.shape[1], buffers.inner.shape[1]
        how = self.launch | {"launch_pdl": self.launch["PDL"]}
        most = next(most for most in ROWS if m <= most)

        def tile(kernel: str, size: int) -> tuple[int, int, dict[str, Any]]:
            """Return the blocks along the rows, the columns of a block, and its other sizes."""
            high, columns, depth, warps, stages = TILES[kernel, most, size > ONCE]
            depth = min(depth, block(size))
            sizes = {"BM": high, "BK": depth, "WARPS": min(warps, depth // 16), "LINES": max(block(size) // 32, 1)}
            return -(-m // high), columns, how | (sizes if depth else {}) | {"num_warps": warps, "num_stages": stages}

        high, pairs, sizes = tile("qkv of a head" if own.norms else "qkv", d)
        pairs = head // 2 if own.norms else pairs
        norm_w, norm_b = own.norms or (None, None)
        layer.qkv[(high, (h + 2 * hk) * (head // 2 // pairs))](
            buffers.hidden, own.before.weight, own.qkv.weight, getattr(own.qkv, "scale", None), own.bias,
            norm_w, norm_b, self.cos, self.sin, *progress, buffers.query, keys, values, images, slots, m, end,
            keys.shape[2], own.before.variance_epsilon, D=d, H=h, HK=hk, HEAD=head, BH=pairs, **sizes,
        )  # fmt: skip
        padding = state.padding
        splits, queries = self.splits(rows), block(slots * self.groups, least=16)
        _, at_once, sizes = tile("attend", 0)
        layer.attend[(rows * hk, splits)](
            buffers.query, keys, values, self.visible.view(torch.uint8),
            None if padding is None else padding.view(torch.uint8), *progress, buffers.attended,
            buffers.partial, buffers.arrived, images, slots, end, keys.shape[2], self.visible.shape[1],
            0 if padding is None else padding.shape[1], own.scale,
            H=h, HK=hk, HEAD=head, SPLITS=splits, BQ=queries, BS=at_once,
            **sizes | {"num_warps": sizes["num_warps"] if queries < 64 else 8},
        )  # fmt: skip
        high, columns, sizes = tile("out", h * head)
        layer.add_product[(high, d // columns)](
            buffers.attended, own.out.weight, getattr(own.out, "scale", None), buffers.hidden, m,
            N=d, D=h * head, BN=columns, **sizes,
        )  # fmt: skip
        high, columns, sizes = tile("gate_up", d)
        layer.gate_up[(high, f // columns)](
            buffers.hidden, own.between.weight, own.gate_up.weight, getattr(own.gate_up, "scale", None),
            buffers.inner, m, own.between.variance_epsilon, F=f, D=d, BN=columns, **sizes,
        )  # fmt: skip
        high, columns, sizes = tile("down", f)
        layer.add_product[(high, d // columns)](
            buffers.inner, own.down.weight, getattr(own.down, "scale", None), buffers.hidden, m,
            N=d, D=f, BN=columns, **sizes,
        )  # fmt: skip


def check_support(family: Family) -> None:
    """Check that the kernels support a model: a body after `fuse_for_inference`, of common sizes.

    Raises:
        ValueError: If they do not.
    """
    body: Any = family.model.base_model
    if isinstance(body, FusedLlama):
        own: Any = body.layers[0]
        sizes = (own.before.weight.shape[0], own.down.weight.shape[1], own.heads * own.head)
        stock = own.after_attention is None  # no kernel norms before the residual, or rotates a part of a head
        if stock and own.head in (32, 64, 128) and all(size % 16 == 0 for size in sizes):
            return
    raise ValueError("the Triton kernels do not support this model's layers or sizes: use ZIPAR_DECODE=plain")


def embeddings(family: Family) -> Tensor:
    """Return the input embeddings of all codes, (V, D), or (V + 1, D) with that of the row-end token.

    All decoders of a family share them.
    """
    if family not in EMBEDDINGS:
        tokens = torch.arange(family.codebook_size, device=family.model.device)[None]
        inputs = [family.embed(tokens)]
        if family.grid.row_end:
            inputs.append(family.embed(torch.full_like(tokens[:, :1], ROW_END)))
        EMBEDDINGS[family] = torch.cat(inputs, dim=1)[0].detach().to(family.model.dtype)
    return EMBEDDINGS[family]


def has_dependent_launch(device: torch.device) -> bool:
    """Return True if the GPU supports programmatic dependent launch: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def block(size: int, *, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size`."""
    return max(least, 1 << (size - 1).bit_length())
