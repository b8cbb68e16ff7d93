"""Pictures as users have them: folders, tars and tables of every layout, classes by name, what is left out told."""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import sets
from PIL import Image

from zipar_train.data.image_sources import open_source, splits
from zipar_train.data.labels import LabelError
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.tokenize import tokenize
from zipar_train.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(level=90):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "png")
    return buffer.getvalue()


def folders(root: Path, *names: str) -> Path:
    """A folder with a picture for each name, `train/cat/3.png` say."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tokenized(images, out, classes, split="train"):
    recipe = load_recipe("digits-base", [f"model.num_classes={classes}"])
    return tokenize(recipe, images=str(images), out=out, split=split, progress=False)


def held(out, split="train"):
    manifest = read_manifest(out / f"{split}.json")
    samples = [s for shard in manifest.shards for s in read_shard(out / f"{split}.json", shard, manifest)]
    return {sample.key: sample.condition for sample in samples}


def rows(count=6, **more):
    """Rows of a table: a picture's bytes and path, and what else is given."""
    return [
        {"image": {"bytes": png(k), "path": f"{k}.png"}, **{name: values[k] for name, values in more.items()}}
        for k in range(count)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Classes of folders


def test_a_split_that_lacks_a_class_goes_by_name(tmp_path, run):
    folders(tmp_path / "p", "train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "val/bee/2.png", "val/cow/3.png")
    command = [
        "tokenize",
        "--recipe",
        "digits-base",
        *sets(["model.num_classes=3"]),
        "--images",
        tmp_path / "p",
        "--out",
    ]
    status, out, err = run(*command, tmp_path / "o")
    assert status == 0, err
    assert "val: 1 of 3 classes have no picture: ant" in out
    assert held(tmp_path / "o", "val") == {"bee_2": 1, "cow_3": 2}
    for split in ("train", "val"):
        assert read_manifest(tmp_path / "o" / f"{split}.json").class_names == ("ant", "bee", "cow")
    tokenized(tmp_path / "p", tmp_path / "apart", 3)
    for shard in (tmp_path / "apart").glob("*.tar"):
        shard.unlink()  # shards may lie elsewhere by now
    tokenized(tmp_path / "p", tmp_path / "apart", 3, "val")
    assert held(tmp_path / "apart", "val") == held(tmp_path / "o", "val")
    with pytest.raises(ValueError, match=r"val has 2 classes, the recipe's model 3\. .* found: bee, cow"):
        tokenized(tmp_path / "p", tmp_path / "first", 3, "val")
    folders(tmp_path / "p", "val/dog/1.png")
    status, _, err = run(*command, tmp_path / "none")
    assert status == 2
    assert "val has the class 'dog', which train has not" in err
    assert not (tmp_path / "none").exists()  # before anything is made


def test_numbered_folders_keep_their_numbers(tmp_path):
    images = folders(tmp_path / "p", *(f"{k}/1.png" for k in (0, 1, 2, 9, 10, 11)))
    tokenized(images, tmp_path / "o", 12)
    assert held(tmp_path / "o") == {f"{k}_1": k for k in (0, 1, 2, 9, 10, 11)}
    assert read_manifest(tmp_path / "o" / "train.json").class_names is None
    tokenized(folders(tmp_path / "q", "00002/1.png", "00010/1.png"), tmp_path / "o", 12, "val")
    assert held(tmp_path / "o", "val") == {"00002_1": 2, "00010_1": 10}
    tokenized(folders(tmp_path / "r", *(f"{k}/1.png" for k in range(1, 11))), tmp_path / "o2", 10)
    assert held(tmp_path / "o2") == {f"{k}_1": k - 1 for k in range(1, 11)}
    with pytest.raises(ValueError, match=r"class 11 is outside 0 \.\. 9"):
        tokenized(images, tmp_path / "o3", 10)


def test_hidden_and_empty_folders_shift_nothing(tmp_path):
    images = folders(tmp_path / "p", "bee/1.png", "cow/1.png", ".ipynb_checkpoints/1.png", "cow/.hidden/2.png")
    (images / "ant").mkdir()
    done = tokenized(images, tmp_path / "o", 2)
    assert held(tmp_path / "o") == {"bee_1": 0, "cow_1": 1}
    assert done.skipped == {".ipynb_checkpoints": "hidden", "cow/.hidden/2.png": "in a hidden folder"}
    tokenized(images, tmp_path / "three", 3)  # the model counts it
    assert held(tmp_path / "three") == {"bee_1": 1, "cow_1": 2}
    assert open_source(str(images), "train").empty == ("ant",)


def test_splits_by_their_usual_names(tmp_path):
    for name in ("val", "validation", "valid", "dev"):
        images = folders(tmp_path / name, "train/a/1.png", f"{name}/a/1.png")
        assert splits(str(images)) == ("train", "val")
        source = open_source(str(images), "val")
        assert source.name == f"{images}, {name}"
        assert source.notes == (() if name == "val" else (f"split 'val': folder {name!r}",))
    with pytest.raises(ValueError, match=r"no folder for --split test\. Give one of train, val"):
        open_source(str(tmp_path / "val"), "test")
    vehicles = folders(tmp_path / "vehicles", "bus/1.png", "car/1.png", "train/1.png")  # a class
    assert splits(str(vehicles)) == ("train",)
    assert open_source(str(vehicles), "train").names == ("bus", "car", "train")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def parquet(path: Path, table: list, features=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        datasets.Dataset.from_list(table, features=features).to_parquet(path)
    return path


LABELLED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "x", "y"])})


def layouts(root):
    """The same six pictures of three classes in many layouts; names are z, x, y in the order of their numbers."""
    numbers, names = [0, 1, 2, 0, 1, 2], ["z", "x", "y"] * 2
    plain = rows(label=numbers)
    bare = [{"img": row["image"]["bytes"], "cls": str(label)} for row, label in zip(plain, numbers, strict=True)]
    parquet(root / "clone/data/train-00000-of-00001.parquet", plain, LABELLED)
    (root / "clone/README.md").write_text("a card")
    parquet(root / "nested/a/b/train/part.parquet", plain, LABELLED)
    parquet(root / "bytes/train.parquet", plain)
    parquet(root / "bare/train.parquet", bare)
    parquet(root / "one.parquet", bare)
    parquet(root / "words/train.parquet", rows(label=names))
    parquet(root / "floats/train.parquet", rows(label=[float(n) for n in numbers]))
    datasets.Dataset.from_list(plain, features=LABELLED).save_to_disk(root / "saved")
    whole = datasets.Dataset.from_list(plain, features=LABELLED)
    datasets.DatasetDict({"train": whole, "validation": whole}).save_to_disk(root / "dict")
    for name in ("meta", "table", "lines"):
        for k in range(6):
            folders(root / name, f"train/{k}.png")
    said = [{"file_name": f"{k}.png", "label": names[k]} for k in range(6)]
    (root / "meta/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    lines = [f"train/{k}.png,{names[k]}\n" for k in range(6)]
    (root / "table/train.csv").write_text("image_path,label\n" + "".join(lines))
    paths = [{"path": f"train/{k}.png", "label": names[k]} for k in range(6)]
    (root / "lines/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in paths))
    for k in range(6):
        folders(root / "imagefolder", f"train/{names[k]}/{k}.png")
    return {
        "clone": numbers,
        "nested": numbers,
        "bytes": numbers,
        "bare": numbers,
        "one.parquet": numbers,
        "floats": numbers,
        "saved": numbers,
        "dict": numbers,
        "words": names,
        "meta": names,
        "table": names,
        "table/train.csv": names,
        "lines/train.jsonl": names,
    }


def test_every_layout_that_datasets_loads(tmp_path):
    sorted_names = {"x": 0, "y": 1, "z": 2}
    for at, (name, labels) in enumerate(layouts(tmp_path).items()):
        done = tokenized(tmp_path / name, tmp_path / f"out{at}", 3)
        assert not done.skipped, (name, done.skipped)
        found = held(tmp_path / f"out{at}")
        assert [found[f"{k:08d}"] for k in range(6)] == [sorted_names.get(label, label) for label in labels], name
    tokenized(tmp_path / "imagefolder", tmp_path / "folders", 3)
    assert sorted(held(tmp_path / "folders").values()) == [0, 0, 1, 1, 2, 2]
    assert read_manifest(tmp_path / "out0" / "train.json").class_names == ("z", "x", "y")
    assert splits(str(tmp_path / "dict")) == ("train", "val")


def test_a_data_set_with_another_order_of_names_goes_by_name(tmp_path):
    parquet(tmp_path / "a/train.parquet", rows(label=[0, 1, 2, 0, 1, 2]), LABELLED)
    other = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    parquet(tmp_path / "b/validation.parquet", rows(label=[0, 1, 2, 0, 1, 2]), other)
    tokenized(tmp_path / "a", tmp_path / "o", 3)
    tokenized(tmp_path / "b", tmp_path / "o", 3, "val")
    assert [held(tmp_path / "o", "val")[f"{k:08d}"] for k in range(3)] == [1, 2, 0]


def test_truth_values_are_classes_by_name_and_fractions_none(tmp_path):
    parquet(tmp_path / "bools/train.parquet", rows(label=[True, False] * 3))
    tokenized(tmp_path / "bools", tmp_path / "o", 2)
    assert read_manifest(tmp_path / "o" / "train.json").class_names == ("False", "True")
    parquet(tmp_path / "halves/train.parquet", rows(label=[0.0, 3.5, -1.0, None, float("nan"), 1.0]))
    done = tokenized(tmp_path / "halves", tmp_path / "p", 2)
    assert done.skipped == {
        "00000001": "label error: label 3.5 is no class number",
        "00000002": "label error: label -1 is outside 0 .. 1",
        "00000003": "label error: there is no label",
        "00000004": "label error: label nan is no class number",
    }
    with pytest.raises(ValueError, match="has 2 classes, the recipe's model 5"):
        tokenized(tmp_path / "bools", tmp_path / "q", 5)


def test_label_errors_are_told_as_such(tmp_path, run):
    labels = [-1, 1, 0, 2, None, 1]
    parquet(tmp_path / "d/train.parquet", rows(label=labels), LABELLED)
    command = [
        "tokenize",
        "--recipe",
        "digits-base",
        *sets(["model.num_classes=3"]),
        "--images",
        tmp_path / "d",
        "--out",
    ]
    status, out, err = run(*command, tmp_path / "o")
    assert status == 0
    assert "split 'train': pictures in column 'image', classes in column 'label'" in out
    assert "2 files or pictures were not read, 2 of them for their labels or captions" in err
    assert "The first, 00000000: label error: label -1 is outside 0 .. 2" in err
    parquet(tmp_path / "none/train.parquet", rows(label=[-1] * 6), LABELLED)
    command[-2] = tmp_path / "none"
    status, out, err = run(*command, tmp_path / "p")
    assert status == 2
    assert "none of the 6 pictures can be used" in err and "label -1 is outside" in err


def test_captions_lists_of_captions_and_none(tmp_path):
    parquet(tmp_path / "lists/train.parquet", rows(captions=[["a", "b"], [None, "c"], [], None, [" "], ["d"]]))
    source = open_source(str(tmp_path / "lists"), "train", captions=True)
    assert source.notes == (
        "split 'train': pictures in column 'image', captions in column 'captions' (the first of each list)",
    )
    found = {}
    for at, key in enumerate(source.keys):
        try:
            found[key] = source.read(at)[1]
        except LabelError as error:
            found[key] = str(error)
    assert found["00000003"] == "there is no caption"
    assert found["00000000"] == ["a", "b"]  # the first is taken by `labels.caption`
    with pytest.raises(ValueError, match=r"needs a column of pictures and one of captions, but has image .* label"):
        open_source(str(parquet(tmp_path / "x.parquet", rows(label=[0] * 6))), "train", captions=True)


def test_a_split_goes_by_its_usual_names_or_is_missed(tmp_path):
    for name in ("train", "validation", "test"):
        parquet(tmp_path / f"d/data/{name}-00000-of-00001.parquet", rows(label=[0] * 6), LABELLED)
    assert splits(str(tmp_path / "d")) == ("train", "val")
    assert "split 'validation'" in open_source(str(tmp_path / "d"), "val").notes[0]
    assert "split 'test'" in open_source(str(tmp_path / "d"), "eval").notes[0]
    with pytest.raises(ValueError, match="it has no split 'extra', but train, validation, test: give one of them"):
        open_source(str(tmp_path / "d"), "extra")


# ---------------------------------------------------------------------------------------------------------------------
# Tars


def test_names_with_several_dots_are_samples_of_their_own(tmp_path):
    files = {"x.1.png": png(), "x.1.cls": b"1", "x.2.png": png(), "x.2.cls": b"2", "v.1.2.png": png(), "v.cls": b"0"}
    files |= {"plain.png": png(), "plain.cls": b"1", "plain.mask.png": png(), "plain.jpg": png(), "lone.txt": b"x"}
    files |= {"plain.2.png": png(), "plain.2.cls": b"2", "other.jfif": png(), "other.cls": b"0"}
    done = tokenized(tar(tmp_path / "a.tar", files), tmp_path / "o", 3)
    named = {"a_x_1": 1, "a_x_2": 2, "a_v_1_2": 0, "a_plain": 1, "a_plain_2": 2, "a_other": 0}
    assert held(tmp_path / "o") == named
    assert done.skipped == {
        "a/plain.jpg": "its sample has the picture plain.png already",
        "a/plain.mask.png": "its sample has the picture plain.png already",
        "a/lone": "no picture: the files are lone.txt",
    }


def test_classes_of_tars_are_numbers_or_names(tmp_path):
    words = {
        f"{k}.{kind}": data
        for k, name in enumerate(("dog", "cat", "dog"))
        for kind, data in (("png", png()), ("cls", name.encode()))
    }
    tokenized(tar(tmp_path / "words.tar", words), tmp_path / "o", 2)
    assert held(tmp_path / "o") == {"words_0": 1, "words_1": 0, "words_2": 1}
    assert read_manifest(tmp_path / "o" / "train.json").class_names == ("cat", "dog")
    said = [0, "1", 2.0, True, 3.5, None, -1, "cat", {"a": 1}]
    odd = {
        f"{k}.{kind}": data
        for k, label in enumerate(said)
        for kind, data in (("png", png()), ("json", json.dumps({"label": label}).encode()))
    }
    done = tokenized(tar(tmp_path / "odd.tar", odd), tmp_path / "p", 3)
    assert held(tmp_path / "p") == {"odd_0": 0, "odd_1": 1, "odd_2": 2}
    assert done.skipped.keys() == {f"odd_{k}" for k in range(3, 9)}
    assert all(reason.startswith("label error: ") for reason in done.skipped.values())


def test_links_and_hidden_files_of_tars(tmp_path):
    path = tar(tmp_path / "a.tar", {"1.png": png(), "1.cls": b"1", "._1.png": b"x", ".git/2.png": png()})
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (("2.png", tarfile.LNKTYPE, "1.png"), ("3.png", tarfile.SYMTYPE, "1.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        member = tarfile.TarInfo("2.cls")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"0"))
    done = tokenized(path, tmp_path / "o", 2)
    assert held(tmp_path / "o") == {"a_1": 1, "a_2": 0}
    assert done.skipped.keys() == {"a/._1.png", "a/.git/2.png", "a/3.png"}


def spoilt(data: bytes, how: str) -> bytes:
    """A tar of many small files, damaged past its first."""
    if how == "a header":
        at = data.index(b"0005.png")
        return data[:at] + b"\x00\xff" * 20 + data[at + 40 :]
    if how == "a zeroed block":
        at = data.index(b"0005.png")
        return data[:at] + bytes(512) + data[at + 512 :]
    if how == "cut between files":
        return data[: data.index(b"0005.png")]
    if how == "cut in a file":
        return data[: data.index(b"0005.png") + 700]
    return data + data  # joined


DAMAGE = ["a header", "a zeroed block", "cut in a file", "joined"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_in_the_middle_of_a_tar_is_found(tmp_path, how):
    files = {f"{k:04d}.{kind}": data for k in range(20) for kind, data in (("png", png()), ("cls", b"1"))}
    path = tar(tmp_path / "a.tar", files)
    path.write_bytes(spoilt(path.read_bytes(), how))
    with pytest.raises(ValueError, match=r"a\.tar is not a readable, uncompressed tar file"):
        open_source(str(path), "train")


def test_a_tar_without_an_end_mark_is_read_and_told(tmp_path):
    """Some programs write none; a tar that was cut exactly between two files has none either."""
    path = tar(
        tmp_path / "a.tar", {f"{k}.{kind}": data for k in "12" for kind, data in (("png", png()), ("cls", b"1"))}
    )
    whole = path.read_bytes()
    end = max(at for at in range(0, len(whole), 512) if any(whole[at : at + 512])) + 512
    for size, count in ((end, 2), (whole.index(b"2.png"), 1)):
        path.write_bytes(whole[:size])
        source = open_source(str(path), "train")
        assert len(source.keys) == count
        assert source.notes == (f"{path}: it has no end-of-archive mark. If it was cut short, files are missing",)
    path.write_bytes(whole)
    assert open_source(str(path), "train").notes == ()


def test_a_whole_tar_of_any_padding_is_read(tmp_path):
    path = tar(tmp_path / "a.tar", {"1.png": png(), "1.cls": b"1"})
    whole = path.read_bytes()
    end = max(at for at in range(0, len(whole), 512) if any(whole[at : at + 512])) + 512
    for zeros in (512, 1024, 10240, 4 * 2**20):
        path.write_bytes(whole[:end] + bytes(zeros))
        assert len(open_source(str(path), "train").keys) == 1


def test_compressed_tars_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="Decompress it to a .tar first"):
        open_source(str(tmp_path / "a.tar.gz"), "train")


def test_the_order_of_a_source_is_fixed(tmp_path):
    """Positions of old sets stay: the shuffle, the keys and the classes of folders are as they ever were."""
    images = folders(tmp_path / "p", *(f"n{k % 3}/{k}.png" for k in range(9)))
    source = open_source(str(images), "train")
    ordered = [f"n{k % 3}_{k}" for k in sorted(range(9), key=lambda k: (k % 3, k))]
    assert source.keys == [ordered[i] for i in np.random.default_rng(0).permutation(9)]
    assert [source.read(i)[1] for i in range(9)] == [int(key[1]) for key in source.keys]


# ---------------------------------------------------------------------------------------------------------------------
# Folders that hold more than one thing


def test_files_beside_pictures_do_not_make_a_folder_a_table(tmp_path):
    images = folders(tmp_path / "p", *(f"{name}/1.png" for name in "abc"))
    for name in "abc":
        (images / name / "1.json").write_text('{"x": 1}')
        (images / name / "1.txt").write_text("x")
    (images / "labels.csv").write_text("a,b\n1,2\n")
    done = tokenized(images, tmp_path / "o", 3)
    assert held(tmp_path / "o") == {"a_1": 0, "b_1": 1, "c_1": 2}
    assert len(done.skipped) == 7


def test_configurations_and_saved_splits(tmp_path):
    for name in "ab":
        parquet(tmp_path / f"cfg/{name}/train.parquet", rows(label=[0, 1, 2] * 2), LABELLED)
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in "ab")
    (tmp_path / "cfg/README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    with pytest.raises(ValueError, match=r"Please pick one among the available configs: \['a', 'b'\]"):
        open_source(str(tmp_path / "cfg"), "train")
    assert len(open_source(f"{tmp_path}/cfg:b", "train").keys) == 6
    for name in ("train", "valid"):
        datasets.Dataset.from_list(rows(label=[0, 1, 2] * 2), features=LABELLED).save_to_disk(tmp_path / "s" / name)
    assert len(open_source(str(tmp_path / "s"), "val").keys) == 6


def test_nested_tars_and_metadata_with_captions(tmp_path):
    (tmp_path / "w/data").mkdir(parents=True)
    files = {f"{k}.{kind}": data for k in range(4) for kind, data in (("png", png()), ("txt", b"a cat"), ("cls", b"2"))}
    tar(tmp_path / "w/data/train-000.tar", files)
    assert open_source(str(tmp_path / "w"), "train", captions=True).read(0)[1] == "a cat"
    tokenized(tmp_path / "w", tmp_path / "o", 3)
    assert set(held(tmp_path / "o").values()) == {2}
    folders(tmp_path / "m", *(f"train/deep/{k}.png" for k in range(3)))
    table = "file_name,text\n" + "".join(f"deep/{k}.png,cat {k}\n" for k in range(3))
    (tmp_path / "m/train/metadata.csv").write_text(table)
    source = open_source(str(tmp_path / "m"), "train", captions=True)
    assert sorted(source.read(i)[1] for i in range(3)) == ["cat 0", "cat 1", "cat 2"]


def test_a_pipe_among_tables_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet is a pipe"):
        open_source(str(tmp_path), "train")


def test_pictures_that_are_missing_are_told_row_by_row(tmp_path):
    table = rows(4, label=["x", None, "x", "y"])
    table[0]["image"] = None
    table.append({"image": {"bytes": None, "path": "gone.png"}, "label": "y"})
    done = tokenized(parquet(tmp_path / "t.parquet", table), tmp_path / "o", 2)
    assert held(tmp_path / "o") == {"00000002": 0, "00000003": 1}
    assert done.skipped["00000000"] == "ValueError: there is no picture"
    assert done.skipped["00000001"] == "label error: there is no label"
    assert "gone.png" in done.skipped["00000004"]
