"""Former names of keys, options and commands: one message that names the present one."""

import pytest
import torch
import yaml

from zipar_train import load
from zipar_train.export.weights import export
from zipar_train.models.restore import read
from zipar_train.recipe.load import dump, load_recipe, parse_stored
from zipar_train.recipe.renamed import COMMANDS, KEYS, OPTIONS, REMOVED, renamed
from zipar_train.recipe.schema import RecipeError
from zipar_train.training.fit import fit


@pytest.mark.parametrize("former", KEYS)
def test_a_former_key_names_the_present_one(former):
    now = KEYS[former]
    name = "emu3-gen" if "token_prompt" in former else "digits"
    with pytest.raises(RecipeError, match=rf"{former} = .*: this key is called {now} now\.") as error:
        load_recipe(name, [f"{former}=1"])
    assert "unknown" not in str(error.value)


@pytest.mark.parametrize("former", REMOVED)
def test_a_removed_key_says_what_holds_now(former):
    with pytest.raises(RecipeError, match=rf"{former} = 'x': this key was removed: .*\. Drop it\."):
        load_recipe("digits", [f"{former}=x"])


def test_a_stored_recipe_with_a_removed_behavior_is_refused():
    stored = load_recipe("digits").model_dump()
    stored["zipar"]["seen"] = "by_itself"
    with pytest.raises(RecipeError, match=r"zipar\.seen = 'by_itself': this key was removed"):
        parse_stored(stored, where="a checkpoint")


def test_present_keys_are_those_of_the_schema():
    for now in KEYS.values():
        with pytest.raises(RecipeError) as error:
            load_recipe("emu3-gen" if "token_prompt" in now else "digits", [f"{now}=[[]]"])
        assert "unknown key" not in str(error.value), now


@pytest.mark.parametrize(("command", "former"), [(c, o) for c, options in OPTIONS.items() for o in options])
def test_a_former_option_names_the_present_one(run, command, former):
    for arguments in ([former, "x"], [f"{former}=x"]):
        status, out, err = run(command, *arguments)
        assert (status, out) == (
            2,
            "",
        ) and err == f"zipar-train: {command} {former} is called {OPTIONS[command][former]} now\n"
    assert OPTIONS[command][former] in run(command, "--help")[1]


@pytest.mark.parametrize("former", COMMANDS)
def test_a_former_command_names_the_present_one(run, former):
    status, out, err = run(former, "--help")
    assert (status, out) == (2, "") and err == f"zipar-train: the command {former} is called {COMMANDS[former]} now\n"
    assert f"  {COMMANDS[former]} " in run("--help")[1]


def former(recipe):
    """Return a recipe as version 0.1 has stored it."""
    made = recipe.model_dump()
    for old, now in reversed(KEYS.items()):
        *sections, last = now.split(".")
        place = made
        for section in sections:
            place = (place or {}).get(section)
        if isinstance(place, dict):
            place[old.rpartition(".")[2]] = place.pop(last)
    made["zipar"]["seen"] = "until_replaced"
    made["zipar"]["first_row"] = {"complete": "alone"}.get(made["zipar"]["first_row"], made["zipar"]["first_row"])
    return made


@pytest.mark.parametrize("name", ["digits", "emu3-gen", "janus-pro-1b", "llamagen-xl-t2i", "lumina-mgpt-7b-512"])
def test_stored_recipes_of_former_names_are_read(name, tmp_path):
    recipe = load_recipe(name)
    old = former(recipe)
    assert old != recipe.model_dump() and {"about", "run"} <= old.keys() and "depth" in old["model"]
    assert parse_stored(old, where="a checkpoint") == recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
    assert parse_stored(tmp_path / "recipe.yaml", where="an export") == recipe
    assert renamed(recipe.model_dump()) == recipe.model_dump()


def test_a_run_and_an_export_of_former_names_go_on(tiny, tmp_path):
    recipe = load_recipe("digits-base", [*tiny, "trainer.max_steps=1"])
    path = fit(recipe)
    expected = load(path).generate([3], pixels=False).codes
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "recipe": former(recipe)}, path)
    assert read(path).recipe == recipe
    assert torch.equal(load(path).generate([3], pixels=False).codes, expected)
    fit(load_recipe("digits-base", [*tiny, "trainer.max_steps=2"]), resume=True, allow=["trainer.max_steps"])
    out = export(path, tmp_path / "out")
    before = load(out).generate([3], pixels=False).codes
    assert (out / "recipe.yaml").read_text() == dump(read(path).recipe)
    (out / "recipe.yaml").write_text(yaml.safe_dump(former(read(path).recipe)))
    assert torch.equal(load(out).generate([3], pixels=False).codes, before)
