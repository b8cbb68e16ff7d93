"""Passes and time per image of pairs (window, lookahead), measured by generating images, and the fastest pair.

Lookahead changes only the number of passes, not the images. How many it saves depends on the model and on the window,
and what a pass costs depends on the device and the batch size. So the pairs are measured instead of computed.
"""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from zipar_train.decoding.generator import Generator
from zipar_train.evaluation.likelihood import ROUNDS, milliseconds
from zipar_train.io.tables import aligned

LOOKAHEADS = (16, 32, 64)  # slots that are tried besides none
MOST = 2**16  # of `evaluate.batch_size` and `sampling.lookahead`


class Pair(BaseModel):
    window: int
    lookahead: int  # slots fed per pass; 0: none
    passes: float  # per image, mean
    passes_std: float  # over images
    milliseconds: float  # per image: time of a batch divided by its images
    share: float  # of the time of next-token without lookahead


class DecodeAdvice(BaseModel):
    """Pairs of windows and lookahead with their measured speed, and the one with the least time per image."""

    batch_size: int
    images: int  # per pair
    pairs: list[Pair]  # widest window first, without lookahead first
    fastest: Pair


def check(batch_size: int, lookaheads: Sequence[int]) -> None:
    """Check the options of `measure`, before any work.

    Raises:
        ValueError: If the batch size or a number of slots is out of range; names the option.
    """
    if not 1 <= batch_size <= MOST:
        raise ValueError(f"--batch-size {batch_size} must be 1 .. {MOST} images")
    if wrong := [slots for slots in lookaheads if not 1 <= slots <= MOST]:
        raise ValueError(
            f"--lookahead {wrong[0]} must be 1 .. {MOST} slots. Decoding without lookahead is always tried"
        )


def images_needed(batch_size: int) -> int:
    """Return the number of conditions that `measure` takes: a batch for each round."""
    return batch_size * (ROUNDS + 1)


def measure(
    generator: Generator,
    conditions: Sequence[Any],
    *,
    windows: Sequence[int],
    lookaheads: Sequence[int] = LOOKAHEADS,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> DecodeAdvice:
    """Generate images with every window and every number of slots, and choose the fastest pair.

    Pairs take turns, see `milliseconds`. In each round, all pairs generate the same batch of images, and the next round
    has another batch. Sampling is the recipe's.

    Args:
        generator: The generator.
        conditions: A class or caption for each image, as many as `images_needed` returns.
        windows: Windows, next-token included.
        lookaheads: Numbers of slots. Every window is also measured without lookahead.
        batch_size: Images generated together.
        seed: Seed of the images.
        progress: Show a progress bar.

    Raises:
        ValueError: If a window does not fit the grid, or a batch does not fit into memory.
    """
    pairs = [(window, slots) for window in sorted(windows, reverse=True) for slots in (0, *sorted(set(lookaheads)))]
    passes: dict[tuple[int, int], list[int]] = {pair: [] for pair in pairs}
    with tqdm(total=len(pairs) * (ROUNDS + 1), desc="passes and time", disable=not progress) as bar:

        def generate(pair: tuple[int, int], turn: int) -> None:
            first = turn * batch_size
            images = generator.generate(
                conditions[first : first + batch_size],
                window=pair[0],
                lookahead=pair[1],
                seed=seed,
                first=first,
                batch_size=batch_size,
                pixels=False,
            )
            passes[pair] += images.passes.tolist() if turn else []  # of the images whose time counts
            bar.update()

        times = milliseconds({pair: lambda turn, pair=pair: generate(pair, turn) for pair in pairs})  # type: ignore[misc]
    found = [
        Pair(
            window=pair[0],
            lookahead=pair[1],
            passes=fmean(passes[pair]),
            passes_std=stdev(passes[pair]),
            milliseconds=times[pair] / batch_size,
            share=times[pair] / times[pairs[0]],
        )
        for pair in pairs
    ]
    return DecodeAdvice(batch_size=batch_size, images=len(passes[pairs[0]]), pairs=found, fastest=fastest(found))


def fastest(pairs: Sequence[Pair]) -> Pair:
    """Return the pair with the least time per image; of equal ones the first."""
    return min(pairs, key=lambda pair: pair.milliseconds)


def lines(advice: DecodeAdvice) -> list[str]:
    """Return the lines of the table of pairs."""
    cells = [["window", "lookahead", "passes", "ms/image", "of next-token's"]]
    for pair in advice.pairs:
        slots = str(pair.lookahead or "none")
        cells.append([str(pair.window), slots, _passes(pair), _time(pair), f"{pair.share:.0%}"])
    return aligned(cells, ">>>>>")


def sentence(advice: DecodeAdvice, *, tolerance: float) -> str:
    """Return the recommendation.

    Args:
        advice: Pairs of the windows within the tolerance, next-token included.
        tolerance: Accepted increase in bits relative to next-token's.
    """
    best, next_token = advice.fastest, advice.pairs[0]
    window = "next-token" if best.window == next_token.window else f"window {best.window}"
    ahead = f"with lookahead {best.lookahead}" if best.lookahead else "without lookahead"
    speed = f"{_passes(best)} passes, {_time(best)} ms per image"
    if best != next_token:
        speed += f"; next-token without lookahead: {_passes(next_token)} passes, {_time(next_token)} ms"
    return (
        f"Fastest within {tolerance:.2%} of next-token's bits at batch size {advice.batch_size:,}: "
        f"{window} {ahead} ({speed})."
    )


def _passes(pair: Pair) -> str:
    """Return passes per image, with their spread if images differ."""
    return f"{pair.passes:,.1f} ± {pair.passes_std:.1f}" if pair.passes_std else f"{pair.passes:,.0f}"


def _time(pair: Pair) -> str:
    return f"{pair.milliseconds:,.0f}" if pair.milliseconds >= 10 else f"{pair.milliseconds:.2g}"
