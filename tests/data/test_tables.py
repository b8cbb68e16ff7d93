"""Tables of pictures: every layout that datasets loads, classes by number or name, captions, splits."""

import json
import os

import datasets
import pytest
from commands import sets
from picture_sets import LABELLED, folders, held, parquet, rows, tokenized

from zipar_train.data.image_sources import open_source, splits
from zipar_train.data.labels import LabelError
from zipar_train.data.shards import read_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


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


@pytest.mark.slow
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
        "00000001": "label error: label 3.5 is not a class number",
        "00000002": "label error: label -1 is outside 0 .. 1",
        "00000003": "label error: there is no label",
        "00000004": "label error: label nan is not a class number",
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
