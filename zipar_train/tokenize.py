"""Images to shards of codes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zipar_train.files import make_folder
from zipar_train.sections import Recipe
from zipar_train.shards import Manifest, Sample, write_shards


def tokenize(recipe: Recipe, *, images: str, out: str | Path, progress: bool = True) -> dict[str, Manifest]:
    """Turn a set of images into shards for a recipe: `out`/train.json and `out`/val.json with their tar files.

    Args:
        images: `digits`, scikit-learn's handwritten digits (needs the `digits` extra).
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown source, or one that does not fit the recipe's model.
    """
    from tqdm import tqdm

    if images != "digits":
        raise ValueError(f"--images {images!r} is unknown: use 'digits'")
    if recipe.model.grid != [8, 8] or recipe.model.codes != 17 or recipe.model.classes != 10:
        raise ValueError(
            "--images digits are 8 x 8 grids of 17 grey levels in 10 classes: "
            f"the model section of recipe {recipe.name} says otherwise"
        )
    make_folder(Path(out))
    return {
        split: write_shards(
            tqdm(digits(split), desc=f"{split} images", unit=" images", disable=not progress),
            Path(out) / f"{split}.json",
            grid=(8, 8),
            codes=17,
            classes=10,
            source=f"scikit-learn digits, {split} split",
        )
        for split in ("train", "val")
    }


def digits(split: str) -> Iterator[Sample]:
    """scikit-learn's 1,797 digits: every fifth of a seeded shuffle of each class is held out as `val`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "scikit-learn holds the digits and is not installed: pip install 'zipar-train[digits]'"
        ) from error

    data = load_digits()
    held_out = np.zeros(len(data.target), dtype=bool)
    rng = np.random.default_rng(0)
    for label in range(10):
        held_out[rng.permutation(np.flatnonzero(data.target == label))[::5]] = True
    for i in np.flatnonzero(held_out == (split == "val")):
        yield Sample(f"digit{i:04d}", data.images[i].astype(np.uint16)[None], int(data.target[i]))
