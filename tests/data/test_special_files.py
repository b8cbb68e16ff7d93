"""Pipes, devices and folders: refused where a file is named, and nothing waits for them."""

import os
from pathlib import Path

import pytest

from zipar_train.data.image_sources import open_source
from zipar_train.data.import_codes import import_codes
from zipar_train.data.shards import read_manifest
from zipar_train.doctor.checks import problem
from zipar_train.doctor.sources import whole
from zipar_train.evaluation.captions import captions_of
from zipar_train.evaluation.scores.adm_npz import read_reference
from zipar_train.io import safe_yaml
from zipar_train.io.files import open_regular, regular, sha256
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run import checkpoints


@pytest.mark.parametrize(
    "name", ["x.json", "x.yaml", "x.npz", "x.csv", "x.tar", "x.jsonl", "x.safetensors", "step-00000005.ckpt"]
)
def test_pipes_are_refused_where_files_are_named_and_nothing_waits(tmp_path, name):
    path = tmp_path / "run" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    calls = {
        "x.json": [lambda: read_manifest(path), lambda: captions_of(str(path))],
        "x.yaml": [lambda: safe_yaml.read(path)],
        "x.npz": [lambda: read_reference(path)],
        "x.csv": [lambda: captions_of(str(path))],
        "x.tar": [
            lambda: open_source(str(path.parent), "train"),
            lambda: import_codes(load_recipe("digits"), codes=path, out=tmp_path),
        ],
        "x.jsonl": [lambda: import_codes(load_recipe("digits"), codes=path, out=tmp_path)],
        "x.safetensors": [lambda: open_regular(path), lambda: sha256(path)],
        "step-00000005.ckpt": [lambda: read(tmp_path / "run")],
    }
    for call in calls[name]:
        with pytest.raises((ValueError, OSError), match=name.replace(".", "[.]")):
            call()
    assert "is a pipe, not a file" in checkpoints.damage(path)
    assert "cannot be read" in whole("model.weights", path, problem, "Copy it").seen


def test_what_is_a_regular_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert regular(tmp_path / "link").read_bytes() == b"x"
    read, write = os.pipe()
    os.write(write, b"method: grid")
    os.close(write)
    assert safe_yaml.read(Path(f"/dev/fd/{read}")) == {"method": "grid"}  # as of a shell's <(command)
    os.close(read)
    for path, words in ((Path("/dev/zero"), "is a device"), (tmp_path, "is a folder"), (tmp_path / "none", "none")):
        with pytest.raises(OSError, match=words):
            regular(path)
