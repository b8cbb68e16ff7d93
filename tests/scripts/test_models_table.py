"""The table of models in docs/models.md against what scripts/models_table.py computes."""

import importlib.util
from pathlib import Path

import pytest

from zipar_train.training.memory_estimate import Memory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()


@pytest.fixture(scope="module")
def models_table():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts" / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_of_published_weights_has_a_row(models_table):
    rows = [line.split("|")[1].strip(" `") for line in PAGE.split("\n") if line.startswith("| `")]
    for name in models_table.published():
        assert name in rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["janus-pro-1b", "simplear-0.5b-1024", "llamagen-b"])
def test_rows_are_what_the_script_prints(models_table, name):
    (line,) = models_table.table([name]).split("\n")[2:]
    assert line in PAGE


def test_the_number_of_images_is_the_largest_that_fits(models_table):
    memory = Memory(images=4, weights=100, activations=40, total=140)
    assert models_table.most(memory, 100, fixed=100) == "none"
    assert models_table.most(memory, 109, fixed=100) == "none"
    assert models_table.most(memory, 139, fixed=100) == "3"
    assert models_table.most(memory, 140, fixed=100) == "4"
    assert models_table.most(memory, 10**6, fixed=100) == "99+"
