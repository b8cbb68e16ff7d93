"""Arrays, tars and captions that say what is not so: one message that names the shard, or samples as they should be."""

import io
import struct
import tarfile

import numpy as np
import pytest
from shard_bytes import CAPTIONS, CLASSES, GOOD, described, listed, looked_at, npy, samples, summed, tar

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import write_shards
from zipar_train.data.validate import check_shards


def zipped():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((1, 2, 3), np.uint16))
    return buffer.getvalue()


ARRAYS = {
    "good": GOOD,
    "good by columns": npy(described((1, 2, 3), order=True)),
    "good, of another end": npy(described((1, 2, 3), kind=">u2")),
    "huge": npy(described((10**6, 10**6, 10**6))),
    "huge with nothing": npy(described((0, 10**18, 10**18))),
    "overflowing": npy(described((2**32, 2**32))),
    "negative": npy(described((-1, 2, 3))),
    "no views": npy(described((0, 2, 3)), b""),
    "no shape": npy(described(())),
    "a shape of words": npy(described("('a',)")),
    "truths": npy(described((True, 2, 3))),
    "cut": GOOD[:-1],
    "longer": GOOD + b"\0",
    "objects": npy(described((1, 2, 3), kind="|O")),
    "times": npy(described((1, 2, 3), kind="<m8[s]"), b"\0" * 48),
    "bools": npy(described((1, 2, 3), kind="|b1"), b"\0" * 6),
    "reals": npy(described((1, 2, 3), kind="<f4"), b"\0" * 24),
    "nothing wide": npy(described((1, 2, 3), kind="|V0")),
    "very wide": npy(described((1, 2, 3), kind="|V1000000000000")),
    "structured": npy("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (1, 2, 3), }\n"),
    "nested": npy("(" * 5000),
    "signs": npy("-" * 9000),
    "unclosed": npy("{'descr': '''"),
    "indented": npy("  {\n x\n"),
    "code": npy("__import__('os').system('true')"),
    "no length": b"\x93NUMPY\x01\x00",
    "version 3": b"\x93NUMPY\x03\x00" + GOOD[8:],
    "version 255": b"\x93NUMPY\xff\xff" + GOOD[8:],
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "zip": zipped(),
    "empty": b"",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_lie(tmp_path, name):
    path = tmp_path / "train.json"
    write_shards(samples(CLASSES), path, layout=CLASSES, per_shard=2)
    listed(path, tar(("a.codes.npy", ARRAYS[name]), ("a.cls", b"1"), ("b.codes.npy", GOOD), ("b.cls", b"2")))
    looked_at(path, CLASSES)
    problems = check_shards(path).problems
    if name.startswith("good"):
        assert not problems
    else:
        assert f"{tmp_path}/train-000000.tar, sample a: " in problems[0]


def typed(name, kind, **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def sized(data, size):
    """A tar whose first file says that it has `size` bytes."""
    said = (
        b"%011o\0" % size
        if 0 <= size < 8**11
        else (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=size < 0)
    )
    return summed(data[:124] + said + data[136:512]) + data[512:]


def typed_as(data, kind):
    return data[:156] + kind.encode() + data[157:]


A, B = [("a.codes.npy", GOOD), ("a.cls", b"1")], [("b.codes.npy", GOOD), ("b.cls", b"2")]
WHOLE = tar(*A, *B)
SPARSE = {
    "GNU.sparse.major": "0",
    "GNU.sparse.minor": "1",
    "GNU.sparse.size": str(10**13),
    "GNU.sparse.numblocks": "0",
    "GNU.sparse.map": "0,0",
}
TARS = {
    "folders": (tar((typed("x/", tarfile.DIRTYPE), b""), *[(f"x/{name}", data) for name, data in [*A, *B]]), None),
    "a way up": (tar(*[(f"../../{name}", data) for name, data in A], *B), None),
    "the old format": (tar(*A, *B, form=tarfile.USTAR_FORMAT), None),
    "a link": (tar((typed("a.codes.npy", tarfile.SYMTYPE, linkname="/etc/passwd"), b""), A[1], *B), "is a link"),
    "a hard link": (tar((typed("a.codes.npy", tarfile.LNKTYPE, linkname="b.codes.npy"), b""), A[1], *B), "is a link"),
    "a device": (tar((typed("a.codes.npy", tarfile.CHRTYPE, devmajor=1, devminor=5), b""), A[1], *B), "is a link"),
    "a pipe": (tar((typed("a.codes.npy", tarfile.FIFOTYPE), b""), A[1], *B), "is a link, a device"),
    "a sparse file": (tar((typed("a.codes.npy", tarfile.REGTYPE, pax_headers=SPARSE), b""), A[1], *B), "sparse file"),
    "a part twice": (tar(A[0], A[0], A[1], *B), "duplicate file name"),
    "a part twice, in capitals": (tar(A[0], ("a.CODES.npy", GOOD), A[1], *B), "duplicate file name"),
    "a sample in two places": (tar(A[0], *B, A[1]), "sample a: not readable ('cls')"),
    "a sample twice": (tar(*A, *B, *A), "3 samples, but its manifest lists 2"),
    "a name of ours": (tar(*A, ("a.__key__", b"x"), *B), "duplicate file name"),
    "a sample hidden": (tar(*A, ("a.__bad__", b"x"), *B), "1 samples, but its manifest lists 2"),
    "a long name": (tar(("x/" * 2000 + "a.codes.npy", GOOD), *B), "a name of"),
    "a gigantic file": (sized(WHOLE, 2**33 - 1), "unexpected end of data"),
    "a file of more than there is": (sized(WHOLE, 2**80), "not a readable tar file"),
    "a file of less than nothing": (sized(WHOLE, -512), "a file of -512 bytes"),
    **{
        f"a header {kind} of less than nothing": (sized(typed_as(WHOLE, kind), -512), "not a readable tar file")
        for kind in "LKxgX"
    },
    "a size that is none": (
        tar((typed("a.cls", tarfile.REGTYPE, pax_headers={"size": "-99999"}), b"1")),
        "not a readable",
    ),
    "compressed": (__import__("gzip").compress(WHOLE), "not a readable tar file"),
    "empty": (b"", "not a readable tar file"),
    "zeros": (b"\0" * 10240, "0 samples, but its manifest lists 2"),
    "a class of many digits": (tar(A[0], ("a.cls", b"9" * 5000), *B), "sample a: not readable"),
    "a class below": (tar(A[0], ("a.cls", b"-1"), *B), "class -1 is outside"),
    "features of a class": (tar(*A, ("a.features.npy", npy(described((1, 3)), b"\0" * 6)), *B), "sample a: features"),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_that_are_no_shards(tmp_path, name):
    data, message = TARS[name]
    path = tmp_path / "train.json"
    write_shards(samples(CLASSES), path, layout=CLASSES, per_shard=2)
    listed(path, data)
    before = sorted(tmp_path.rglob("*"))
    looked_at(path, CLASSES)
    problems = check_shards(path).problems
    assert message in problems[0] and "train-000000.tar" in problems[0] if message else problems == []
    assert sorted(tmp_path.rglob("*")) == before


def test_captions_that_are_none(tmp_path):
    good = npy(described((1, 4), kind="<f2"), b"\0" * 8)
    wrong = [
        ([("a.txt", b"\xff\xfe"), ("a.features.npy", good)], "not readable"),
        ([("a.txt", b"x"), ("a.features.npy", npy(described((4,), kind="<f2"), b"\0" * 8))], "features of shape (4,)"),
        ([("a.txt", b"x"), ("a.features.npy", npy(described((0, 4), kind="<f2"), b""))], "features of shape (0, 4)"),
        ([("a.txt", b"x"), ("a.features.npy", npy(described((1, 4), kind="<f2"), b"\xff\x7f" * 4))], "not all finite"),
        ([("a.txt", b"x"), ("a.features.npy", npy(described((1, 1), kind="<f8"), struct.pack("<d", 1e300)))], "finite"),
    ]
    for members, message in wrong:
        path = tmp_path / "train.json"
        write_shards(samples(CAPTIONS), path, layout=CAPTIONS, per_shard=2)
        listed(path, tar(A[0], *members, B[0], ("b.txt", b"y"), ("b.features.npy", good)))
        looked_at(path, CAPTIONS)
        assert message in check_shards(path).problems[0]
    some = tar(A[0], ("a.txt", b"x"), ("a.features.npy", good), B[0], ("b.txt", b"y"))
    listed(path, some)
    with pytest.raises(ValueError, match="sample b: no features, which its manifest promises"):
        list(ShardLoader(path, batch_size=4))
    assert len(list(ShardLoader(path, batch_size=4, damaged="skip"))) == 1
