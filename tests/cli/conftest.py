"""A trained run for the commands."""

import pytest
from commands import TINY


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """A tiny run folder, one epoch."""
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    folder = tmp_path_factory.mktemp("trained") / "digits-base"
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    fit(load_recipe("digits-base", [*TINY, *data, f"run_dir={folder}", "trainer.max_epochs=1"]))
    return folder
