"""Search for the best guidance scale of a checkpoint, by scores of few images at several scales and windows."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel

from zipar_train.evaluation.candidates import candidates, check_captions, conditions, sample_set, windows_of
from zipar_train.evaluation.scorer import build_scorer
from zipar_train.evaluation.scores.scores import Score
from zipar_train.io.files import make_folder
from zipar_train.io.tables import aligned
from zipar_train.recipe.schema import Recipe
from zipar_train.run.ranks import process


class Tried(BaseModel):
    guidance: float
    window: int
    score: Score


class Search(BaseModel):
    """Scores of every scale at every window, and the scale with the best mean over windows."""

    checkpoint: str
    score: str  # fid (lower is better), or clip
    images: int
    tried: list[Tried]
    best: float


def search_guidance(
    recipe: Recipe,
    checkpoint: str | Path,
    scales: Sequence[float],
    *,
    windows: Sequence[int] | None = None,
    images: int,
    out: str | Path,
    int8: bool = False,
    progress: bool = True,
) -> Search | None:
    """Score the first `images` images of the first seed at each guidance scale; the recipe is not changed.

    Returns:
        The scores; None in processes that only generate.

    Raises:
        ValueError: If a scale is outside 0 .. 100, or as in `evaluate`.
    """
    if wrong := [scale for scale in scales if not 0 <= scale <= 100]:
        raise ValueError(f"--search-guidance: {wrong[0]:g} is not a guidance scale: use 0 .. 100")
    scales, out = sorted(set(scales)), Path(out)
    make_folder(out)
    rank, world, device = process()
    (candidate,) = candidates(recipe, [checkpoint], device=device, int8=int8)
    wanted = windows_of(recipe, windows)
    scorer = build_scorer(recipe, candidate, out=out, device=device) if rank == 0 else None
    sample_sets = []
    check_captions(recipe, conditions(recipe, images=images, seed=recipe.evaluate.seeds[0])[0])
    for scale in scales:
        sampling = recipe.sampling.model_copy(update={"guidance": float(scale)})
        for window in wanted:
            samples = sample_set(
                recipe, candidate, window, recipe.evaluate.seeds[0], out=out, sampling=sampling, images=images
            )
            samples.make(rank=rank, world=world, progress=progress, words=f"guidance {scale:g}, window {window}")
            sample_sets.append((float(scale), window, samples))
    if scorer is None:
        return None
    score, tried = "fid" if scorer.reference else "clip", []
    for guidance, window, samples in sample_sets:
        samples.wait()
        found = scorer.scores(samples, f"scoring guidance {guidance:g}, window {window}")
        tried.append(Tried(guidance=guidance, window=window, score=found[score]))
    sign = 1 if score == "fid" else -1
    means = {s: sign * fmean(t.score.mean for t in tried if t.guidance == s) for s in dict.fromkeys(map(float, scales))}
    best = min(means, key=means.__getitem__)
    return Search(checkpoint=candidate.name, score=score, images=images, tried=tried, best=best)


def lines(search: Search) -> list[str]:
    """Return the lines of a table, with a row per scale and a column per window, and the best setting."""
    windows = list(dict.fromkeys(t.window for t in search.tried))
    name = "Frechet distance" if search.score == "fid" else "CLIP score"
    cells = [["guidance", *(f"window {w}" for w in windows), "mean"]]
    for scale in dict.fromkeys(t.guidance for t in search.tried):
        row = [t.score for t in search.tried if t.guidance == scale]
        scores = [f"{s.mean:.3f} ± {s.std or 0:.3f}" for s in row]
        cells.append([f"{scale:g}", *scores, f"{fmean(s.mean for s in row):.3f}"])
    said = f"{search.checkpoint}: {name} from {search.images:,} images, by guidance and window"
    return [said, "", *aligned(cells), "", f"Best over these windows: --set sampling.guidance={search.best:g}"]
