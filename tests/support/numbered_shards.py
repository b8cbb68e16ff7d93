"""Shards of few codes, in which each sample carries its number."""

import numpy as np

from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import write_shards

LAYOUT = Layout(source="test", grid=(2, 3), codes=5, classes=3)


def samples(count, *, views=1, classes=3):
    rng = np.random.default_rng(0)
    for i in range(count):
        codes = rng.integers(5, size=(views, 2, 3)).astype(np.uint16)
        codes[:, 0, :] = [[i % 5, i // 5 % 5, i // 25]] * views
        yield Sample(f"s{i:03d}", codes, i % classes)


def written(tmp_path, count=53, per_shard=10, **kwargs):
    path = tmp_path / "train.json"
    write_shards(samples(count, **kwargs), path, layout=LAYOUT, per_shard=per_shard)
    return path


def number(codes):
    return int(codes[0] + 5 * codes[1] + 25 * codes[2])


def seen(loader):
    return [number(codes) for batch in loader for codes in batch.codes]
