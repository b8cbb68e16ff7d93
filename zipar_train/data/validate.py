"""Validation of a shard set: reads every sample, and reports statistics and all problems."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zipar_train.data.labels import listed
from zipar_train.data.manifest import Manifest, Shard
from zipar_train.data.shards import Misfit, read_manifest, read_shard
from zipar_train.models.family import fits
from zipar_train.recipe.model import Model


class ShardReport(NamedTuple):
    """Statistics of a shard set, and all problems found in it."""

    manifest: Manifest
    samples: int
    views: int  # views of all samples together
    per_class: dict[int, int]  # images per class, of classes that occur; empty for captions
    features: int  # samples with caption features
    codes_used: int  # codes of the codebook that occur
    problems: list[str]


def check_shards(
    path: str | Path,
    *,
    progress: Callable[[Iterable[Shard]], Iterable[Shard]] = iter,
    misfit: Misfit | None = None,
) -> ShardReport:
    """Read and check every sample of a shard set; damaged shards are read as far as possible.

    Args:
        progress: Wraps the shards to read, for example in a progress bar.
        misfit: See `read_shard`.

    Raises:
        ValueError: If there is no readable manifest.
    """
    manifest = read_manifest(path)
    samples = views = features = 0
    keys: Counter[str] = Counter()
    per_class: Counter[int] = Counter()
    used = np.zeros(manifest.codes, dtype=bool)
    problems: list[str] = []
    for shard in progress(manifest.shards):
        bad: list[ValueError] = []
        try:
            for sample in read_shard(path, shard, manifest, bad=bad, misfit=misfit):
                samples += 1
                views += len(sample.codes)
                features += sample.features is not None
                keys[sample.key] += 1
                used[sample.codes] = True
                if isinstance(sample.condition, int):
                    per_class[sample.condition] += 1
        except ValueError as error:
            bad.append(error)
        problems += map(str, bad)
    if doubled := [key for key, count in keys.items() if count > 1]:
        problems.append(
            f"{path}: {len(doubled)} keys occur more than once, {doubled[0]} for one. Make the shards again"
        )
    if manifest.classes and not problems and (absent := manifest.classes - len(per_class)):
        names = manifest.class_names or [str(number) for number in range(manifest.classes)]
        some = listed([name for number, name in enumerate(names) if number not in per_class])
        problems.append(f"{path}: {absent} of {manifest.classes} classes have no image: {some}")
    return ShardReport(manifest, samples, views, dict(per_class), features, int(used.sum()), problems)


def check_captions(model: Model, manifests: Mapping[str, Manifest]) -> None:
    """Check that all captions of shard sets fit the model's prompt.

    Sets that `tokenize` has already checked against the same prompt are not read again.

    Args:
        manifests: Manifests by path.

    Raises:
        ValueError: If captions do not fit; names the first such sample, and their number.
    """
    fitting = fits(model)
    if fitting is None or fitting.fingerprint is None:
        return
    for path, manifest in manifests.items():
        if manifest.prompt == fitting.fingerprint:
            continue
        bad: list[ValueError] = []
        for shard in manifest.shards:
            for _ in read_shard(path, shard, manifest, bad=bad, misfit=fitting.misfit):
                pass
        if bad:
            more = f" ({len(bad):,} samples of {manifest.samples:,} are damaged or do not fit)" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0]}{more}; or leave such samples out with --set data.on_bad_sample=skip")
