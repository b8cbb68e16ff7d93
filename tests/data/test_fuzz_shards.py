"""Spoilt shards and manifests: one message that names them, or samples that are what they should be."""

import json

import pytest
from fuzzing import examples, in_time, plain, spoilt_bytes, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from shard_bytes import CAPTIONS, CLASSES, listed, looked_at, samples, summed

from zipar_train.data.shards import read_manifest, write_shards


@pytest.fixture(scope="module", params=[CLASSES, CAPTIONS], ids=["classes", "captions"])
def sets(request, tmp_path_factory):
    """A shard set of two shards: its manifest, and the bytes of its first shard."""
    path = tmp_path_factory.mktemp("set") / "train.json"
    write_shards(samples(request.param), path, layout=request.param, per_shard=2)
    return path, (path.parent / "train-000000.tar").read_bytes(), request.param


@pytest.mark.slow
@examples(150)
@given(data=st.data())
def test_shards_with_spoilt_bytes(sets, data):
    path, whole, layout = sets
    listed(path, data.draw(spoilt_bytes([whole])))
    looked_at(path, layout)


FIELDS = [
    b"0",
    b"1",
    b"2",
    b"5",
    b"7",
    b"L",
    b"K",
    b"S",
    b"g",
    b"x",
    b"-1",
    b"\0",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
]


@pytest.mark.slow
@examples(150)
@given(data=st.data())
def test_tars_with_spoilt_headers(sets, data):
    path, whole, layout = sets
    blocks = [whole[at : at + 512] for at in range(0, len(whole), 512)]
    heads = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(data.draw(st.integers(1, 3))):
        number, at = data.draw(st.sampled_from(heads)), data.draw(st.sampled_from([0, 2, 100, 124, 156, 257, 345]))
        field = data.draw(st.sampled_from(FIELDS) | st.binary(min_size=1, max_size=12))
        head = blocks[number]
        blocks[number] = summed((head[:at] + field + head[at + len(field) :])[:512])
    listed(path, b"".join(blocks))
    looked_at(path, layout)


@pytest.mark.slow
@examples(200)
@given(data=st.data())
def test_manifests_with_spoilt_values(sets, data):
    path, _, layout = sets
    whole = path.read_bytes()
    spoilt = data.draw(
        spoilt_values([json.loads(whole)]).map(lambda value: json.dumps(plain(value)).encode()) | spoilt_bytes([whole])
    )
    other = path.with_name("spoilt.json")
    other.write_bytes(spoilt)
    try:
        with in_time():
            manifest = read_manifest(other)
    except ValueError as error:
        assert path.parent.name in str(error) and len(str(error)) < 5000  # noqa: PT017 - either will do
        return
    assert 1 <= manifest.codes <= 65536 and all(1 <= side <= 1024 for side in manifest.grid)
    assert manifest.classes is None or 1 <= manifest.classes <= 2**20
    looked_at(other, layout)
