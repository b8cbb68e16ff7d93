"""Drawing images along a plan: one forward pass after another, each of the same shape.

Everything a pass needs is an index into the plan, made once and kept on the device; the loop reads no result back.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.sampling import guide, sample
from zipar_train.masks import dense, hide, unwritten
from zipar_train.models.family import Family
from zipar_train.plan import ROW_END, Plan
from zipar_train.sections import Draw

Observer = Callable[[Tensor, Tensor], None]


class Decoder:
    """Draws images from a family along a plan.

    Passes after the prompt's are padded to K, the plan's width, with copies of their last slot: a copy writes its key
    to a sink that nobody sees, and its code to a column that nobody reads.

    Args:
        family: on its device, in its dtype; put into eval mode.
        plan: on the family's grid.
        released: let every query also attend to the positions before it that no slot has been written to yet, with a
            zero key (weight exp(0)) and a zero value, as the released ZipAR decoder does (its mask is causal over a
            cache in raster order). A baseline to compare with; with `stand_in="released"` it draws the same codes.

    Raises:
        ValueError: if plan and family do not fit.
    """

    def __init__(self, family: Family, plan: Plan, *, released: bool = False):
        if plan.grid != family.grid or plan.prompt != family.prompt_length:
            raise ValueError(
                f"{plan} does not fit a model of {family.grid} codes with {family.prompt_length} prompt tokens"
            )
        self.family, self.plan = family, plan
        family.model.eval()
        device = family.model.device
        slots, codes = len(plan), plan.grid.codes
        # columns of the tokens drawn so far: every code, then the row-end token, then the padding's waste
        source = np.where(plan.source == ROW_END, codes, plan.source)
        target = np.where(plan.target < 0, codes + 1, plan.target)

        def tables(*vectors) -> tuple[Tensor, ...]:
            return tuple(torch.as_tensor(np.array(v), device=device) for v in vectors)

        self.visible = torch.nn.functional.pad(dense(plan, device=device), (0, 1))  # (1, 1, S, S + 1), the sink unseen
        if released:
            self.visible = torch.cat([self.visible, unwritten(plan, device=device)], dim=-1)
        first = np.flatnonzero(plan.step == 0)
        self.first = tables(first, first, source[first], plan.position[first], target[first])
        fed = [np.flatnonzero(plan.step == t) for t in range(1, plan.passes)]
        width = max(map(len, fed), default=1)
        query = np.array([np.pad(f, (0, width - len(f)), mode="edge") for f in fed], dtype=np.int64).reshape(-1, width)
        real = np.array([np.arange(width) < len(f) for f in fed], dtype=bool).reshape(-1, width)
        self.rest = tables(
            query,
            np.where(real, query, slots),
            source[query],
            plan.position[query],
            np.where(real, target[query], codes + 1),
        )

    @torch.inference_mode()
    def __call__(self, condition: Any, uniforms: Tensor, draw: Draw, *, observe: Observer | None = None) -> Tensor:
        """Draw B images.

        Args:
            condition: of B images.
            uniforms: (B, N), see `sampling.uniforms`.
            draw: how codes are sampled.
            observe: called with the targets (K,) and logits (B, K, V) of every pass, (2 B, K, V) under guidance;
                targets of N and above are none. For tests: what the decoder saw.

        Returns:
            Codes, int64 (B, H, W).

        Raises:
            ValueError: for a condition the family does not know.
        """
        family, plan, guided = self.family, self.plan, draw.guidance != 1
        condition = family.check(condition)
        images, codes = len(uniforms), plan.grid.codes
        assert uniforms.shape == (images, codes), uniforms.shape
        prompt = family.prompt(condition)
        if guided:
            null = family.drop(condition, torch.ones(images, dtype=torch.bool, device=prompt.device))
            prompt = torch.cat([prompt, family.prompt(null)])
        cache = SlotCache(family.model.config.get_text_config().num_hidden_layers, self.visible.shape[-1])
        visible = self.visible
        if (padding := family.padding(condition)) is not None:
            visible = hide(visible, torch.cat([padding, padding]) if guided else padding)
        tokens = torch.full((images, codes + 2), ROW_END, device=family.model.device)
        uniforms = torch.nn.functional.pad(uniforms.to(tokens.device), (0, 2))

        def forward(embeddings: Tensor, query: Tensor, write: Tensor, position: Tensor, target: Tensor) -> None:
            cache.aim(write)
            logits = family.logits(embeddings, position, visible[:, :, query], cache)
            if observe:
                observe(target, logits)
            if guided:
                logits = guide(logits, draw.guidance)
            drawn = sample(
                logits.flatten(0, 1),
                uniforms[:, target].flatten(),
                temperature=draw.temperature,
                top_k=draw.top_k,
                top_p=draw.top_p,
            )
            tokens.index_copy_(1, target, drawn.view(images, -1))

        def embed(source: Tensor) -> Tensor:
            embeddings = family.embed(tokens[:, source])
            return torch.cat([embeddings, embeddings]) if guided else embeddings

        query, write, source, position, target = self.first
        after = source[plan.prompt :]  # row ends that open rows in the prompt's own pass
        forward(torch.cat([prompt, embed(after)], 1) if len(after) else prompt, query, write, position, target)
        for query, write, source, position, target in zip(*self.rest, strict=True):
            forward(embed(source), query, write, position, target)
        return tokens[:, :codes].view(images, plan.grid.height, plan.grid.width)
