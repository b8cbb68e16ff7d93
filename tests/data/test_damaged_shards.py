"""Damaged shards: the shard, the sample or the manifest is named."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from numbered_shards import seen, written

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest


def damage(kind, path):
    shard = path.parent / json.loads(path.read_text())["shards"][2]["name"]
    data = bytearray(shard.read_bytes())
    if kind == "missing":
        shard.unlink()
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif kind == "one bit":
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    return shard


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "one bit"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named(tmp_path, kind, workers):
    path = written(tmp_path)
    shard = damage(kind, path)
    with pytest.raises(ValueError, match="train-000002.tar") as error:
        seen(ShardLoader(path, batch_size=8, workers=workers))
    assert str(shard) in str(error.value)
    assert "copy or make it again" in str(error.value).lower()


def retar(path, index, members):
    """Replace a shard by other members and mend its checksum: damage that only its content shows."""
    content = json.loads(path.read_text())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = content["shards"][index]
    (path.parent / shard["name"]).write_bytes(buffer.getvalue())
    shard["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    path.write_text(json.dumps(content))


def npy(array, **kwargs):
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()


GOOD = npy(np.zeros((1, 2, 3), np.uint16))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.codes.npy", GOOD)], "sample k: not readable"),
        ([("k.codes.npy", b"nothing"), ("k.cls", b"0")], "sample k: not readable"),
        ([("k.codes.npy", GOOD), ("k.cls", b"cat")], "sample k: not readable"),
        (
            [("k.codes.npy", npy(np.full((1, 2, 3), 9, np.uint16))), ("k.cls", b"0")],
            "code 9 is outside a codebook of 5",
        ),
        ([("k.codes.npy", npy(np.zeros((1, 4, 4), np.uint16))), ("k.cls", b"0")], "codes of shape (1, 4, 4)"),
        ([("k.codes.npy", npy(np.array([{}]), allow_pickle=True)), ("k.cls", b"0")], "sample k: not readable"),
    ],
)
def test_a_damaged_sample_is_named(tmp_path, members, message):
    path = written(tmp_path)
    retar(path, 1, members)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        seen(ShardLoader(path, batch_size=8))
    assert message in str(error.value)
    assert "train-000001.tar" in str(error.value)


@pytest.mark.parametrize("how", ["a header", "joined"])
def test_a_tar_that_is_damaged_inside_is_named(tmp_path, how):
    """Its checksum may be right: the damage came before."""
    path = written(tmp_path)
    shard = tmp_path / "train-000001.tar"
    data = shard.read_bytes()
    at = data.index(b"s014.codes.npy")
    spoilt = data + data if how == "joined" else data[:at] + b"\xff" * 99 + data[at + 99 :]
    shard.write_bytes(spoilt)
    content = json.loads(path.read_text())
    content["shards"][1]["sha256"] = hashlib.sha256(spoilt).hexdigest()
    content["shards"][1]["samples"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train-000001\.tar is not a readable tar file .*it is damaged"):
        seen(ShardLoader(path, batch_size=8))


def test_manifests_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no shards at .*gone.json: make them with `zipar-train tokenize`"):
        read_manifest(tmp_path / "gone.json")
    path = written(tmp_path)
    content = json.loads(path.read_text())
    for text, message in (
        ("{", "is not a manifest"),
        (json.dumps({**content, "shards": []}), "lists no samples"),
        (json.dumps({**content, "extra": 1}), "is not a manifest"),
        (
            json.dumps({**content, "shards": [{**content["shards"][0], "name": "../../etc/passwd"}]}),
            "lie beside their manifest",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(path)
