"""Shard sets with several grids, when something is wrong with them, and the loader's processes, steps and positions."""

import json
import multiprocessing
import shutil
from collections import Counter

import pytest
import several_grids
from several_grids import COUNT, NEAREST, overrides

from zipar_train.data.datamodule import ShardDataModule
from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Manifest
from zipar_train.data.shards import read_manifest
from zipar_train.data.tokenize import tokenize
from zipar_train.recipe.load import RecipeError, load_recipe
from zipar_train.run.signals import Stopped


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return several_grids.words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def made(words, tmp_path_factory):
    return several_grids.shards(words, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def of_grid(path, sides):
    """The shards with a grid."""
    manifest = read_manifest(path)
    return [shard for shard in manifest.shards if (shard.grid or manifest.grid) == sides]


def test_a_set_is_not_taken_for_one_of_other_grids(made, words, tmp_path):
    settings = {"images": str(made / "train.tar"), "out": tmp_path, "progress": False}
    one = load_recipe("emu3-gen", overrides(words, tmp_path, "model.other_grids=[]"))
    tokenize(one, **settings)
    several = load_recipe("emu3-gen", overrides(words, tmp_path))
    message = r"other_grids: None, now \[\[3, 6\], \[6, 3\]\]\). Choose another --out"
    with pytest.raises(ValueError, match=message):
        tokenize(several, **settings)
    notes = tmp_path / ".val"
    notes.mkdir()
    settings["split"] = "val"
    layout = read_manifest(tmp_path / "train.json").model_dump(mode="json", exclude={"shards", "skipped"})
    layout = {key: value for key, value in layout.items() if value is not None}  # as written before other_grids existed
    (notes / "settings.json").write_text(json.dumps(layout | {"per_shard": 2000, "classes": None, "tokenizer": None}))
    with pytest.raises(ValueError, match="made otherwise.*" + message):
        tokenize(several, **settings)


def test_a_stopped_tokenization_resumes_to_the_same_bytes(made, words, tmp_path, monkeypatch):
    from zipar_train.data import tokenize as module

    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    settings = {"images": str(made / "train.tar"), "out": tmp_path, "per_shard": 11, "progress": False}
    write, written = module._write, []

    def stopping(*args):
        if len(written) == 1:
            raise Stopped(2)
        written.append(args[2])
        return write(*args)

    monkeypatch.setattr(module, "_write", stopping)
    with pytest.raises(Stopped):
        tokenize(recipe, **settings)
    assert not (tmp_path / "train.json").exists()
    written.append("not again")
    tokenize(recipe, **settings)
    assert written == [0, "not again", 1, 2]
    for path in [made / "train.json", *made.glob("train-*.tar")]:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_manifest_of_one_grid_has_the_form_and_the_checksum_that_it_had_before_there_were_several():
    shard = '{"name":"a-000000.tar","samples":3,"sha256":"' + "0" * 64 + '"}'
    before = (
        '{"source":"x","grid":[4,4],"codes":12,"classes":10,"views":"one","tokenizer":null,"features":false,'
        f'"images":3,"skipped":0,"shards":[{shard}]}}'
    )
    manifest = Manifest.model_validate_json(before)
    assert manifest.model_dump_json(exclude=manifest.unset) == before


def test_sides_that_no_shard_has_are_refused_with_those_there_are(shards):
    for shard in of_grid(shards / "train.json", (4, 4)):
        changed(shards / "train.json", lambda content, name=shard.name: content.update(
            shards=[each for each in content["shards"] if each["name"] != name]
        ))  # fmt: skip
    with pytest.raises(ValueError, match=r"train.json has no images of 4x4 codes, only of 3x6, 6x3: use shards"):
        read_manifest(shards / "train.json", sides=[4, 4])


def test_a_shard_that_claims_another_grid_is_named(shards):
    (shard, *_) = of_grid(shards / "train.json", (3, 6))

    def lie(content):
        next(each for each in content["shards"] if each["name"] == shard.name)["grid"] = [6, 3]

    changed(shards / "train.json", lie)
    with pytest.raises(ValueError, match=rf"{shard.name}, sample .*: codes of shape \(1, 3, 6\), not \(views, 6, 3\)"):
        list(ShardLoader(shards / "train.json", batch_size=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_damaged_shard_are_replaced_by_others_of_its_grid(shards, workers):
    train, (bad, *_) = shards / "train.json", of_grid(shards / "train.json", (3, 6))
    (shards / bad.name).write_bytes(b"damage")
    loader = ShardLoader(train, batch_size=2, shuffle=20, workers=workers, damaged="skip")
    batches = list(loader)
    assert len(batches) == len(loader)
    keys = [(key, batch.sides) for batch in batches for key in batch.keys]
    assert all(NEAREST[int(key[-4:]) % 5] == sides for key, sides in keys)
    assert not any(key.startswith(bad.name) for key, _ in keys)
    assert sum(loader.damaged.values()) == bad.samples
    for shard in of_grid(train, (3, 6)):
        (shards / shard.name).write_bytes(b"damage")
    with pytest.raises(ValueError, match="none of its shards of 3 x 6 codes can be read"):
        list(ShardLoader(train, batch_size=2, shuffle=20, workers=workers, damaged="skip"))


def test_grids_share_the_loader_processes(made):
    for workers in (1, 2):
        loader = iter(ShardLoader(made / "train.json", batch_size=2, shuffle=20, workers=workers))
        seen = {next(loader).sides for _ in range(10)}
        assert len(seen) > 1
        assert len(multiprocessing.active_children()) == workers
        del loader


@pytest.mark.parametrize("shuffle", [1, 20])
def test_every_step_has_as_many_batches_and_one_grid(made, shuffle):
    """6 to 12 images of a grid, in steps of 5 batches of 1 image."""

    def batches(first):
        loader = ShardLoader(made / "train.json", batch_size=1, step=5, shuffle=shuffle)
        loader.load_state_dict({"epoch": 0, "steps": first})
        found = [(batch.sides, batch.keys) for batch in loader]
        assert loader.epoch == 1 and loader.batches == 0
        return found

    whole = batches(0)
    loader = ShardLoader(made / "train.json", batch_size=1, step=5, shuffle=shuffle)
    assert len(whole) == len(loader) == 5 * (3 + 3 + 2)  # 12, 12 and 6 images
    for step in range(0, len(whole), 5):
        assert len({sides for sides, _ in whole[step : step + 5]}) == 1
        assert batches(step // 5) == whole[step:]
    assert len(Counter(key for _, keys in whole for key in keys)) == COUNT


def test_a_grid_with_fewer_images_than_a_step_is_named(made):
    message = r"has 6 images of 6 x 3 codes, and a step takes 8: .* tokenize without this grid in model.other_grids"
    with pytest.raises(ValueError, match=message):
        ShardDataModule(made / "train.json", made / "val.json", batch_size=8, step=8)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("digits", ["zipar.preview_window=2"], "only glm-image's grids have a preview: set it to null"),
        ("glm-image", ["zipar.preview_window=17"], "zipar.preview_window = 17: wider than a row of 16 codes"),
        ("emu3-gen", ["model.other_grids=[[92,90]]", "data.micro_batch_size=128"], "logits a step, more than"),
        ("lumina-mgpt-7b-512", ["model.other_grids=[[128,128]]", "optim.global_batch_size=16385"], "a step of 16,385"),
    ],
)
def test_numbers_that_do_not_fit_a_preview_or_the_largest_grid(recipe, changes, message):
    load_recipe(recipe, ["model.other_grids=[]", *changes[1:]] if len(changes) > 1 else [])
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, changes)
