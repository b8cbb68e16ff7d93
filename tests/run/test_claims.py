"""One run works in a folder, the other is refused and does no harm; a run goes on with the codes it was trained on."""

import json
import multiprocessing
import shutil
from contextlib import ExitStack, contextmanager, suppress

import pytest

from zipar_train.data.manifest import Layout
from zipar_train.data.shards import read_manifest, read_shard, write_shards
from zipar_train.io.files import CLAIM, folder_lock
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit

FORK = multiprocessing.get_context("fork")


@contextmanager
def another(folder, rank=0, world=1):
    """Another process that holds the folder."""
    ours, theirs = FORK.Pipe()

    def hold():
        with folder_lock(folder, rank, world):
            theirs.send("held")
            theirs.recv()

    process = FORK.Process(target=hold)
    process.start()
    assert ours.poll(60) and ours.recv() == "held"
    try:
        yield process
    finally:
        ours.send("over")
        process.join()


def refused(folder, rank=0, world=1):
    """Whether a third process is refused."""
    with FORK.Pool(1) as pool:
        return pool.apply(_refused, (folder, rank, world))


def _refused(folder, rank, world):
    with suppress(ValueError), folder_lock(folder, rank, world):
        return False
    return True


@pytest.mark.slow
def test_processes_that_share_work_hold_its_folder_together(tmp_path):
    with another(tmp_path) as alone:
        assert refused(tmp_path) and refused(tmp_path, 0, 2) and refused(tmp_path, 1, 2)
        assert f"process {alone.pid} on" in (tmp_path / CLAIM).read_text()
    assert not list(tmp_path.iterdir())
    with another(tmp_path, 1, 3), another(tmp_path, 0, 3):
        assert refused(tmp_path) and refused(tmp_path, 0, 3) and refused(tmp_path, 1, 3)
        assert refused(tmp_path, 2, 4) and refused(tmp_path, 0, 2)
        assert not refused(tmp_path, 2, 3)
    assert not refused(tmp_path) and not refused(tmp_path, 1, 2)
    with another(tmp_path) as killed:
        killed.kill()
        killed.join()
        assert not refused(tmp_path)


def test_a_refused_run_leaves_the_folder_to_the_one_at_work(tiny, tmp_path, monkeypatch):
    """Both have found no folder: the refused one must not take the claim away with it."""
    recipe = load_recipe("digits-base", [*tiny, "trainer.max_steps=1"])
    folder = tmp_path / "run" / "checkpoints"
    with ExitStack() as stack:
        begins_now = another(folder)  # between our look at the folder and our claim
        monkeypatch.setattr("zipar_train.training.fit.write_folder", lambda run: stack.enter_context(begins_now))
        with pytest.raises(ValueError, match="is at work in it"):
            fit(recipe)
        assert (folder / CLAIM).is_file() and refused(folder)


def test_a_claim_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Whoever held it removes it with its folder, after we have opened it and before we lock it."""
    folder, turns = tmp_path / "run", []

    def lock(*_):
        turns.append(None)
        if len(turns) == 1:
            shutil.rmtree(folder)

    monkeypatch.setattr("zipar_train.io.files._lock", lock)
    with folder_lock(folder):
        assert len(turns) == 2 and "process" in (folder / CLAIM).read_text()


@pytest.fixture
def trained(tiny, tmp_path):
    recipe = load_recipe("digits-base", [*tiny, f"run_dir={tmp_path}/trained", "trainer.max_steps=1"])
    return [*(f"--set={o}" for o in (*tiny, "evaluate.images=10", "data.workers=0")), "--checkpoint", fit(recipe)]


def test_a_second_evaluation_in_a_folder_is_refused(trained, tmp_path, run):
    verb = ("evaluate", "--recipe", "digits-base", *trained, "--windows=8", "--out", tmp_path / "out")
    for more in ((), ("--search-guidance=1,2", "--search-images=10")):
        with another(tmp_path / "out"):
            status, _, err = run(*verb, *more)
            assert status == 2 and f"{tmp_path}/out: process" in err and "is at work in it" in err
            assert [file.name for file in (tmp_path / "out").iterdir()] == [CLAIM]


def test_a_second_sweep_in_a_folder_is_refused(tiny, tmp_path, run):
    grid = tmp_path / "grid.yaml"
    grid.write_text("method: grid\nparameters: {optim.lr: {values: [1e-4, 1e-3]}}\n")
    with another(tmp_path / "out"):
        status, _, err = run(
            "sweep", "--recipe", "digits-base", *(f"--set={o}" for o in tiny), "--file", grid, "--out", tmp_path / "out"
        )
        assert status == 2 and "is at work in it" in err
        assert [file.name for file in (tmp_path / "out").iterdir()] == [CLAIM]


def test_a_second_tokenize_or_import_of_a_split_is_refused(tmp_path, run):
    out = tmp_path / "out"
    codes = tmp_path / "codes.jsonl"
    codes.write_text(json.dumps({"class_id": 3, "tokens": 64 * [1]}))
    importing = (
        "shards",
        "import",
        "--recipe",
        "digits-base",
        "--set",
        "model.codebook_size=17",
        "--codes",
        codes,
        "--out",
        out,
    )
    with another(out / ".train"):
        for verb in (("tokenize", "--recipe", "digits-base", "--images", "digits", "--out", out), importing):
            status, _, err = run(*verb)
            assert status == 2 and f"{out}/.train: process" in err and "is at work in it" in err
        assert [str(file.relative_to(out)) for file in out.rglob("*")] == [".train", f".train/{CLAIM}"]
        assert run("tokenize", "--recipe", "digits-base", "--images", "digits", "--out", out, "--split", "val")[0] == 0
    status, _, err = run(*importing)
    assert status == 0, err
    assert not (out / ".train").exists()


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"data\.train = .*other shards than those .*--allow-change data\.train"):
        fit(recipe, resume=True, allow=["trainer.max_steps"])
    fit(recipe, resume=True, allow=["trainer.max_steps", "data.train"])
