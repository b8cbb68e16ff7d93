"""Pictures as users have them in folders: classes by name, splits by their usual names, what is left out told."""

import numpy as np
import pytest
from commands import sets
from picture_sets import folders, held, png, tar, tokenized

from zipar_train.data.image_sources import open_source, splits
from zipar_train.data.shards import read_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


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
