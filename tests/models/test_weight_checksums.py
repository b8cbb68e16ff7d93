"""Checksums of weights: of the bytes that were read, of all parts of a folder."""

import os

import pytest
import torch
from llamagen_files import c2i_state
from safetensors.torch import save_file

from zipar_train.io.files import sha256
from zipar_train.models import files as published
from zipar_train.models.restore import read


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_checksum_is_of_the_bytes_that_were_read(tmp_path, monkeypatch, moment):
    """Another file takes the place while the first is read, and once it is read."""
    path, states = tmp_path / "w.pt", [c2i_state(seed=seed) for seed in range(2)]
    for state, name in zip(states, ("w.pt", "next.pt"), strict=True):
        torch.save(state, tmp_path / name)
    sums = [sha256(path), sha256(tmp_path / "next.pt")]
    inner = published._content

    def raced(path):
        content = inner(path) if moment == "after" else None
        if (tmp_path / "next.pt").exists():
            os.replace(tmp_path / "next.pt", path)
        return content if content is not None else inner(path)

    monkeypatch.setattr(published, "_content", raced)
    saved = read(path, checksum=True)
    drawn = next(i for i, state in enumerate(states) if torch.equal(saved.state["norm.weight"], state["norm.weight"]))
    assert saved.sha256 == sums[drawn]


def test_a_file_that_is_replaced_all_the_time_is_told(tmp_path, monkeypatch):
    torch.save(c2i_state(), tmp_path / "w.pt")
    inner = published._content

    def raced(path):
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
        return inner(path)

    monkeypatch.setattr(published, "_content", raced)
    with pytest.raises(ValueError, match=r"w.pt was replaced 20 times while it was read"):
        read(tmp_path / "w.pt", checksum=True)


def test_a_folders_checksum_is_of_all_its_parts(tmp_path):
    state = c2i_state(dtype=torch.float32)
    names = sorted(state)
    (tmp_path / "config.json").write_text("{}")
    for part, some in (("a", names[:5]), ("b", names[5:])):
        save_file({name: state[name] for name in some}, tmp_path / f"{part}.safetensors")
    before = read(tmp_path, checksum=True).sha256
    assert read(tmp_path).sha256 is None
    save_file({name: state[name] + 1 for name in names[5:]}, tmp_path / "b.safetensors")
    assert read(tmp_path, checksum=True).sha256 != before
