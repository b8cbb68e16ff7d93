"""Checkpoints that a run continues from: which files are its own, which are whole, and what each entry must be."""

import copy
import os
import re
import shutil

import pytest
import torch
from short_runs import quick, states_equal

from zipar_train.data.manifest import Layout
from zipar_train.data.shards import read_manifest, read_shard, write_shards
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.checkpoints import damage, last_checkpoint, newest_first, older
from zipar_train.run.resume_state import ResumeState
from zipar_train.training.fit import fit, to_continue
from zipar_train.training.resume_check import check_fits
from zipar_train.training.trainer import build_module

SHORT = [
    "zipar.windows={8: 1}",
    "data.micro_batch_size=16",
    "trainer.limit_train_batches=6",
    "trainer.max_epochs=1",
    "trainer.limit_val_batches=1",
    "checkpoint_every=2",
    "checkpoint_keep=3",
    "optim.ema_decay=0.9",
]
LONGER = {"resume": True, "allow": ["trainer.max_epochs"]}


@pytest.fixture(scope="module")
def made(made_tiny, tmp_path_factory):
    """A run of six steps with three checkpoints, and its overrides."""
    folder = tmp_path_factory.mktemp("made")
    fit(load_recipe("digits-base", quick(made_tiny, folder, "run", *SHORT)))
    return folder / "run"


@pytest.fixture
def run(made, tiny, tmp_path):
    """A copy of the run, and the recipe that continues it for an epoch."""
    shutil.copytree(made, tmp_path / "run")
    overrides = quick(tiny, tmp_path, "run", *SHORT, "trainer.max_epochs=2")
    return tmp_path / "run" / "checkpoints", load_recipe("digits-base", overrides)


def test_only_names_that_runs_write_are_theirs(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    theirs = [
        "step-00000010-keep.ckpt",
        "step-00000010 (copy).ckpt",
        "step-10.ckpt",
        "step-00000010.ckpt.bak",
        "step-0000001x.ckpt",
        "step-000000100.ckpt",
        "my-step-00000010.ckpt",
        "best.ckpt",
    ]
    for name in (*theirs, "step-00000009.ckpt", "step-99999999.ckpt", "step-100000000.ckpt"):
        (folder / name).touch()
    (folder / "step-00000011.ckpt").mkdir()
    names = [path.name for path in older(tmp_path)]
    assert names == ["step-100000000.ckpt", "step-99999999.ckpt", "step-00000011.ckpt", "step-00000009.ckpt"]
    assert older(tmp_path / "none") == []


@pytest.mark.slow
def test_a_persons_copies_stay_where_they_are(run):
    folder, recipe = run
    copies = ["step-00000002-keep.ckpt", "step-00000004.ckpt.bak", "last (copy).ckpt", "last.ckpt.old"]
    for name in copies:
        shutil.copy(folder / "last.ckpt", folder / name)
    fit(recipe, **LONGER)
    assert all((folder / name).is_file() for name in copies)
    assert [path.name for path in older(folder.parent)] == ["step-00000010.ckpt", "step-00000008.ckpt"]


def link(path):
    path.symlink_to("/mnt/not-mounted/last.ckpt")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (link, "it is a link to /mnt/not-mounted/last.ckpt, which is not there"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (os.mkfifo, "is a pipe, not a file"),
        (lambda path: path.touch(), "File is not a zip file"),
    ],
)
def test_something_else_in_the_place_of_a_checkpoint_is_no_empty_folder(run, capsys, make, words):
    folder, recipe = run
    for path in folder.glob("*.ckpt"):
        path.unlink()
    make(folder / "last.ckpt")
    assert last_checkpoint(folder.parent) == folder / "last.ckpt"
    assert words in str(damage(folder / "last.ckpt"))
    for resume in (True, False):
        with pytest.raises(ValueError, match="last.ckpt is damaged|already holds a run"):
            fit(recipe, resume=resume)
        assert os.path.lexists(folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt"):
        read(folder.parent)
    assert words in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("hurt", ["cut", "link", "entry", "text"])
def test_the_checkpoint_before_is_continued_and_kept_whole(run, capsys, hurt):
    """The damaged one does not take its place, so that a kill between two renames loses nothing."""
    folder, recipe = run
    last, before = folder / "last.ckpt", folder / "step-00000004.ckpt"
    expected = read(before).state
    if hurt == "entry":
        content = torch.load(last, weights_only=True)
        del content["loops"]["fit_loop"]["epoch_progress"]
        torch.save(content, last)
    elif hurt == "link":
        last.unlink()
        link(last)
    else:
        last.write_bytes(b"an error page" if hurt == "text" else last.read_bytes()[:-1000])
    fit(recipe.model_copy(update={"checkpoint_keep": 9}), **LONGER)
    out = capsys.readouterr().out
    assert str(last) in out and "an older one is looked for" in out
    assert f"Resuming from {before}: step 4, in epoch 1." in out
    names = [path.name for path in newest_first(folder.parent)]
    assert names == ["last.ckpt", *(f"step-{step:08d}.ckpt" for step in (10, 8, 6, 4, 2))]
    assert not any(damage(path) for path in newest_first(folder.parent))
    assert read(last).extra["global_step"] == 12
    assert states_equal(read(before).state, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Entries


ELSEWHERE = ("recipe", "state_dict", "data", "current_model_state", "averaging_state", "callbacks", "shards")
UNREAD = {  # keys that Lightning and torch write beside those that are read
    *("_get_lr_called_within_step", "_is_initial", "_last_lr", "combined_loader", "state"),
    *("weight_decay", "betas", "fused", "decoupled_weight_decay", "initial_lr"),
}


def entries(content, before=()):
    """Paths of the entries that are read; of lists, the first."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content[:1]):
        path = (*before, key)
        if path[0] in ELSEWHERE or key in UNREAD or before[-1:] == ("lr_lambdas",):
            continue
        yield path
        if isinstance(value, dict | list):
            yield from entries(value, path)


def changed(content, path, change):
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    change(part, path[-1])
    return content


@pytest.mark.slow
def test_every_entry_that_is_read_must_be_there_in_its_type(made):
    content = torch.load(made / "checkpoints" / "last.ckpt", weights_only=True)
    ResumeState.check(content, where=made)
    paths = list(entries(content))
    assert len(paths) > 100
    for path in paths:
        if isinstance(path[-1], str):
            with pytest.raises(ValueError, match=f"lacks its entry {re.escape('.'.join(map(str, path)))}. ") as missing:
                ResumeState.check(changed(content, path, lambda part, key: part.pop(key)), where=made)
            assert str(made) in str(missing.value)
        with pytest.raises(ValueError, match=f"its entry {re.escape('.'.join(map(str, path)))}.* = .*: "):
            ResumeState.check(
                changed(content, path, lambda part, key: part.__setitem__(key, torch.ones(2))), where=made
            )
        ResumeState.check(content, where=made)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3), r"state.0.exp_avg is \[3\], not a tensor of"),
        (("optimizer_states", 0, "state", 0, "exp_avg_sq"), None, r"state.0.exp_avg_sq is NoneType"),
        (("optimizer_states", 0, "state", 0, "step"), 7, r"state.0.step is int, not a tensor of shape \[\]"),
        (("optimizer_states", 0, "state", 99), {}, r"state.99 is of no parameter"),
        (("optimizer_states", 0, "param_groups", 0, "params"), [0], r"optimizer_states is of groups of \[1, "),
        (
            ("state_dict", "model.lm_head.weight"),
            torch.zeros(3),
            r"entry state_dict is not of this model. 1 of another",
        ),
        (("state_dict", "model.surplus"), torch.zeros(3), r"entry state_dict is not of this model. 1 surplus: surplus"),
        (
            ("current_model_state", "model.lm_head.weight"),
            torch.zeros(3, dtype=torch.int64),
            r"entry current_model_state",
        ),
        (("current_model_state",), None, r"lacks its entry current_model_state, and its weights are averages"),
        (("averaging_state",), None, r"lacks its entry averaging_state, and its weights are averages"),
        (("averaging_state", "n_averaged"), torch.zeros(3), r"averaging_state.n_averaged is not a single number"),
        (
            ("current_model_state", "model.lm_head.weight"),
            "text",
            r"current_model_state.lm_head.weight is not a tensor",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named(run, path, value, message):
    folder, recipe = run
    content = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save(changed(content, path, lambda part, key: part.__setitem__(key, value)), folder / "last.ckpt")
    saved, module = read(folder / "last.ckpt"), build_module(recipe, weights=False)
    with pytest.raises(ValueError, match=message) as refused:
        check_fits(saved, module)
    assert "last.ckpt" in str(refused.value)


def test_what_is_missing_in_all_is_told_of_each(run):
    folder, recipe = run
    for path in newest_first(folder.parent):
        content = torch.load(path, weights_only=True)
        del content["ShardDataModule"]
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"last.ckpt lacks its entry ShardDataModule.*00000004.ckpt lacks its entry"):
        to_continue(recipe, folder.parent, LONGER["allow"])


@pytest.mark.slow
def test_other_shards_at_the_same_path_are_a_difference(shards, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    places = [f"data.train={data}/train.json", f"data.val={data}/val.json"]
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "run", *SHORT, *places)))
    recipe = load_recipe("digits-base", quick(tiny, tmp_path, "run", *SHORT, *places, "trainer.max_epochs=2"))
    for key in ("train", "val"):
        before = [(path, path.read_bytes()) for path in data.iterdir()]
        again(data / f"{key}.json")
        with pytest.raises(
            ValueError,
            match=rf"data.{key} = .*{key}.json: these are other shards .*last.ckpt .* --allow-change data.{key}",
        ):
            fit(recipe, **LONGER)
        for path, content in before:
            path.write_bytes(content)
    again(data / "train.json")
    fit(recipe, resume=True, allow=[*LONGER["allow"], "data.train"])
    fit(recipe, resume=True)  # they are its own now
    assert read(tmp_path / "run").extra["shards"]["data.train"] == read_manifest(data / "train.json").checksum


def again(path):
    """Make shards again: as many images, other codes."""
    manifest = read_manifest(path)
    samples = [
        sample._replace(codes=16 - sample.codes)
        for shard in manifest.shards
        for sample in read_shard(path, shard, manifest)
    ]
    layout = {key: value for key, value in manifest.model_dump().items() if key not in ("shards", "skipped")}
    write_shards(samples, path, layout=Layout(**layout))
