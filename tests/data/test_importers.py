"""Other people's codes become shards; `shards check` tells what is in a set, and everything wrong with it."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import numpy as np
import pytest
from commands import sets

from zipar_train.data.import_codes import import_codes
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, read_shard, write_shards
from zipar_train.recipe.load import load_recipe

RECIPE = [
    "model.codebook_size=9",
    "model.num_classes=4",
    "model.grid=[3,3]",
    "zipar.windows={3: 1}",
    "evaluate.windows=[3]",
]


def codes(i, views=2):
    return np.random.default_rng(i).integers(0, 9, size=(views, 9))


def llamagen(root):
    for i in range(12):
        for kind, array in (("codes", codes(i)[None]), ("labels", np.array([i % 4]))):
            (root / f"imagenet384_{kind}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"imagenet384_{kind}" / f"{i}.npy", array)
    return root


def randar(root):
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        for i in range(12):
            buffer = io.BytesIO()
            np.save(buffer, codes(i))
            member = tarfile.TarInfo(f"imagenet-llamagen-adm-256_codes/{i % 4}/{i}.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return root.with_suffix(".tar")


def unpacked(root):
    for i in range(12):
        (root / str(i % 4)).mkdir(parents=True, exist_ok=True)
        np.save(root / str(i % 4) / f"{i}.npy", codes(i))
    return root


def rar(root):
    lines = [json.dumps({"class_id": i % 4, "tokens": view.tolist()}) for i in range(12) for view in codes(i)]
    root.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    return root.with_suffix(".jsonl")


def held(manifest):
    layout = read_manifest(manifest)
    samples = [s for shard in layout.shards for s in read_shard(manifest, shard, layout)]
    return sorted((view.reshape(-1).tolist(), s.condition) for s in samples for view in s.codes)


@pytest.mark.parametrize("make", [llamagen, randar, unpacked, rar])
def test_codes_of_others_become_shards(tmp_path, make):
    source = make(tmp_path / "theirs")
    manifest = import_codes(load_recipe("llamagen-b", RECIPE), codes=source, out=tmp_path / "out", split="val")
    assert manifest.samples == (24 if make is rar else 12)
    layout = read_manifest(tmp_path / "out" / "val.json")
    labels = [s.condition for s in read_shard(tmp_path / "out" / "val.json", layout.shards[0], layout)]
    assert labels != sorted(labels)
    assert held(tmp_path / "out" / "val.json") == sorted((v.tolist(), i % 4) for i in range(12) for v in codes(i))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "imagenet384_codes" / "3.npy").write_bytes(b"x"), "3.npy is not a readable .npy file"),
        (lambda path: (path / "imagenet384_labels" / "3.npy").unlink(), "3.npy is not a readable .npy file"),
        (
            lambda path: np.save(path / "imagenet384_codes" / "3.npy", codes(0)[None, :, :4]),
            "3: 4 codes an image, but the",
        ),
        (
            lambda path: np.save(path / "imagenet384_codes" / "3.npy", codes(0) + 9),
            "sample 3: code .* is outside a codebook",
        ),
        (
            lambda path: np.save(path / "imagenet384_labels" / "3.npy", np.array([4])),
            "sample 3: class 4 is outside 0 .. 3",
        ),
        (
            lambda path: np.save(path / "imagenet384_codes" / "3.npy", np.array([{}]), allow_pickle=True),
            "3.npy is not a readable .npy file .an array of shape .1,. and type object",
        ),
    ],
)
def test_bad_codes_are_named(tmp_path, spoil, message):
    spoil(llamagen(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=message):
        import_codes(load_recipe("llamagen-b", RECIPE), codes=tmp_path / "theirs", out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_damaged_lines_and_tars_are_named(tmp_path):
    recipe = load_recipe("llamagen-b", RECIPE)
    for path, message in ((rar(tmp_path / "a"), "a.jsonl, line 13, is damaged"), (randar(tmp_path / "b"), "b.tar")):
        os.truncate(path, 700)
        with pytest.raises(ValueError, match=message):
            import_codes(recipe, codes=path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="neither a LlamaGen code folder"):
        import_codes(recipe, codes=tmp_path / "nothing", out=tmp_path / "out")


def array(found, **kwargs):
    buffer = io.BytesIO()
    np.save(buffer, found, **kwargs)
    return buffer.getvalue()


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3))
    return buffer.getvalue()


def gigantic():
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (10**13, 9)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("codes", archive(), "not a readable .npy file"),
        ("codes", gigantic(), "not a readable .npy file"),
        ("codes", array(np.zeros((3, 0), int)), "no codes in an array of shape .3, 0.|cannot reshape"),
        ("codes", array(np.zeros((2, 9), bool)), "type bool"),
        ("codes", array(np.zeros((2, 9), "<U3")), "type <U3"),
        ("codes", array(np.zeros((2, 9)))[:-8], "not a readable .npy file"),
        ("labels", array(np.array([np.inf])), "label inf is not a class number"),
        ("labels", array(np.array([np.nan])), "label nan is not a class number"),
        ("labels", array(np.array([1.5])), "label 1.5 is not a class number"),
        ("labels", array(np.array([1, 2])), "holds 2 labels, not one"),
        ("labels", array(np.array([], int)), "holds 0 labels, not one"),
        ("labels", array(np.array(["1"])), "not a readable .npy file"),
        ("labels", b"", "not a readable .npy file"),
    ],
)
def test_damaged_arrays_are_named(tmp_path, kind, data, message):
    root = llamagen(tmp_path / "theirs")
    (root / f"imagenet384_{kind}" / "3.npy").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        import_codes(load_recipe("llamagen-b", RECIPE), codes=root, out=tmp_path / "out")
    assert "3.npy" in str(error.value) and "\n" not in str(error.value)


def test_labels_that_are_whole_floats_are_classes(tmp_path):
    root = llamagen(tmp_path / "theirs")
    np.save(root / "imagenet384_labels" / "3.npy", np.array([3.0]))
    import_codes(load_recipe("llamagen-b", RECIPE), codes=root, out=tmp_path / "out")
    assert held(tmp_path / "out" / "train.json") == sorted((v.tolist(), i % 4) for i in range(12) for v in codes(i))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"class_id": Infinity, "tokens": [0]}', "label inf"),
        (b'{"class_id": true, "tokens": [0]}', "label True"),
        (b'{"class_id": "cat", "tokens": [0]}', "label 'cat'"),
        (b'{"class_id": null, "tokens": [0]}', "no label"),
        (b'{"class_id": 1}', "tokens"),
        (b'{"class_id": 1, "tokens": []}', "no codes"),
        (b'{"class_id": 1, "tokens": [[1], [1, 2]]}', "is damaged"),
        (b"[1, 2]", "is damaged"),
        (b"[" * 100000, "RecursionError"),
        (b'{"class_id": 1, "tokens": "\xff"}', "utf-8"),
    ],
)
def test_damaged_lines_are_numbered(tmp_path, line, message):
    path = rar(tmp_path / "theirs")
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        import_codes(load_recipe("llamagen-b", RECIPE), codes=path, out=tmp_path / "out")
    assert "theirs.jsonl, line 26, is damaged" in str(error.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("damage", ["none", "no end", "a byte", "cut", "joined"])
def test_damaged_tars_are_named_however_they_are_packed(tmp_path, capsys, pack, damage):
    path = randar(tmp_path / "theirs")
    plain = path.read_bytes()
    packed = bytearray(pack(plain))
    if damage == "a byte" and pack is bytes:
        at = plain.index(b"imagenet-llamagen-adm-256_codes/1/5.npy")
        packed[at : at + 30] = b"\xff" * 30
    elif damage == "a byte":
        packed[len(packed) // 2] ^= 255
    elif damage == "cut":
        packed = packed[: len(packed) // 2 - 100]  # within a file
    elif damage == "joined":
        packed = bytearray(pack(plain + plain))
    elif damage == "no end":
        packed = bytearray(pack(plain.rstrip(b"\0") + bytes(-len(plain.rstrip(b"\0")) % 512)))
    path.write_bytes(packed)
    recipe = load_recipe("llamagen-b", RECIPE)
    if damage in ("none", "no end"):
        assert import_codes(recipe, codes=path, out=tmp_path / "out").samples == 12
        assert ("no end-of-archive mark" in capsys.readouterr().err) == (damage == "no end")
        return
    with pytest.raises(ValueError, match=r"theirs\.tar is damaged") as error:
        import_codes(recipe, codes=path, out=tmp_path / "out")
    assert "\n" not in str(error.value)


def test_folders_that_no_number_names_are_told(tmp_path, capsys):
    root = unpacked(tmp_path / "theirs")
    for name in ("cat", ".hidden", "²"):
        (root / name).mkdir()
        np.save(root / name / "0.npy", codes(0))
    np.save(root / "1" / "._5.npy", codes(0))
    assert import_codes(load_recipe("llamagen-b", RECIPE), codes=root, out=tmp_path / "out").samples == 12
    assert "left out, as no class number names them: folders cat, ²" in capsys.readouterr().err
    for name in ("x_codes", "x_labels"):
        (tmp_path / "nothing" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="nothing holds no codes"):
        import_codes(load_recipe("llamagen-b", RECIPE), codes=tmp_path / "nothing", out=tmp_path / "out2")


# ---------------------------------------------------------------------------------------------------------------------
# shards check


LAYOUT = Layout(source="a test", grid=(2, 3), codes=7, classes=3)


def good(tmp_path, name="train", count=25):
    samples = [Sample(f"k{i}", np.full((2, 2, 3), i % 5), i % 3) for i in range(count)]
    write_shards(samples, tmp_path / f"{name}.json", layout=LAYOUT, per_shard=10)
    return tmp_path / f"{name}.json"


def test_check_prints_what_is_there(tmp_path, cli):
    done = cli("shards", "check", good(tmp_path), good(tmp_path, "val"), "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    for line in (
        "25 of 25 readable, 50 views, 3 shards",
        "2 x 3, 5 of 7 codes occur",
        "3 of 3 classes, 8 to 9 images each",
        "verdict    whole",
    ):
        assert done.stdout.count(line) == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["samples"] for one in found] == [25, 25]
    assert found[0]["per_class"] == {"0": 9, "1": 8, "2": 8}


def test_check_finds_everything_that_is_wrong(tmp_path, cli):
    path = good(tmp_path)
    os.truncate(tmp_path / "train-000001.tar", 4000)  # cut in the middle
    manifest = json.loads(path.read_text())
    manifest["shards"][2]["samples"] = 6
    manifest["shards"].append(manifest["shards"][0])
    path.write_text(json.dumps(manifest))
    done = cli("shards", "check", path)
    assert done.returncode == 1
    assert "25 of 36 readable" in done.stdout
    assert "verdict    3 problems" in done.stdout
    assert "train-000001.tar is damaged: its checksum is not the manifest's" in done.stderr
    assert "train-000002.tar holds 5 samples, but its manifest lists 6" in done.stderr
    assert "10 keys occur more than once, k0 for one" in done.stderr


def test_check_compares_the_names_of_classes(tmp_path, run):
    for name, known in (("train", ("ant", "bee", "cow")), ("val", ("ant", "cow", "bee"))):
        layout = LAYOUT.model_copy(update={"class_names": known})
        found = [Sample(f"k{i}", np.full((2, 2, 3), i % 5), i % 3) for i in range(5)]
        write_shards(found, tmp_path / f"{name}.json", layout=layout)
    status, out, err = run("shards", "check", tmp_path / "train.json", tmp_path / "val.json")
    assert status == 1
    assert "(ant, bee, cow)" in out and "number their classes differently: class 1 is 'bee' in one and 'cow'" in err


def test_check_against_a_recipe(tmp_path, cli):
    done = cli("shards", "check", good(tmp_path), "--recipe", "llamagen-b", *sets(RECIPE))
    assert done.returncode == 2
    assert "train.json: grid 2x3, but the recipe's model has 3x3" in done.stderr
    assert "Traceback" not in done.stderr
