"""Small trees of odd image files: each is in the shards or listed with a reason; equal content, equal codes.

`ZIPAR_FUZZ=N pytest tests/data/test_fuzz_pictures.py` tries N trees, others each time.
"""

import io
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from fuzzing import examples, in_time, spoilt_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.tokenize import tokenize
from zipar_train.recipe.load import load_recipe

datasets.disable_progress_bars()


FORMATS = ["jpeg", "png", "webp", "avif", "gif", "bmp", "tiff", "ppm", "jpeg2000", "ico", "tga", "pcx", "eps"]


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def contents():
    """Pictures of many modes, depths and formats, some on their side."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    noise = Image.fromarray(rng.integers(0, 256, (9, 13, 4)).astype(np.uint8))
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"):
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (9, 13)).astype(np.uint16))
        elif mode == "F":
            image = Image.fromarray(rng.random((9, 13)).astype(np.float32))
        elif mode == "LAB":
            image = Image.frombytes("LAB", (9, 13), rng.bytes(9 * 13 * 3))
        else:
            image = noise.convert("RGB" if mode in ("HSV", "YCbCr") else "RGBA").convert(mode)
        for kind in FORMATS:
            for options in ({}, {"exif": exif}):
                try:
                    yield saved(image, kind, **options)
                except (OSError, ValueError, KeyError, SystemError):
                    continue  # no such mode in this format
    yield saved(noise.resize((1, 3000)), "png")
    yield saved(noise.resize((2000, 1)), "png")
    yield saved(noise, "gif", save_all=True, append_images=[noise.rotate(90)])
    yield from (b"", b"a text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"\0" * 600, b"\xff\xd8\xff")


CONTENTS = list(dict.fromkeys(contents()))
ENDINGS = ["", ".png", ".jpg", ".JPEG", ".jfif", ".txt", ".eps", ".jpg_large", ".tar.gz", ".db", "."]
STEMS = st.one_of(
    st.sampled_from(["x", "._x", ".hidden", "caf\udce9", "caf\\xe9", "\n", "\t", " ", "__x__", "-", "a.b", "é", "a_x"]),
    st.binary(min_size=1, max_size=12).map(os.fsdecode),
    st.text(min_size=1, max_size=6),
    st.sampled_from(["n", "é", "\U0001f600", "\udcff"]).map(lambda letter: letter * 200),
).filter(lambda name: "/" not in name and "\0" not in name)
FOLDERS = st.sampled_from(["", "", "", "deeper", "deeper/still", ".hidden", "d" * 200, "d" * 200 + "/" + "e" * 200])
KINDS = ["file"] * 8 + ["fifo", "socket", "broken link", "own link", "link", "loop", "up", "outside", "empty folder"]
NODES = st.lists(
    st.tuples(
        st.sampled_from(["a", "a", "b", "b", ""]),
        FOLDERS,
        STEMS,
        st.sampled_from(ENDINGS),
        st.sampled_from(KINDS),
        st.sampled_from(CONTENTS) | spoilt_bytes(CONTENTS),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("digits", ["model.num_classes=2", "data.workers=0"])


def built(root, nodes):
    """Make the tree. Returns how many things in it are to be accounted for, and the bytes and classes to be read."""
    good, count, read = CONTENTS[0], 0, []
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "there.png").write_bytes(good)
    (outside / "notes.txt").write_bytes(b"no picture")
    linked = set()
    for label in "ab":
        (root / label).mkdir(parents=True)
        (root / label / "0000.png").write_bytes(good)
        count, read = count + 1, [*read, (good, label)]
    for label, folder, stem, ending, kind, content in nodes:
        if not label and (folder or kind not in KINDS[:12]):
            continue  # it would be a class
        place = root / label / folder
        hidden = folder.startswith(".")
        try:
            place.mkdir(parents=True, exist_ok=True)
            path = place / (stem + ending)
            if os.path.lexists(path) or path.name in (".", "..", "") or place.resolve() != place:  # behind a link
                continue
            if kind == "file":
                path.write_bytes(content)
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "socket":
                os.mknod(path, stat.S_IFSOCK | 0o600)
            elif kind == "empty folder":
                path.mkdir()
            else:
                to = {
                    "broken link": "nowhere",
                    "own link": path.name,
                    "link": root / "a" / "0000.png",
                    "loop": ".",
                    "up": "..",
                    "outside": outside,
                }[kind]
                path.symlink_to(to)
        except OSError:  # a name that this file system refuses
            continue
        if kind == "outside" and label not in linked and not hidden and not path.name.startswith("."):
            linked.add(label)
            count, read = count + 2, [*read, (good, label)]
        elif kind != "empty folder":
            count += 1
        if kind in ("file", "link") and label and not hidden:
            read.append((content if kind == "file" else good, label))
    return count, read


def tarred(path, read):
    with tarfile.open(path, "w") as tar:
        for i, (content, label) in enumerate(read):
            for kind, data in (("png", content), ("cls", str("ab".index(label)).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def held(out):
    """Codes and classes, in order."""
    manifest = read_manifest(out / "train.json")
    samples = [sample for shard in manifest.shards for sample in read_shard(out / "train.json", shard, manifest)]
    return manifest, sorted((sample.codes.tolist(), sample.condition) for sample in samples)


@pytest.mark.slow
@examples(60)
@given(nodes=NODES)
def test_every_file_of_a_tree_is_read_or_listed_and_all_sources_agree(recipe, nodes):
    work = Path(tempfile.mkdtemp()).resolve()
    try:
        count, read = built(work / "pictures", nodes)
        with in_time():
            tokenize(recipe, images=str(work / "pictures"), out=work / "out", progress=False)
        manifest, codes = held(work / "out")
        assert manifest.samples + manifest.skipped == count
        listing = work / "out" / "train.skipped.txt"
        listed = listing.read_text(encoding="utf-8").split("\n")[:-1] if manifest.skipped else []
        assert len(listed) == manifest.skipped
        assert all(len(line.split("\t")) == 2 and all(line.split("\t")) for line in listed)
        tarred(work / "set.tar", read)
        table = {
            "image": [{"bytes": content, "path": None} for content, _ in read],
            "label": ["ab".index(label) for _, label in read],
        }
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        datasets.Dataset.from_dict(table, features=kinds).save_to_disk(work / "saved")
        for source in ("set.tar", "saved"):
            with in_time():
                tokenize(recipe, images=str(work / source), out=work / f"out {source}", progress=False)
            assert held(work / f"out {source}")[1] == codes, source
    finally:
        shutil.rmtree(work)
