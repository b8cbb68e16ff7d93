"""Spoilt checkpoints, exports and indexes: one message that names them, or weights that are what they should be."""

import json
import os
import shutil

import pytest
import torch
import yaml
from fuzzing import VALUES, Odd, examples, in_time, plain, spoilt_bytes, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from zipar_train.models.restore import last_checkpoint, read
from zipar_train.recipe.load import dump, load_recipe
from zipar_train.recipe.schema import Recipe


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
