"""Shards and arrays byte by byte, for tests that spoil them; and a shard set read in every way there is."""

import hashlib
import io
import json
import struct
import tarfile

import numpy as np
from fuzzing import in_time

from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.validate import check_shards

CLASSES = Layout(source="test", grid=(2, 3), codes=5, classes=3)
CAPTIONS = Layout(source="test", grid=(2, 3), codes=5, features=True)


def samples(layout):
    for i in range(4):
        codes = np.full((2, 2, 3), i, np.uint16)
        if layout.classes:
            yield Sample(f"s{i}", codes, i % 3)
        else:
            yield Sample(f"s{i}", codes, f"caption {i} é", np.full((i + 1, 4), 0.5, np.float16))


def listed(path, data):
    """Put a shard in the first one's place, with its checksum in the manifest."""
    (path.parent / "train-000000.tar").write_bytes(data)
    content = json.loads(path.read_text())
    content["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(content))


def looked_at(path, layout):
    """A shard set read in every way there is."""
    with in_time():
        manifest = read_manifest(path)
        for shard in manifest.shards:
            try:
                found = list(read_shard(path, shard, manifest))
            except ValueError as error:
                assert shard.name in str(error) and len(str(error)) < 5000  # noqa: PT017 - either will do
                continue
            assert len(found) == shard.samples
            for sample in found:
                codes = sample.codes
                assert codes.shape[1:] == layout.grid and codes.dtype.kind in "ui"
                assert (codes >= 0).all() and (codes < layout.codes).all()
                good = sample.condition in range(3) if layout.classes else isinstance(sample.condition, str)
                assert good and (sample.features is None or np.isfinite(sample.features).all())
        contents = check_shards(path)
        for damaged in ("stop", "skip"):
            loader = ShardLoader(path, batch_size=3, shuffle=4, damaged=damaged)
            try:
                batches = list(loader)
            except ValueError as error:
                none = damaged == "skip" and "none of its shards" in str(error)
                assert contents.problems and (none or (damaged == "stop" and ".tar" in str(error)))  # noqa: PT017
            else:
                assert sum(len(batch.codes) for batch in batches) == -(-manifest.samples // 3) * 3  # the last filled up
                assert contents.problems or not loader.damaged


def npy(header, body=b"\0" * 12, *, magic=b"\x93NUMPY\x01\x00"):
    text = header.encode() if isinstance(header, str) else header
    return magic + struct.pack("<H", len(text)) + text + body


def described(shape, *, kind="<u2", order=False):
    return f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


GOOD = npy(described((1, 2, 3)))


def tar(*members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def summed(head):
    """A tar's header with its checksum."""
    head = head[:148] + b" " * 8 + head[156:512]
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]
