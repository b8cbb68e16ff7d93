"""Folders of pictures: every file is read or listed with a reason, whatever it is called and wherever links lead."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from commands import sets
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from zipar_train.data.image_files import picture_files
from zipar_train.data.image_sources import open_source
from zipar_train.data.keys import LONGEST, unique_keys
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.tokenize import tokenize
from zipar_train.io.errors import printable
from zipar_train.recipe.load import load_recipe

LATIN1 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A grey picture in each of two folders."""
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        grey().save(tmp_path / "pictures" / name / "0.png")
    return tmp_path / "pictures"


def grey(level=80):
    return Image.new("L", (8, 8), level)


def tokenized(images, out, **options):
    return tokenize(
        load_recipe("digits", ["model.num_classes=2"]), images=str(images), out=out, progress=False, **options
    )


def samples(out):
    manifest = read_manifest(out / "train.json")
    return [s for shard in manifest.shards for s in read_shard(out / "train.json", shard, manifest)]


# ---------------------------------------------------------------------------------------------------------------------
# What is read, what is listed


def test_pictures_are_known_by_their_content_whatever_they_are_called(folder, tmp_path):
    for name, kind in (
        ("b.gif", "gif"),
        ("c.avif", "avif"),
        ("d.jfif", "jpeg"),
        ("e.jpe", "jpeg"),
        ("f", "png"),
        ("g.jpg_large", "jpeg"),
        ("h.txt", "png"),
        ("i.png", "webp"),
        ("j.tar.gz", "bmp"),
    ):
        grey().save(folder / "a" / name, kind)
    done = tokenized(folder, tmp_path / "out")
    assert (done.manifest.samples, done.manifest.skipped, done.skipped) == (11, 0, {})
    assert {int(sample.codes.max()) for sample in samples(tmp_path / "out")} == {5}


def test_whatever_else_lies_there_is_listed_with_its_reason(folder, tmp_path, run):
    (folder / "labels.csv").write_text("a,b")
    (folder / "a" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "a" / "text").write_text("")
    (folder / "a" / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / "a" / ".checkpoints" / "deep").mkdir(parents=True)
    grey().save(folder / "a" / ".checkpoints" / "deep" / "1.png")
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / ".link").symlink_to(folder / "b")
    os.mkfifo(folder / "a" / "x.jpg")
    status, out, err = run(
        "tokenize", "--recipe", "digits", *sets(["model.num_classes=2"]), "--images", folder, "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert ["10 files or pictures" in line for line in err.splitlines() if "not read" in line] == [True], err
    manifest = read_manifest(tmp_path / "out" / "train.json")
    assert (manifest.samples, manifest.skipped) == (2, 10)
    listed = dict(line.split("\t") for line in (tmp_path / "out" / "train.skipped.txt").read_text().splitlines())
    for name, reason in {
        "labels.csv": "it lies in no class's folder",
        "a/Thumbs.db": "no picture of a known format",
        "a___0": "a/._0.png: no picture of a known format",
        "a/text": "the file is empty",
        "a/drawing.eps": "PostScript, a format that only another program can draw",
        "a/.checkpoints/deep/1.png": "in a hidden folder",
        "a/gone.png": "not a file that can be read (No such file or directory)",
        "a/self.png": "not a file that can be read (Too many levels of symbolic links)",
        "a/.link": "a hidden link to a folder",
        "a/x.jpg": "x.jpg is a pipe, not a file",
    }.items():
        assert reason in listed[name], name


def test_a_folder_of_nothing_readable_says_why(folder, tmp_path):
    for name in ("a", "b"):
        (folder / name / "0.png").unlink()
        (folder / name / "0.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(ValueError, match="PostScript"):
        tokenized(folder, tmp_path / "out")


def test_the_order_is_torchvisions(folder):
    from torchvision.datasets import ImageFolder

    for place in ("a", "a/x", "a/x-y", "a/x/y", "a/X", "b/é"):
        for name in ("2.png", "10.png", "B.PNG", "a.jpeg"):
            (folder / place).mkdir(exist_ok=True)
            grey().save(folder / place / name)
    ours = [file for name in ("a", "b") for file in picture_files(folder / name, root=folder).files]
    assert [str(file) for file in ours] == [file for file, _ in ImageFolder(str(folder)).samples]


# ---------------------------------------------------------------------------------------------------------------------
# Links


def test_links_to_folders_are_followed_once_and_loops_end(folder, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    grey(160).save(tmp_path / "elsewhere" / "deep" / "1.png")
    for name, to in {"l1": ".", "l2": ".", "up": "..", "out": "../../elsewhere", "twice": "../../elsewhere"}.items():
        (folder / "a" / name).symlink_to(to)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    found = picture_files(folder / "a", root=folder)
    assert [str(file.relative_to(folder)) for file in found.files] == ["a/0.png", "a/out/deep/1.png"]
    assert found.skipped == {
        "a/l1": "a link to a folder that is read already",
        "a/l2": "a link to a folder that is read already",
        "a/up": "a link to a folder that holds it",
        "a/twice": "a link to a folder that is read already",
        "a/out/back": "a link to a folder that holds it",
    }
    source = open_source(str(folder), "train")
    assert sorted(source.keys) == ["a_0", "a_out_deep_1", "b_0", "c_deep_1"]  # a class may be a link


def test_a_maze_of_links_ends(folder):
    """2^30 ways through 30 folders, without a loop."""
    for i in range(30):
        (folder / f"maze{i}").mkdir()
        for way in ("left", "right"):
            (folder / f"maze{i}" / way).symlink_to(folder / f"maze{i + 1}")
    (folder / "maze30").mkdir()
    grey().save(folder / "maze30" / "end.png")
    (folder / "a" / "maze").symlink_to(folder / "maze0")
    found = picture_files(folder / "a", root=folder)
    assert len(found.files) == 2 and len(found.skipped) == 30


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names_of_any_bytes_become_keys_and_lines(folder, tmp_path):
    for name in (LATIN1, "caf\\xe9", "two\nlines", "tab\there", "é", "a.b.c", "\u2028", " "):
        grey().save(folder / "a" / f"{name}.png", "png")
        (folder / "a" / f"{name}.broken.png").write_bytes(b"broken")
        (folder / "a" / f"{name}.db").write_bytes(b"no picture")
    root = folder.rename(folder.with_name(LATIN1))
    done = tokenized(root, tmp_path / LATIN1 / "out")
    assert (done.manifest.samples, done.manifest.skipped) == (10, 16)
    listed = (tmp_path / LATIN1 / "out" / "train.skipped.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(listed) == len(set(listed)) == 16
    assert any(line.startswith("a/caf\\xe9.db\t") for line in listed)
    assert any(line.startswith("a_caf_xe9_broken") and " a/caf\\xe9.broken.png: " in line for line in listed)
    keys = {sample.key for sample in samples(tmp_path / LATIN1 / "out")}
    assert {"a_caf_xe9", "a_é", "a_a_b_c", "a_two_x0alines"} <= keys and len(keys) == 10
    assert json.loads((tmp_path / LATIN1 / "out" / "train.json").read_text())["source"].endswith("caf\\xe9")


def test_long_names_are_shortened_so_that_every_reader_takes_them(folder, tmp_path):
    deep = folder / "a" / "/".join(["d" * 240] * 4)
    deep.mkdir(parents=True)
    for name in ("n" * 100, "n" * 99 + "m", "é" * 100):
        grey().save(deep / f"{name}.png")
    tokenized(folder, tmp_path / "out")
    keys = {sample.key for sample in samples(tmp_path / "out")}
    assert len(keys) == 5
    assert max(len(os.fsencode(f"{key}.features.npy")) for key in keys) <= 255
    shard = tmp_path / "out" / "train-000000.tar"
    assert {sample["__key__"] for sample in wds.WebDataset(str(shard), shardshuffle=False, empty_check=False)} == keys
    with tarfile.open(shard) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert len(list((tmp_path / "unpacked").iterdir())) == 10


@settings(max_examples=200)
@given(
    st.lists(
        st.text() | st.binary().map(os.fsdecode) | st.sampled_from(["x" * 300, "x" * 301, "é" * 400, "a.b", "a/b"])
    )
)
def test_keys_are_unique_short_and_plain(names):
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert len(key.encode()) <= LONGEST and not set("./\\\n\t\0") & set(key)
    assert unique_keys(names) == keys


def test_ordinary_names_keep_their_keys():
    assert unique_keys(["n01440764/n01440764_10026", "class1/picture 3", "é/ü"]) == [
        "n01440764_n01440764_10026",
        "class1_picture 3",
        "é_ü",
    ]
    assert printable("é \U0001f600 'x' \\") == "é \U0001f600 'x' \\"


def test_a_tall_picture_in_a_tar_is_tokenized_like_one_in_a_folder(folder, tmp_path):
    tall = noise(1, 5000)
    tall.save(folder / "a" / "0.png")
    buffer = io.BytesIO()
    tall.save(buffer, "png")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in (("0.png", buffer.getvalue()), ("0.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    tokenized(folder, tmp_path / "out")
    tokenized(tmp_path / "set.tar", tmp_path / "out tar")
    held = {sample.key: sample.codes for sample in samples(tmp_path / "out")}
    assert np.array_equal(held["a_0"], samples(tmp_path / "out tar")[0].codes)
