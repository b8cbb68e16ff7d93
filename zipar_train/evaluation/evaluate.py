"""Checkpoints against windows: draw, score, time, and keep the evidence."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.decoding.generator import Generator
from zipar_train.environment import environment
from zipar_train.evaluation.classifier import pixels_of, register, trained
from zipar_train.evaluation.metrics import bits_per_code, fidelity, milliseconds
from zipar_train.files import make_folder, sha256
from zipar_train.loader import ShardLoader
from zipar_train.models.weights import read
from zipar_train.sections import Recipe
from zipar_train.shards import read_manifest


class Score(BaseModel):
    """Mean and standard deviation over seeds."""

    mean: float
    std: float


class Row(BaseModel):
    """One checkpoint at one window."""

    checkpoint: str
    window: int
    passes: int
    reduction: float  # share of next-token's passes saved
    width: int  # most slots a pass
    bits: float  # a code, on held-out images under this window's mask; exact
    window_costs: float  # share of bits more than this checkpoint's own next-token bits
    gap_closed: float | None  # of bits, see Report
    milliseconds: float  # an image, drawn alone
    fid: Score
    kid: Score
    precision: Score
    recall: Score
    agreement: Score  # share of drawn images that the classifier names as their label


class Report(BaseModel):
    """Every row with what it takes to believe and repeat it.

    `gap_closed` of a checkpoint and window: of the bits that the first compared checkpoint loses at that window
    against its own next-token bits, the share this checkpoint does not lose. None where nothing (below 0.5 %) is lost.
    """

    rows: list[Row]
    baseline: str | None
    features: str
    features_accuracy: float
    images: int
    seeds: list[int]
    reference: str
    reference_images: int
    checkpoints: dict[str, str]  # name: path and hash
    recipe: dict[str, Any]
    environment: dict[str, str]

    def row(self, checkpoint: str, window: int) -> Row:
        return next(row for row in self.rows if (row.checkpoint, row.window) == (checkpoint, window))


Samples = dict[tuple[str, int], Tensor]  # for the report's sheet, by checkpoint and window: uint8 (B, 3, px, px)


def evaluate(
    recipe: Recipe,
    checkpoint: str | Path,
    *,
    compare: Sequence[str | Path] = (),
    windows: Sequence[int] | None = None,
    out: str | Path,
    progress: bool = True,
) -> tuple[Report, Samples]:
    """Score a checkpoint, and others beside it, at several windows.

    Args:
        checkpoint, compare: run folders, checkpoints or exports of this recipe's model; the first compared one is the
            baseline that `gap_closed` speaks of.
        windows: None: the recipe's.
        out: a folder; the classifier is kept there.

    Raises:
        ValueError: for a window, checkpoint or shard set that does not fit.
    """
    model, settings = recipe.model, recipe.evaluate
    if model.classes is None:
        raise ValueError(f"recipe {recipe.name} is prompted by captions: there is no score for those yet")
    widest = model.raster.row_length
    wanted = sorted({*(windows or settings.windows), widest}, reverse=True)
    if wrong := [w for w in wanted if not 1 <= w <= widest]:
        raise ValueError(f"window {wrong[0]} does not fit a row of {widest} codes: use 1 .. {widest}")
    reference = recipe.data.val
    _, manifest = (
        read_manifest(path, grid=model.raster, codes=model.codes, classes=model.classes)
        for path in (recipe.data.train, reference)
    )
    height, width = model.grid
    stride = {"vq16": 16, "palette": 1, None: 0}[model.tokenizer]
    if manifest.samples * height * width * stride**2 * 3 > 2**31:
        raise ValueError(
            f"{reference}: {manifest.samples:,} held-out images of {width * stride} px are too many for the small "
            "classifier that scores them. Scores of that size need Inception features, which are not here yet"
        )
    generators: dict[str, Generator] = {}
    origins: dict[str, str] = {}
    for path in [*compare, checkpoint]:
        saved = read(path)
        name = _name(saved.path, saved.recipe or recipe, generators)
        generators[name] = Generator(recipe, saved)
        weights = saved.path if saved.path.is_file() else next(saved.path.glob("*model.safetensors"))
        origins[name] = f"{weights}, sha256 {sha256(weights)[:8]}"
    tokenizer = next(iter(generators.values())).drawing.tokenizer
    if tokenizer is None:
        raise ValueError(f"recipe {recipe.name} has no model.tokenizer: images cannot be scored without pixels")

    def held_out() -> ShardLoader:
        return ShardLoader(reference, batch_size=settings.batch_size)

    make_folder(Path(out))
    classifier = trained(
        Path(out) / "classifier.safetensors", ShardLoader(recipe.data.train, batch_size=32, shuffle=10000), tokenizer
    )
    features = register(classifier)
    real = torch.cat([pixels for pixels, _ in pixels_of(held_out(), tokenizer, manifest.grid)])
    labels = [k % model.classes for k in range(settings.images)]

    times = milliseconds(generators, wanted)
    rows: list[Row] = []
    samples: Samples = {}
    bar = tqdm(total=len(generators) * len(wanted) * len(settings.seeds), desc="evaluate", disable=not progress,
               mininterval=0.1 if sys.stderr.isatty() else 20)  # fmt: skip
    baseline = next(iter(generators)) if compare else None
    bits: dict[tuple[str, int], float] = {}
    for name, generator in generators.items():
        for window in wanted:
            plan = generator.plan(window)
            bits[name, window] = bits_per_code(generator, plan, held_out())
            scores: dict[str, list[float]] = {}
            for seed in settings.seeds:
                bar.set_postfix_str(f"{name}, window {window}, seed {seed}")
                drawn = generator.draw(labels, window=window, seed=seed).pixels
                assert drawn is not None
                agrees = classifier.accuracy(iter([(drawn, torch.tensor(labels))]))
                for key, value in (fidelity(drawn, real, features=features) | {"agreement": agrees}).items():
                    scores.setdefault(key, []).append(value)
                samples.setdefault((name, window), drawn[:10])
                bar.update()
            rows.append(
                Row(
                    checkpoint=name,
                    window=window,
                    passes=plan.passes,
                    reduction=plan.reduction,
                    width=plan.width,
                    bits=bits[name, window],
                    window_costs=bits[name, window] / bits[name, widest] - 1,
                    gap_closed=_closed(bits, baseline, name, window, widest),
                    milliseconds=times[name, window],
                    **{key: _score(values) for key, values in scores.items()},
                )
            )
    bar.close()
    device = next(iter(generators.values())).device
    report = Report(
        rows=rows,
        baseline=baseline,
        features=features,
        features_accuracy=classifier.accuracy(pixels_of(held_out(), tokenizer, manifest.grid)),
        images=settings.images,
        seeds=settings.seeds,
        reference=f"{manifest.source} ({Path(reference).name}, {manifest.checksum[:8]})",
        reference_images=manifest.samples,
        checkpoints=origins,
        recipe=recipe.model_dump(),
        environment=environment(device),
    )
    return report, samples


def _name(path: Path, recipe: Recipe, taken: dict[str, Any]) -> str:
    """A checkpoint's name in the report: its run folder's, made unique."""
    name = path.parent.parent.name if path.suffix == ".ckpt" else path.stem
    name = name or recipe.name
    return name if name not in taken else f"{name}-{len(taken) + 1}"


def _closed(bits: dict[tuple[str, int], float], base: str | None, name: str, window: int, widest: int) -> float | None:
    if base is None or name == base:
        return None
    gap = bits[base, window] - bits[base, widest]
    return 1 - (bits[name, window] - bits[base, widest]) / gap if gap > 0.005 * bits[base, widest] else None


def _score(values: list[float]) -> Score:
    return Score(mean=mean(values), std=stdev(values) if len(values) > 1 else 0.0)
