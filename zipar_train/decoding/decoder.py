"""Drawing images along a plan: one forward pass after another, each with the slots of its own step.

The slots of a plan lie in decode order, so a pass feeds slots `first .. last - 1`, writes their keys there, and attends
to slots before `last` alone. What it feeds and draws is looked up in tables made once and kept on the device; the loop
reads no result back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Pass(NamedTuple):
    """Feeds slots first .. last - 1, of which those at `inside` (D,) draw the targets begin .. end - 1."""

    first: int
    last: int
    begin: int
    end: int
    inside: Tensor
    seen: int  # keys it may attend to


class Decoder:
    """Draws images from a family along a plan.

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
        codes = plan.grid.codes

        def table(vector) -> Tensor:
            return torch.as_tensor(np.array(vector), device=device)

        # columns of the tokens drawn so far: every code, then the row-end token
        self.source = table(np.where(plan.source == ROW_END, codes, plan.source))
        self.position = table(plan.position)
        drawing = np.flatnonzero(plan.target >= 0)  # slots whose logits draw a code
        self.target = table(plan.target[drawing])
        self.visible = dense(plan, device=device)
        if released:
            self.visible = torch.cat([self.visible, unwritten(plan, device=device)], dim=-1)
        ends = np.searchsorted(plan.step, np.arange(plan.passes), side="right")
        self.passes = []
        for first, last in zip(np.append(0, ends), ends, strict=False):
            begin, end = np.searchsorted(drawing, (first, last))
            inside = table(drawing[begin:end] - first)
            seen = self.visible.shape[-1] if released else int(last)
            self.passes.append(Pass(int(first), int(last), int(begin), int(end), inside, seen))
        self.cache = SlotCache(family.model.config.get_text_config().num_hidden_layers, self.visible.shape[-1])

    @torch.inference_mode()
    def __call__(self, condition: Any, uniforms: Tensor, draw: Draw, *, observe: Observer | None = None) -> Tensor:
        """Draw B images.

        Args:
            condition: of B images.
            uniforms: (B, N), see `sampling.uniforms`.
            draw: how codes are sampled.
            observe: called with the targets (K,) and logits (B, K, V) of every pass, (2 B, K, V) under guidance.
                For tests: what the decoder saw.

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
        padding = family.padding(condition)
        if padding is not None and guided:
            padding = torch.cat([padding, padding])
        tokens = torch.full((images, codes + 1), ROW_END, device=family.model.device)
        uniforms = uniforms.to(tokens.device)

        for step in self.passes:
            slots = slice(step.first, step.last)
            embeddings = family.embed(tokens[:, self.source[slots][plan.prompt if step.first == 0 else 0 :]])
            if guided:
                embeddings = torch.cat([embeddings, embeddings])
            if step.first == 0:
                embeddings = torch.cat([prompt, embeddings], dim=1)
            visible = self.visible[:, :, slots, : step.seen]
            if padding is not None:
                visible = hide(visible, padding, first=step.first)
            self.cache.aim(step.first, step.last, step.seen)
            logits = family.logits(embeddings, self.position[slots], visible, self.cache, wanted=step.inside)
            target = self.target[step.begin : step.end]
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
        return tokens[:, :codes].view(images, plan.grid.height, plan.grid.width)
