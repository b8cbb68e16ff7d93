"""`recipes`, `recipes show` and `recipes copy`, `--version`, and completion in a shell."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import zipar_train
from zipar_train.recipe.load import load_recipe, recipe_folder, shipped


def test_all_recipes_are_listed(run):
    status, out, err = run("recipes")
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[: len(shipped())]] == shipped()
    assert "recipes show NAME" in out and "recipes copy NAME" in out


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_is_shown_as_it_is(run, name):
    status, out, _ = run("recipes", "show", name)
    assert status == 0 and out == (recipe_folder() / f"{name}.yaml").read_text()


def test_a_copy_is_a_recipe(run, tmp_path):
    (tmp_path / "mine").mkdir()
    for given, made in (([], "digits.yaml"), (["own.yaml"], "own.yaml"), (["mine"], "mine/digits.yaml")):
        status, out, err = run("recipes", "copy", "digits", *given)
        assert status == 0, err
        assert out == f"{made}: change it, then zipar-train fit --recipe {made}\n"
        assert load_recipe(made) == load_recipe("digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "digit"], "Did you mean digits"),
        (["show", "digits.yaml"], "digits.yaml is no shipped recipe: use one of digits, "),
        (["show", "../digits"], "../digits is no shipped recipe"),
        (["copy", "digits", "a.txt"], "a.txt: the name of a recipe's file ends in .yaml"),
        (["copy", "digits", "there.yaml"], "there.yaml already exists"),
        (["copy", "digits", "gone/a.yaml"], "the folder gone is not there"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, arguments, message):
    (tmp_path / "there.yaml").write_text("mine")
    status, out, err = run("recipes", *arguments)
    assert status == 2 and not out and err.startswith("zipar-train: ") and message in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_the_version_is_that_of_the_package_the_changelog_and_the_citation(run):
    status, out, _ = run("--version")
    assert status == 0 and out == f"zipar-train {zipar_train.__version__}\n"
    root = Path(__file__).parents[2]
    assert f"## {zipar_train.__version__} (" in (root / "CHANGELOG.md").read_text()
    assert f"version: {zipar_train.__version__}\n" in (root / "CITATION.cff").read_text()
    assert version("zipar-train") == zipar_train.__version__, "install again: scripts/install dev"


def test_the_changelog_has_every_former_name():
    from zipar_train.recipe.renamed import COMMANDS, KEYS, OPTIONS

    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    pairs = [*KEYS.items(), *COMMANDS.items()]
    pairs += [(f"{command} {a}", f"{command} {b}") for command, each in OPTIONS.items() for a, b in each.items()]
    assert all(f"| `{former}` | `{now}` |" in text for former, now in pairs)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("zipar-train rec", ["recipes"]),
        ("zipar-train fit --recipe llamagen-x", ["llamagen-xl", "llamagen-xl-t2i", "llamagen-xxl"]),
        ("zipar-train recipes show mni", ["mnist", "mnist-base"]),
    ],
)
def test_a_shell_completes_commands_and_recipes(line, words):
    """As bash asks: through the program itself, which answers with a word a line."""
    asked = {"_ZIPAR_TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    code = "import sys; sys.argv = ['zipar-train']; from zipar_train.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == words, done.stderr
