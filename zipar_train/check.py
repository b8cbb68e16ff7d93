"""Every sample of a shard set read: what is there, and everything that is wrong with it."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zipar_train.shards import Manifest, Shard, read_manifest, read_shard


class Contents(NamedTuple):
    """What a shard set was found to hold, and everything wrong with it."""

    manifest: Manifest
    samples: int
    views: int  # of all samples together
    per_class: dict[int, int]  # images of each class seen; empty: captions
    features: int  # samples with caption features
    codes_used: int  # of the codebook
    problems: list[str]


def check_shards(path: str | Path, *, progress: Callable[[Iterable[Shard]], Iterable[Shard]] = iter) -> Contents:
    """Read every sample of a shard set, damaged shards included as far as they go.

    Raises:
        ValueError: if there is no readable manifest.
    """
    manifest = read_manifest(path)
    samples = views = features = 0
    keys: Counter[str] = Counter()
    per_class: Counter[int] = Counter()
    used, problems = np.zeros(manifest.codes, dtype=bool), []
    for shard in progress(manifest.shards):
        try:
            for sample in read_shard(path, shard, manifest):
                samples += 1
                views += len(sample.codes)
                features += sample.features is not None
                keys[sample.key] += 1
                used[sample.codes] = True
                if isinstance(sample.condition, int):
                    per_class[sample.condition] += 1
        except ValueError as error:
            problems.append(str(error))
    if doubled := [key for key, count in keys.items() if count > 1]:
        problems.append(
            f"{path}: {len(doubled)} keys occur more than once, {doubled[0]} for one. Make the shards again"
        )
    if manifest.classes and not problems and (absent := manifest.classes - len(per_class)):
        problems.append(f"{path}: {absent} of {manifest.classes} classes have no image")
    return Contents(manifest, samples, views, dict(per_class), features, int(used.sum()), problems)
