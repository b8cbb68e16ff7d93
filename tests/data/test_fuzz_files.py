"""Spoilt shards, manifests and checkpoints: one message that names them, or samples that are what they should be."""

import hashlib
import io
import json
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
import yaml
from fuzzing import VALUES, Odd, examples, in_time, spoilt_bytes, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.shards import Sample, read_manifest, read_shard, write_shards
from zipar_train.data.validate import check_shards
from zipar_train.models.restore import last_checkpoint, read
from zipar_train.recipe.load import dump, load_recipe
from zipar_train.recipe.schema import Recipe

CLASSES = Layout(source="test", grid=(2, 3), codes=5, classes=3)
CAPTIONS = Layout(source="test", grid=(2, 3), codes=5, features=True)


def samples(layout):
    for i in range(4):
        codes = np.full((2, 2, 3), i, np.uint16)
        if layout.classes:
            yield Sample(f"s{i}", codes, i % 3)
        else:
            yield Sample(f"s{i}", codes, f"caption {i} é", np.full((i + 1, 4), 0.5, np.float16))


@pytest.fixture(scope="module", params=[CLASSES, CAPTIONS], ids=["classes", "captions"])
def sets(request, tmp_path_factory):
    """A shard set of two shards: its manifest, and the bytes of its first shard."""
    path = tmp_path_factory.mktemp("set") / "train.json"
    write_shards(samples(request.param), path, layout=request.param, per_shard=2)
    return path, (path.parent / "train-000000.tar").read_bytes(), request.param


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
                none = damaged == "skip" and "none of its shards can be read" in str(error)
                assert contents.problems and (none or (damaged == "stop" and ".tar" in str(error)))  # noqa: PT017
            else:
                assert sum(len(batch.codes) for batch in batches) == -(-manifest.samples // 3) * 3  # the last filled up
                assert contents.problems or not loader.damaged


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


def npy(header, body=b"\0" * 12, *, magic=b"\x93NUMPY\x01\x00"):
    text = header.encode() if isinstance(header, str) else header
    return magic + struct.pack("<H", len(text)) + text + body


def described(shape, *, kind="<u2", order=False):
    return f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def zipped():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((1, 2, 3), np.uint16))
    return buffer.getvalue()


GOOD = npy(described((1, 2, 3)))
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


def tar(*members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


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


def summed(head):
    """A tar's header with its checksum."""
    head = head[:148] + b" " * 8 + head[156:512]
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


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


def plain(value):
    """What JSON can say of it, and more than it should: NaN, and numbers of thousands of digits."""
    if isinstance(value, dict):
        return {str(key)[:4000]: plain(part) for key, part in value.items() if not isinstance(key, bytes)}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a few numbers, and an export."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe("digits-base")
    state = {"model.a.weight": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(3, dtype=torch.bfloat16)}
    (folder / "run" / "checkpoints").mkdir(parents=True)
    content = {"recipe": recipe.model_dump(), "data": {"trained on": "x"}, "state_dict": state, "base": None}
    torch.save(content, folder / "run" / "checkpoints" / "last.ckpt")
    torch.save(content, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    (folder / "export").mkdir()
    save_file(state, folder / "export" / "model.safetensors")
    (folder / "export" / "recipe.yaml").write_text(dump(recipe))
    return folder, content


def got(path, *, names=()):
    """What can be read of weights."""
    with in_time():
        try:
            saved = read(path)
        except ValueError as error:
            said = str(error)
            assert any(name in said for name in (path.name, *names)) and len(said) < 60_000, said  # noqa: PT017
            return
    assert saved.recipe is None or isinstance(saved.recipe, Recipe)
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved.state.values())


@examples(100)
@given(data=st.data())
def test_checkpoints_with_spoilt_bytes(run, tmp_path, data):
    folder, _ = run
    source = data.draw(st.sampled_from(["run/checkpoints/last.ckpt", "old.ckpt"]))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.draw(spoilt_bytes([(folder / source).read_bytes()])))
    assert last_checkpoint(tmp_path / "run") == path
    got(tmp_path / "run", names=["last.ckpt"])


@examples(100)
@given(data=st.data())
def test_checkpoints_with_spoilt_values(run, tmp_path, data):
    content = {**run[1], "state_dict": {"model.a.weight": 1}}
    content = data.draw(spoilt_values([content], values=VALUES.map(torch_plain)) | VALUES.map(torch_plain))
    if isinstance(content, dict) and content.get("state_dict") == {"model.a.weight": 1}:
        content["state_dict"] = run[1]["state_dict"]
    torch.save(content, tmp_path / "spoilt.ckpt")
    got(tmp_path / "spoilt.ckpt")


def torch_plain(value):
    return value


@examples(100)
@given(data=st.data())
def test_exports_with_spoilt_files(run, tmp_path, data):
    folder = tmp_path / "export"
    shutil.copytree(run[0] / "export", folder, dirs_exist_ok=True)
    tensors, recipe = (folder / "model.safetensors").read_bytes(), (folder / "recipe.yaml").read_text()
    kind = data.draw(st.sampled_from(["tensors", "header", "recipe", "values"]))
    if kind == "tensors":
        (folder / "model.safetensors").write_bytes(data.draw(spoilt_bytes([tensors])))
    elif kind == "header":
        size = int.from_bytes(tensors[:8], "little")
        header = json.dumps(plain(data.draw(spoilt_values([json.loads(tensors[8 : 8 + size])])))).encode()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + tensors[8 + size :])
    elif kind == "recipe":
        (folder / "recipe.yaml").write_bytes(data.draw(spoilt_bytes([recipe.encode()])))
    else:
        spoilt = yaml.dump(data.draw(spoilt_values([yaml.safe_load(recipe)])), Dumper=Odd)
        (folder / "recipe.yaml").write_bytes(spoilt.encode("utf-8", "surrogatepass"))
    got(folder, names=["model.safetensors", "recipe.yaml"])


@examples(60)
@given(data=st.data())
def test_indexes_with_spoilt_values(run, tmp_path, data):
    folder = tmp_path / "published"
    folder.mkdir(exist_ok=True)
    shutil.copy(run[0] / "export" / "model.safetensors", folder / "model-1.safetensors")
    (folder / "config.json").write_text("{}")
    whole = {"weight_map": {"model.a.weight": "model-1.safetensors", "model.b": "model-1.safetensors"}}
    spoilt = spoilt_values([whole]).map(lambda value: json.dumps(plain(value)).encode())
    spoilt = data.draw(spoilt | spoilt_bytes([json.dumps(whole).encode()]) | st.just(b"[" * 10**5))
    (folder / "model.safetensors.index.json").write_bytes(spoilt)
    got(folder, names=["model.safetensors.index.json", "model-1.safetensors", "no weights at"])


def test_devices_are_no_files(tmp_path):
    for name in ("run.ckpt", "model.safetensors", "recipe.yaml"):
        os.mkfifo(tmp_path / name)
    with in_time():
        for name in ("run.ckpt", "model.safetensors"):
            with pytest.raises(ValueError, match="no weights at"):
                read(tmp_path / name)
        with pytest.raises(ValueError, match="no recipe file"):
            load_recipe(tmp_path / "recipe.yaml")
        with pytest.raises(ValueError, match="holds neither"):
            read(tmp_path)
