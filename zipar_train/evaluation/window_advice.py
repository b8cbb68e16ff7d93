"""Advice on windows for a checkpoint, from bits per code, the attention each window cuts off, and time per image.

The paper chooses its windows from attention maps (arXiv 2412.04062, figure 3: most attention is on nearby codes and on
the same column of the row above). Bits and attention here use held-out codes. Bits are computed under each window's
mask. Attention is that of next-token decoding, summed over the codes that would not exist yet at a window. Images are
generated only to measure the speed of the windows whose bits are within the tolerance.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest
from zipar_train.evaluation import decode_advice
from zipar_train.evaluation.candidates import candidates, check_captions, conditions, expected, windows_of
from zipar_train.evaluation.decode_advice import LOOKAHEADS, DecodeAdvice
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.io.tables import aligned
from zipar_train.models.family import target_hidden_states
from zipar_train.plan.grid import Grid
from zipar_train.plan.masks import dense
from zipar_train.plan.table import NEVER, Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.ranks import process

WEIGHTS = 2**26  # attention weights in memory at once


class Window(BaseModel):
    window: int
    passes: int
    reduction: float
    bits: float  # per code
    costs: float  # bits relative to next-token's, minus 1
    cut: list[float]  # share of next-token attention that the window cuts off, by layer


class Advice(BaseModel):
    """Recommendations among the windows whose bits are within the tolerance, with the measurements."""

    checkpoint: str
    shards: str
    images: int  # used for bits
    attention_images: int
    tolerance: float
    window: int  # smallest within the tolerance
    windows: list[Window]
    decode: DecodeAdvice  # speed of the windows within the tolerance, with and without lookahead, and the fastest pair
    attention: list[list[float | None]]  # mean weight by row offset (0 ..) and column offset (-(W-1) .. W-1)


def advise(
    recipe: Recipe,
    checkpoint: str | Path,
    *,
    shards: str,
    windows: Sequence[int] | None = None,
    tolerance: float = 0.01,
    lookaheads: Sequence[int] = LOOKAHEADS,
    batch_size: int = 1,
    images: int | None = None,
    attention_images: int = 32,
    progress: bool = True,
) -> Advice:
    """Measure a checkpoint and recommend a window, and a pair of window and lookahead.

    Bits and attention come from held-out shards, speed from generated images, see `decode_advice.measure`.

    Args:
        recipe: The recipe of the model.
        checkpoint: A run folder, checkpoint or export.
        shards: A shard manifest.
        windows: None: every power of two below the row length, the recipe's windows, and next-token.
        tolerance: Accepted increase in bits relative to next-token's.
        lookaheads: Numbers of slots to try at each window within the tolerance, besides none.
        batch_size: Images generated together when speed is measured.
        images: Number of images for bits. None: all images of the shards.
        attention_images: Number of images for attention.
        progress: Show progress bars.

    Raises:
        ValueError: If a window, checkpoint, shard set or caption does not fit, a number is out of range, or a batch
            does not fit into memory.
    """
    if not tolerance >= 0:
        raise ValueError(f"--tolerance {tolerance:g} must be 0 or more: 0.01 accepts one percent more bits")
    if attention_images < 1 or (images is not None and images < 1):
        raise ValueError("--images must be at least 1")
    decode_advice.check(batch_size, lookaheads)
    model, (_, _, device) = recipe.model, process()
    manifest = read_manifest(shards, **expected(model), sides=model.grid)
    widest = model.raster.row_length
    powers = [2**k for k in range(widest.bit_length()) if 2**k < widest]
    wanted = windows_of(recipe, windows or [*powers, *recipe.evaluate.windows])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": shards})})  # captions' default
    seed = recipe.evaluate.seeds[0]
    prompts, _ = conditions(recipe, images=decode_advice.images_needed(batch_size), seed=seed)
    check_captions(recipe, prompts)
    (candidate,) = candidates(recipe, [checkpoint], device=device)
    generator = candidate.generator
    plans = {window: generator.plan(window) for window in wanted}
    loader = ShardLoader(shards, batch_size=recipe.evaluate.batch_size, sides=model.grid)
    with tqdm(wanted, desc="bits", disable=not progress) as bar:
        bits = {
            window: bits_per_code(generator.inference_family, plans[window], loader, images=images) for window in bar
        }

    count = min(attention_images, manifest.samples)
    small = ShardLoader(shards, batch_size=1, sides=model.grid)
    layers = attention(
        generator.load_family(),
        plans[widest],
        islice(small, count),
        bar=tqdm(total=count, desc="attention", disable=not progress),
    )
    cuts = {window: cut_off(plan) for window, plan in plans.items()}
    found = [
        Window(
            window=window,
            passes=plan.passes,
            reduction=plan.reduction,
            bits=bits[window],
            costs=bits[window] / bits[widest] - 1,
            cut=[float((layer * cuts[window]).sum(1).mean()) for layer in layers],
        )
        for window, plan in plans.items()
    ]
    within = [row.window for row in found if row.costs <= tolerance]
    decode = decode_advice.measure(
        generator,
        prompts,
        windows=within,
        lookaheads=lookaheads,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return Advice(
        checkpoint=candidate.origin,
        shards=f"{manifest.source} ({Path(shards).name}, {manifest.checksum[:8]})",
        images=min(manifest.samples, images or manifest.samples),
        attention_images=count,
        tolerance=tolerance,
        window=min(within),
        windows=found,
        decode=decode,
        attention=_by_offset(np.mean(layers, axis=0), model.raster),
    )


def cut_off(plan: Plan) -> NDArray[np.bool_]:
    """Return bool (N, N): True if code m precedes code n in raster order, but n is predicted without seeing it."""
    codes = plan.grid.num_codes
    queries, keys = _slots(plan)
    seen = np.zeros((codes, codes), dtype=bool)
    seen[:, plan.source[keys]] = plan.visible()[np.ix_(queries, keys)]
    return np.tri(codes, k=-1, dtype=bool) & ~seen


def _slots(plan: Plan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the slots that predict codes 0, 1, ..., and the slots that feed codes, without stand-ins."""
    return plan.predicting(), np.flatnonzero((plan.source >= 0) & (plan.expires == NEVER))


@torch.inference_mode()
def attention(family: Any, plan: Plan, batches: Iterator[Any], *, bar: tqdm) -> list[NDArray[np.float64]]:
    """Return next-token attention of each layer, (N, N): mean weight of code m when predicting code n.

    The mean is over heads and images. Rows sum to less than 1; the rest is on the prompt.
    """
    family.model.eval()
    mask = dense(plan, device=family.model.device)
    sums: dict[int, Tensor] = {}
    images = 0
    with _observed(sums, plan), bar:
        for batch in batches:
            codes = batch.codes.to(family.model.device)
            target_hidden_states(family, plan, codes, family.check(batch.condition), mask)
            images += len(codes)
            bar.update(len(codes))
    return [sums[layer].cpu().numpy() / images for layer in sorted(sums)]


@contextmanager
def _observed(sums: dict[int, Tensor], plan: Plan) -> Iterator[None]:
    """Add up every layer's attention weights within the `with` block, by wrapping transformers' attention function."""
    stock, codes = ALL_ATTENTION_FUNCTIONS["sdpa"], plan.grid.num_codes
    predicting, feeding = _slots(plan)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> Any:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
        scale = rest.get("scaling") or query.shape[-1] ** -0.5
        bias = mask.float()
        total = sums.setdefault(module.layer_idx, torch.zeros(codes, codes, dtype=torch.float64, device=query.device))
        queries, fed = (torch.tensor(slots, device=query.device) for slots in (predicting, feeding))
        source = torch.tensor(plan.source[feeding], device=query.device)
        for some in queries.split(max(1, WEIGHTS // (query.shape[0] * query.shape[1] * keys.shape[2]))):
            weights = (query[:, :, some].float() @ keys.transpose(2, 3) * scale + bias[:, :, some]).softmax(-1)
            rows = torch.tensor(plan.target, device=query.device)[some]
            total[rows[:, None], source] += weights[..., fed].mean(1).sum(0)
        return stock(module, query, key, value, mask, **rest)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # restores transformers' own


def _by_offset(weights: NDArray[np.float64], grid: Grid) -> list[list[float | None]]:
    """Return the mean weight by row and column offset in the image; None where no pair of codes has that offset."""
    height, width = grid.height, grid.width
    codes = height * width
    weights = weights[-codes:, -codes:]  # without the preview
    row, column = np.divmod(np.arange(codes), width)
    above, side = row[:, None] - row[None], column[None] - column[:, None] + width - 1
    earlier = np.tri(codes, k=-1, dtype=bool)
    place = (above * (2 * width - 1) + side)[earlier]
    size = height * (2 * width - 1)
    total = np.bincount(place, weights[earlier], minlength=size)
    pairs = np.bincount(place, minlength=size)
    return [
        [float(t / n) if n else None for t, n in zip(ts, ns, strict=True)]
        for ts, ns in zip(total.reshape(height, -1), pairs.reshape(height, -1), strict=True)
    ]


def lines(advice: Advice) -> list[str]:
    """Return the lines of the tables and the recommendations."""
    cells = [["window", "passes", "fewer", "bits/code", "costs", "attention cut off (worst layer)"]]
    for row in advice.windows:
        worst = max(range(len(row.cut)), key=row.cut.__getitem__)
        cells.append(
            [
                str(row.window),
                f"{row.passes:,}",
                f"{row.reduction:.0%}",
                f"{row.bits:.4f}",
                f"{row.costs:+.2%}",
                f"{float(np.mean(row.cut)):6.2%} ({row.cut[worst]:.2%}, layer {worst})",
            ]
        )
    best = next(row for row in advice.windows if row.window == advice.window)
    return [
        advice.checkpoint,
        f"{advice.images:,} held-out images of {advice.shards}; attention of {advice.attention_images}",
        "",
        *aligned(cells, ">>>>><"),
        "",
        f"{advice.decode.images:,} generated images for each window within the tolerance and each lookahead; "
        f"batch size {advice.decode.batch_size:,}",
        "",
        *decode_advice.lines(advice.decode),
        "",
        f"Smallest window within {advice.tolerance:.2%} of next-token's bits: {best.window} ({best.passes:,} passes, "
        f"{best.reduction:.0%} fewer).",
        decode_advice.sentence(advice.decode, tolerance=advice.tolerance),
    ]
