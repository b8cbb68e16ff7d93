"""The theorem: the logits of a decode equal those of one teacher-forced pass over its codes."""

import torch
from families import StockLlama

from zipar_train import Grid, Plan
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import teacher_forced
from zipar_train.plan.masks import dense
from zipar_train.recipe.schema import SamplingParams


def drawn_and_seen(family, plan, sampling, labels, seed=0, images=None):
    """Codes (B, N) of a decode, and the logits (B or 2 B, N, V) it saw of every code."""
    codes, seen = plan.grid.num_codes, {}

    def observe(targets, logits):
        copies = len(logits) // len(targets)
        for image, targets_of_image in enumerate(targets.tolist()):
            for column, target in enumerate(targets_of_image):
                if target < codes:
                    assert (image, target) not in seen
                    seen[image, target] = logits[image :: len(targets), column].clone()
                    assert len(seen[image, target]) == copies

    numbers = code_seeds(list(range(images or len(labels))), codes, seed=seed)
    drawn = Decoder(family, plan)(labels, numbers, sampling, observe=observe)
    each = [torch.stack([seen[image, n] for n in range(codes)], dim=1) for image in range(len(drawn))]
    return drawn.flatten(1), torch.stack(each, dim=1).flatten(0, 1)


def check_theorem(family, plan, sampling, mask, tolerance=1e-10):
    labels = torch.tensor([0, 2, 1])
    codes, seen = drawn_and_seen(family, plan, sampling, labels)
    if sampling.guidance != 1:
        null = family.drop(labels, torch.ones(3, dtype=torch.bool))
        codes, labels = torch.cat([codes, codes]), torch.cat([labels, null])
    with torch.no_grad():
        forced = teacher_forced(family, plan, codes, labels, mask)
    assert forced.shape == seen.shape
    assert (forced - seen).abs().max() <= tolerance
    assert seen.std() > 0.1  # contexts matter: not the equality of two constants


def grouped(grid: Grid) -> StockLlama:
    """Two queries share a key; heads are wider than the model's width over their number."""
    family = StockLlama(grid, prompt=2)
    torch.manual_seed(0)
    config = family.model.config.to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    family.model = type(family.model)(type(family.model.config)(**config)).to(torch.float64)
    return family


def check_captioned_theorem(family, captions, *, window: int, guidance: float, streamlined: bool) -> None:
    """For a family prompted by token ids, in float64; unconditional prompts may be padded otherwise."""
    if streamlined:
        assert fuse_for_inference(family.model)
    prompts, images = family.check(captions), len(captions)
    plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length)
    codes, seen = drawn_and_seen(family, plan, SamplingParams(guidance=guidance), prompts, images=images)
    if guidance != 1:
        null = family.drop(prompts, torch.ones(images, dtype=torch.bool))
        codes, prompts = torch.cat([codes, codes]), type(prompts)(*map(torch.cat, zip(prompts, null, strict=True)))
    with torch.no_grad():
        forced = teacher_forced(family, plan, codes, prompts, dense(plan))
    assert (forced - seen).abs().max() <= 1e-10 * forced.abs().max()
