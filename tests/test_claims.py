"""One run works in a folder, the other is refused and does no harm; a run goes on with the codes it was trained on."""

import shutil

import pytest

from zipar_train.files import CLAIM, claimed
from zipar_train.recipe import load_recipe
from zipar_train.shards import Layout, read_manifest, read_shard, write_shards
from zipar_train.training.fit import fit


def test_a_refused_run_leaves_the_folder_to_the_one_at_work(tiny, tmp_path, monkeypatch):
    """Both have found no folder: the refused one must not take the claim away with it."""
    recipe = load_recipe("digits-base", [*tiny, "trainer.max_steps=1"])
    folder = tmp_path / "run" / "checkpoints"

    def begins_now(run):  # the other, between our look at the folder and our claim
        folder.mkdir(parents=True)
        other.__enter__()

    other = claimed(folder)
    monkeypatch.setattr("zipar_train.training.fit.write_folder", begins_now)
    monkeypatch.setattr("fcntl.lockf", refusing := Locks())
    with pytest.raises(ValueError, match="is at work in it"):
        fit(recipe)
    assert refusing.held and (folder / CLAIM).is_file()
    other.__exit__(None, None, None)


class Locks:
    """Locks that know processes apart by turn: POSIX locks of one process do not hold against itself."""

    held = False

    def __call__(self, file, how):
        if self.held:
            raise BlockingIOError
        self.held = True


def test_a_claim_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Whoever held it removes it with its folder, after we have opened it and before we lock it."""
    folder, turns = tmp_path / "run", []

    def lock(file, how):
        turns.append(how)
        if len(turns) == 1:
            shutil.rmtree(folder)

    monkeypatch.setattr("fcntl.lockf", lock)
    with claimed(folder):
        assert len(turns) == 2 and "process" in (folder / CLAIM).read_text()


def test_a_run_does_not_go_on_with_other_codes(tiny, shards, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(shards, copy)
    settings = [*tiny, f"data.train={copy}/train.json", f"data.val={copy}/val.json", "trainer.max_epochs=1"]
    fit(load_recipe("digits-base", [*settings, "trainer.max_steps=2"]))
    manifest = read_manifest(copy / "train.json")
    samples = [s for shard in manifest.shards for s in read_shard(copy / "train.json", shard, manifest)]
    layout = Layout(**{k: v for k, v in manifest.model_dump().items() if k not in ("shards", "skipped")})
    write_shards([s._replace(codes=16 - s.codes) for s in samples], copy / "train.json", layout=layout)
    recipe = load_recipe("digits-base", [*settings, "trainer.max_steps=3"])
    with pytest.raises(ValueError, match=r"data\.train = .*other shards than those .*--allow data\.train"):
        fit(recipe, resume=True, allow=["trainer.max_steps"])
    fit(recipe, resume=True, allow=["trainer.max_steps", "data.train"])
