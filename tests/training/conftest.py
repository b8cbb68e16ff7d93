"""Shared pieces of the tests of training."""

import pytest


@pytest.fixture(scope="session")
def base(shards, tmp_path_factory):
    """A tiny trained next-token model."""
    from commands import TINY

    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    folder = tmp_path_factory.mktemp("base")
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    fit(load_recipe("digits-base", [*TINY, *data, f"run_dir={folder}/run", "trainer.max_epochs=1"]))
    return folder / "run"


@pytest.fixture
def alone():
    """W&B reads the environment once in a process."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield
    wandb.teardown()
