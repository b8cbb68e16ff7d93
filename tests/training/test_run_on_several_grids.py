"""A run on several grids: killed and resumed, with two processes, its memory and throughput, its evaluation."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import several_grids
import torch
from commands import sets
from forked import Running, together
from several_grids import overrides
from short_runs import losses, states_equal

from zipar_train.data.batch import Batch
from zipar_train.evaluation.evaluate import evaluate
from zipar_train.evaluation.window_advice import advise
from zipar_train.models.family import build
from zipar_train.models.restore import read
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import load_recipe
from zipar_train.training.callbacks.throughput import ThroughputLogger, flops
from zipar_train.training.fit import fit
from zipar_train.training.memory_estimate import predict
from zipar_train.training.trainer import module_of


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return several_grids.words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def shards(words, tmp_path_factory):
    return several_grids.shards(words, tmp_path_factory.mktemp("shards"))


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("shuffle", [1, 100])
def test_a_killed_run_and_one_of_two_processes_end_as_a_whole_one(words, shards, tmp_path, shuffle):
    def settings(name, *more):
        return overrides(
            words,
            shards,
            f"run_dir={tmp_path}/{name}",
            f"data.shuffle={shuffle}",
            "data.micro_batch_size=2",
            "data.workers=2",
            "optim.ema_decay=0.9",
            "checkpoint_every=2",
            "trainer.log_every_n_steps=1",
            "trainer.max_epochs=4",
            "trainer.limit_val_batches=2",
            *more,
        )

    fit(load_recipe("emu3-gen", settings("whole")))
    killed = Running("fit", "--recipe", "emu3-gen", *sets(settings("killed")), log=tmp_path / "log", session=True)
    killed.until((tmp_path / "killed" / "checkpoints" / "last.ckpt").is_file)
    time.sleep(0.3)
    killed.kill_group(signal.SIGKILL)
    assert killed.ended(60) == -signal.SIGKILL, killed.said()
    whole = read(tmp_path / "whole")
    assert 0 < read(tmp_path / "killed").extra["global_step"] < whole.extra["global_step"] == 4 * 8
    fit(load_recipe("emu3-gen", settings("killed")), resume=True)
    assert states_equal(whole.state, read(tmp_path / "killed").state)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")

    devices = ("trainer.devices=2", "trainer.strategy=ddp")
    two = together(2, "fit", "--recipe", "emu3-gen", *sets(settings("two", *devices)), log=tmp_path / "two.log")
    assert [process.ended(200) for process in two] == [0, 0], two[0].said()
    shared = read(tmp_path / "two")
    assert shared.extra["global_step"] == 4 * 8
    assert max((whole.state[name] - shared.state[name]).abs().max() for name in whole.state) < 1e-5


def test_memory_is_that_of_the_largest_grid(words, tmp_path):
    several = load_recipe("emu3-gen", overrides(words, tmp_path, "model.other_grids=[[9,12],[2,2]]"))
    largest = load_recipe("emu3-gen", overrides(words, tmp_path, "model.grid=[9,12]", "model.other_grids=[]"))
    smallest = load_recipe("emu3-gen", overrides(words, tmp_path, "model.other_grids=[]"))
    assert predict(several).train == predict(largest).train
    assert predict(several).generation == predict(smallest).generation


def test_flops_are_those_of_the_grid_of_every_batch(words, tmp_path):
    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    logger, module = ThroughputLogger(), module_of(recipe, build(recipe.model))
    trainer = SimpleNamespace(
        global_step=0, world_size=2, precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    logger.on_train_start(trainer, module)
    expected = 0.0
    for sides, images in (((4, 4), 3), ((6, 3), 1), ((3, 6), 2)):
        codes = torch.zeros(images, sides[0] * sides[1], dtype=torch.int64)
        logger.on_train_batch_end(trainer, module, None, Batch(codes, None, sides=sides), 0)
        alone = build(recipe.model.on(sides))
        plan = Plan.zipar(alone.grid, window=2, prompt=alone.prompt_length)
        expected += 2 * images * flops(alone, plan)
    assert logger.work == expected


def test_evaluation_without_images_of_its_grid_is_refused_before_work(words, shards, tmp_path, monkeypatch):
    content = json.loads((shards / "val.json").read_text())
    others = shards / "others.json"
    others.write_text(json.dumps(content | {"shards": [shard for shard in content["shards"] if shard.get("grid")]}))
    changes = [f"run_dir={tmp_path}/run", "trainer.max_steps=1", "evaluate.captions=null", "evaluate.images=10"]
    recipe = load_recipe("emu3-gen", overrides(words, shards, *changes))
    fit(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": str(others)})})
    monkeypatch.setattr("zipar_train.evaluation.evaluate.build_scorer", lambda *args, **kwargs: None)
    message = "others.json has no images of 4x4 codes, only of 3x6, 6x3: use shards that have some, or set model.grid"
    with pytest.raises(ValueError, match=message):
        evaluate(recipe, tmp_path / "run", out=tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match=message):
        advise(recipe, tmp_path / "run", shards=str(others), progress=False)
