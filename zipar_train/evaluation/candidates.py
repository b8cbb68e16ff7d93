"""Candidates of an evaluation: named checkpoints as generators, and their sample sets as the recipe specifies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zipar_train.decoding.generator import DecodeMode, Generator
from zipar_train.evaluation.captions import captions_of
from zipar_train.evaluation.sample_set import SampleSet, classes_of
from zipar_train.models.family import fits
from zipar_train.models.restore import LoadedWeights, read
from zipar_train.recipe.fields import scaled
from zipar_train.recipe.model import Model
from zipar_train.recipe.schema import Recipe, SamplingParams


@dataclass(frozen=True)
class Candidate:
    name: str  # name of its run folder, made unique
    generator: Generator
    weights: str  # SHA-256 of the weights' file
    origin: str  # readable path and checksum


def candidates(
    recipe: Recipe, paths: Sequence[str | Path], *, device: torch.device, int8: bool = False
) -> list[Candidate]:
    """Load run folders, checkpoints or exports as generators of the recipe's model, with unique names.

    Raises:
        ValueError: If a checkpoint cannot be read, or belongs to another model.
    """
    dtype = getattr(torch, recipe.evaluate.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    found: list[Candidate] = []
    for path in paths:
        saved = read(path, checksum=True)
        name = saved.path.parent.parent.name if saved.path.suffix == ".ckpt" else saved.path.stem
        name = name or (saved.recipe or recipe).name
        if name in {candidate.name for candidate in found}:
            name = f"{name}-{len(found) + 1}"
        weights, file = _checksum(saved)
        generator = Generator(recipe, saved, device=device, dtype=dtype, int8=int8)
        found.append(Candidate(name, generator, weights, f"{file}, sha256 {weights[:8]}"))
    return found


def _checksum(saved: LoadedWeights) -> tuple[str, Path]:
    """Return the SHA-256 of the bytes that the weights were read from, and their file or folder."""
    assert saved.sha256 is not None
    names = ("model.safetensors", "adapter_model.safetensors")
    return saved.sha256, next((saved.path / name for name in names if (saved.path / name).is_file()), saved.path)


def expected(model: Model) -> dict[str, Any]:
    """Return the arguments of `read_manifest` that check shards against a recipe's model."""
    return {
        "grids": model.rasters,
        "codes": model.codebook_size,
        "classes": model.num_classes,
        "captions": model.captions,
    }


def scored(recipe: Recipe) -> tuple[int, int] | None:
    """Return the height and width in pixels that images are resized to before scoring, or None for no resizing."""
    return scaled(recipe.model.grid, recipe.evaluate.resize_to) if recipe.evaluate.resize_to else None


def windows_of(recipe: Recipe, windows: Sequence[int] | None) -> list[int]:
    """Return the given windows, by default the recipe's, and next-token, widest first.

    Raises:
        ValueError: If a window does not fit the grid.
    """
    widest = recipe.model.raster.row_length
    wanted = sorted({*(windows or recipe.evaluate.windows), widest}, reverse=True)
    if wrong := [w for w in wanted if not 1 <= w <= widest]:
        raise ValueError(f"window {wrong[0]} does not fit a row of {widest} codes: use 1 .. {widest}")
    return wanted


def conditions(recipe: Recipe, *, images: int, seed: int) -> tuple[list[Any], str]:
    """Return a class or caption for each image, and a description of their source.

    Raises:
        ValueError: If the recipe's source has no captions.
    """
    if recipe.model.num_classes is not None:
        balanced = recipe.evaluate.classes == "balanced"
        words = "classes in turn" if balanced else "random classes"
        return classes_of(images, recipe.model.num_classes, seed=seed, balanced=balanced), words
    captions, words = captions_of(recipe.evaluate.captions or recipe.data.val)
    return [captions[k % len(captions)] for k in range(images)], words


def check_captions(recipe: Recipe, wanted: Iterable[Any]) -> None:
    """Check that captions fit the model's prompt, before any image is generated.

    Raises:
        ValueError: If a caption does not fit; names the first one.
    """
    fitting = fits(recipe.model)
    if fitting is None or fitting.fingerprint is None:
        return
    source = recipe.evaluate.captions or recipe.data.val
    for text in dict.fromkeys(wanted):
        if reason := fitting.misfit(text):
            raise ValueError(f"evaluate.captions = {source}: {reason}")


def sample_set(
    recipe: Recipe,
    candidate: Candidate,
    window: int,
    seed: int,
    *,
    out: Path,
    mode: DecodeMode = "planned",
    sampling: SamplingParams | None = None,
    images: int | None = None,
) -> SampleSet:
    """Return the sample set of a candidate by the recipe, optionally with another `sampling` or number of images."""
    settings = recipe.evaluate
    wanted, origin = conditions(recipe, images=images or settings.images, seed=seed)
    return SampleSet(
        root=out / "samples",
        generator=candidate.generator,
        weights=candidate.weights,
        conditions=wanted,
        origin=origin,
        window=window,
        seed=seed,
        batch_size=settings.batch_size,
        sampling=sampling or recipe.sampling,
        mode=mode,
        size=scored(recipe),
    )
