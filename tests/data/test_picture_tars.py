"""Tars of pictures: samples by name, classes by number or name, damage told."""

import io
import json
import tarfile

import pytest
from picture_sets import held, png, tar, tokenized

from zipar_train.data.image_sources import open_source
from zipar_train.data.shards import read_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


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
