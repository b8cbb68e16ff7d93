"""What the decoder is measured against: the released ZipAR loop's way of working, and transformers' own `generate`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.sampling import guide, sample
from zipar_train.masks import hide
from zipar_train.models.family import Family
from zipar_train.plan import Plan
from zipar_train.sections import Draw


@torch.inference_mode()
def eager_loop(family: Family, condition: Any, uniforms: Tensor, draw: Draw, *, window: int) -> Tensor:
    """Draw B images as the released ZipAR decoder does (ThisisBillhe/ZipAR 2a5695c, generate_zipar.py), on our family.

    A Python loop a pass, lists and concatenation, a cache in raster order that is always attended to as a whole, its
    unwritten slots included, by the unfused attention, the head for every input, and one call a row to sample.

    Returns:
        Codes, int64 (B, H, W): those of `Decoder(..., released=True)` on a plan with `stand_in="released"`.
    """
    grid, prompt_length, device = family.grid, family.prompt_length, family.model.device
    plan = Plan.zipar(grid, window=window, stand_in="released", prompt=prompt_length)
    condition = family.check(condition)
    prompt = family.prompt(condition)
    if draw.guidance != 1:
        null = family.drop(condition, torch.ones(len(uniforms), dtype=torch.bool, device=device))
        prompt = torch.cat([prompt, family.prompt(null)])
    padding = family.padding(condition)
    if padding is not None:
        padding = padding.repeat(len(prompt) // len(padding), 1)
    uniforms = uniforms.to(device)
    slots = prompt_length + grid.codes
    causal = torch.tril(torch.ones(slots, slots, dtype=torch.bool, device=device))
    cache = SlotCache(family.model, rows=len(prompt), slots=slots)
    drawn: dict[int, Tensor] = {}
    for step in range(plan.passes):
        inputs = [i for i in range(len(plan)) if plan.step[i] == step]
        position = torch.tensor([int(plan.position[i]) for i in inputs], device=device)
        if step == 0:
            embeddings = prompt
        else:
            embeddings = family.embed(torch.cat([drawn[int(plan.source[i])] for i in inputs], dim=1))
            if draw.guidance != 1:
                embeddings = torch.cat([embeddings, embeddings])
        place = position + prompt_length
        mask = causal[None, None, place]
        if padding is not None:
            mask = hide(mask, padding, slots=place)
        cache.aim(place, slots)
        with sdpa_kernel(SDPBackend.MATH):
            logits = family.head(family.hidden(embeddings, position, mask, cache))
        if draw.guidance != 1:
            logits = guide(logits, draw.guidance)
        for column, i in enumerate(inputs):
            target = int(plan.target[i])
            if target >= 0:
                codes = sample(
                    logits[:, column], uniforms[:, target],
                    temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p,
                )  # fmt: skip
                drawn[target] = codes[:, None]
    codes = torch.cat([drawn[target] for target in range(grid.codes)], dim=1)
    return codes.view(len(uniforms), grid.height, grid.width)


@torch.inference_mode()
def stock_generate(family: Family, condition: Any, draw: Draw) -> Tensor:
    """Next-token drawing by transformers' `generate` with a static cache: codes (R, N).

    R = 2 B rows under guidance, each drawn on its own: what the passes cost, without mixing the two.
    """
    condition = family.check(condition)
    prompt = family.prompt(condition)
    if draw.guidance != 1:
        prompt = torch.cat([prompt, prompt])
    codes = family.grid.codes
    sampled: dict[str, Any] = {"do_sample": False}
    if draw.temperature:
        sampled = {"do_sample": True, "temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p}
    return family.model.generate(  # type: ignore[operator]
        inputs_embeds=prompt,
        attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
        cache_implementation="static",
        max_new_tokens=codes,
        min_new_tokens=codes,
        eos_token_id=None,
        pad_token_id=0,
        **sampled,
    )
