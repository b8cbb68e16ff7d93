"""Shards: whole or absent; every sample once; position restored."""

import functools
import http.server
import json
import threading
from collections import Counter

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_shards import LAYOUT, number, samples, seen, written

from zipar_train.data import epoch as loading
from zipar_train.data.datamodule import ShardDataModule
from zipar_train.data.epoch_order import Share
from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, read_shard, same_classes, write_shards
from zipar_train.plan.grid import Grid


def test_what_is_written_is_plain_webdataset(tmp_path):
    path = written(tmp_path)
    manifest = read_manifest(path)
    assert [s.samples for s in manifest.shards] == [10, 10, 10, 10, 10, 3]
    urls = [str(tmp_path / s.name) for s in manifest.shards]
    rows = list(wds.WebDataset(urls, shardshuffle=False).decode())
    for row, sample in zip(rows, samples(53), strict=True):
        assert row["__key__"] == sample.key
        assert np.array_equal(row["codes.npy"], sample.codes)
        assert row["cls"] == sample.condition


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [1, 7, 1000])
def test_every_sample_once_an_epoch(tmp_path, shuffle, workers):
    """The last step of a shuffled epoch is filled up."""
    loader = ShardLoader(written(tmp_path), batch_size=8, shuffle=shuffle, workers=workers)
    first, second = seen(loader), seen(loader)
    assert set(first) == set(second) == set(range(53))
    assert (first == list(range(53))) == (shuffle == 1)
    assert (first == second) == (shuffle == 1)
    again = ShardLoader(loader.path, batch_size=8, shuffle=shuffle, workers=workers)
    assert seen(again) == first
    sizes = [len(batch.codes) for batch in again]
    assert sizes == [8] * 6 + [5 if shuffle == 1 else 8]
    assert len(again) == 7


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 8), (3, 4), (4, 7), (5, 53)])
def test_ranks_share_the_order_on_disk_in_even_batches(tmp_path, ranks, batch_size):
    path = written(tmp_path)
    loaders = [ShardLoader(path, batch_size=batch_size, share=Share(r, ranks)) for r in range(ranks)]
    per_rank = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in per_rank}) == 1 and all(len(b.codes) for bs in per_rank for b in bs)
    counts = Counter(number(c) for batches in per_rank for b in batches for c in b.codes)
    assert set(counts) == set(range(53))
    assert sum(counts.values()) - 53 < ranks
    if not any(count > 1 for count in counts.values()):
        assert [number(c) for step in zip(*per_rank, strict=True) for b in step for c in b.codes] == list(range(53))


@pytest.mark.slow
@given(
    count=st.integers(1, 60),
    per_shard=st.integers(1, 25),
    ranks=st.integers(1, 4),
    parts=st.integers(1, 3),
    batch_size=st.integers(1, 4),
    shuffle=st.integers(2, 40),
    seed=st.integers(0, 3),
)
@settings(max_examples=60)
def test_steps_are_the_same_for_any_number_of_ranks(
    tmp_path_factory, count, per_shard, ranks, parts, batch_size, shuffle, seed
):
    """What the ranks see of a step, in their order, is what one process sees of it: samples, labels and keys."""
    path = written(tmp_path_factory.mktemp("set"), count=count, per_shard=per_shard)
    step = ranks * parts * batch_size

    def steps(batch_size, ranks):
        parts, size = [], step // ranks
        for rank in range(ranks):
            loader = ShardLoader(
                path, batch_size=batch_size, step=step, shuffle=shuffle, seed=seed, share=Share(rank, ranks)
            )
            images = [(number(c), int(k), key) for batch in loader for c, k, key in zip(*batch[:3], strict=True)]
            parts.append([images[i : i + size] for i in range(0, len(images), size)])
        return [sum(together, []) for together in zip(*parts, strict=True)]

    one = steps(step, 1)
    assert steps(batch_size, ranks) == one
    assert len({len(s) for s in one}) == 1 and len(one) == -(-count // step)
    assert {n for s in one for n, _, _ in s} == set(range(count))
    assert all(key == f"train-{n // per_shard:06d}.tar/s{n:03d}" and label == n % 3 for s in one for n, label, key in s)


def test_loader_processes_change_nothing(tmp_path):
    path = written(tmp_path)
    alone, shared = (
        ShardLoader(path, batch_size=4, step=8, shuffle=20, workers=workers, share=Share(1, 2)) for workers in (0, 3)
    )
    assert seen(alone) == seen(shared)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_is_restored_in_mid_epoch(tmp_path, workers, monkeypatch):
    def loader():
        return ShardLoader(written(tmp_path), batch_size=4, step=8, shuffle=20, workers=workers, seed=4)

    whole = loader()
    reference = [seen(whole), seen(whole)]
    for stop in (1, 3, 6, 7):  # steps
        left = loader()
        stream = iter(left)
        for _ in range(2 * stop):
            next(stream)
        resumed = loader()
        resumed.load_state_dict(left.state_dict())
        tail = seen(resumed)
        assert tail == (reference[0][8 * stop :] if stop < 7 else reference[1])
        assert seen(resumed) == (reference[1] if stop < 7 else seen(whole))
        whole = loader()
        seen(whole), seen(whole)


def test_a_resumed_loader_reads_no_shard_that_it_has_passed(tmp_path, monkeypatch):
    path, read = written(tmp_path, count=120, per_shard=5), []
    monkeypatch.setattr(
        loading, "read_shard", lambda m, shard, *a, **k: read.append(shard.name) or read_shard(m, shard, *a, **k)
    )
    loader = ShardLoader(path, batch_size=5, shuffle=2)
    loader.load_state_dict({"epoch": 0, "steps": 23})
    assert len(seen(loader)) == 5
    assert len(read) <= 5 < 24  # each of the five lanes its last shard


def test_views_are_all_drawn_and_do_not_depend_on_ranks(tmp_path):
    path = written(tmp_path, views=3)

    def views(share):
        loader = ShardLoader(path, batch_size=60 // share.of, shuffle=9, share=share)
        return {number(c): tuple(c.tolist()) for batch in loader for c in batch.codes}

    one = views(Share())
    two = views(Share(0, 2)) | views(Share(1, 2))
    assert one == two
    truth = {
        number(s.codes[0].reshape(-1)): [tuple(v.reshape(-1).tolist()) for v in s.codes] for s in samples(53, views=3)
    }
    picked = [truth[n].index(view) for n, view in one.items()]
    assert set(picked) == {0, 1, 2}


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield from samples(7)
        raise RuntimeError("the encoder fell over")

    kwargs = {"layout": LAYOUT, "per_shard": 2}
    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path / "train.json", **kwargs)
    assert list(tmp_path.iterdir()) == []
    path = written(tmp_path, count=9, per_shard=2)
    with pytest.raises(RuntimeError):
        write_shards(broken(), path, **kwargs)
    assert seen(ShardLoader(path, batch_size=4)) == list(range(9))  # the set that was there is whole
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        write_shards(samples(3), blocked / "train.json", layout=LAYOUT)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a", np.full((1, 2, 3), 5, np.uint16), 0), "sample a: code 5 is outside a codebook of 5 codes"),
        (Sample("a", np.zeros((1, 3, 3), np.uint16), 0), "not (views, 2, 3)"),
        (Sample("a", np.zeros((1, 2, 3), np.float32), 0), "not integers"),
        (Sample("a", np.array([[[3, -1, 3]] * 2]), 0), "code -1 is outside a codebook"),
        (Sample("a", np.zeros((1, 2, 3), np.uint16), 3), "class 3 is outside 0 .. 2"),
    ],
)
def test_samples_that_do_not_fit_are_not_written(tmp_path, sample, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        write_shards([sample], tmp_path / "t.json", layout=LAYOUT)
    assert message in str(error.value)


def test_class_names_are_kept_and_compared(tmp_path):
    names = {"train": ("ant", "bee", "cow"), "val": ("bee", "ant", "cow"), "old": None}
    for name, known in names.items():
        layout = LAYOUT.model_copy(update={"class_names": known})
        write_shards(samples(5), tmp_path / f"{name}.json", layout=layout)
    train, val, old = (read_manifest(tmp_path / f"{name}.json") for name in names)
    assert train.class_names == ("ant", "bee", "cow") and old.class_names is None
    assert len({train.checksum, val.checksum, old.checksum}) == 3
    same_classes("a", "b", (train, old))
    with pytest.raises(ValueError, match="a and b number their classes differently: class 0 is 'ant' in one and 'bee'"):
        same_classes("a", "b", (train, val))
    with pytest.raises(ValueError, match=r"train\.json and .*val\.json number their classes differently"):
        ShardDataModule(tmp_path / "train.json", tmp_path / "val.json", batch_size=2)
    content = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**content, "class_names": ["ant", "ant", "cow"]}))
    with pytest.raises(ValueError, match="class_names holds 2 names for 3 classes"):
        read_manifest(tmp_path / "train.json")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"grids": [Grid(3, 2)]}, "grid 2x3, but the recipe's model has 3x2"),
        ({"codes": 17}, "codebook of 5, but the recipe's model has 17"),
        ({"classes": 10}, "number of classes 3, but the recipe's model has 10"),
    ],
)
def test_shards_of_another_model_are_refused(tmp_path, expected, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        read_manifest(written(tmp_path), **expected)
    assert message in str(error.value)


@pytest.fixture
def served(tmp_path):
    """A folder behind http://localhost."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_behind_a_url_are_the_same(tmp_path, served, workers):
    local = ShardLoader(written(tmp_path), batch_size=8, shuffle=20)
    remote = ShardLoader(f"{served}/train.json", batch_size=8, shuffle=20, workers=workers)
    assert seen(remote) == seen(local)
    (tmp_path / "train-000003.tar").unlink()
    with pytest.raises(ValueError, match="train-000003.tar cannot be read: "):
        seen(remote)
    with pytest.raises(ValueError, match="no shards at .*/gone.json"):
        ShardLoader(f"{served}/gone.json", batch_size=8)


def test_captions_and_features_come_as_they_went(tmp_path):
    layout = Layout(source="test", grid=(2, 3), codes=5)
    features = [np.random.default_rng(i).normal(size=(i + 1, 4)).astype(np.float16) for i in range(5)]
    for name, kept in (("with", features), ("without", [None] * 5)):
        samples = [Sample(f"s{i}", np.full((1, 2, 3), i), f"caption {i} é", kept[i]) for i in range(5)]
        write_shards(samples, tmp_path / f"{name}.json", layout=layout)
    batches = list(ShardLoader(tmp_path / "without.json", batch_size=3))
    assert [c for batch in batches for c in batch.condition] == [f"caption {i} é" for i in range(5)]
    batches = list(ShardLoader(tmp_path / "with.json", batch_size=3, workers=2))
    found = {int(codes[0]): c for batch in batches for codes, c in zip(batch.codes, batch.condition, strict=True)}
    assert all(np.array_equal(found[i].numpy(), features[i]) for i in range(5))
    with pytest.raises(ValueError, match="number of classes none, but captions, but the recipe's model has 3"):
        read_manifest(tmp_path / "with.json", classes=3)
    with pytest.raises(ValueError, match="number of classes 3, but the recipe's model has none, but captions"):
        read_manifest(written(tmp_path), captions=True)
    with pytest.raises(ValueError, match="sample blank: an empty caption"):
        write_shards([Sample("blank", np.zeros((1, 2, 3), np.uint16), " ")], tmp_path / "blank.json", layout=layout)
