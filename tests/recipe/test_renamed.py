"""Former names of keys, options and commands: one message that names the present one."""

import pytest

from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.renamed import COMMANDS, KEYS, OPTIONS
from zipar_train.recipe.schema import RecipeError


@pytest.mark.parametrize("former", KEYS)
def test_a_former_key_names_the_present_one(former):
    now = KEYS[former]
    name = "emu3-gen" if "token_prompt" in former else "digits"
    with pytest.raises(RecipeError, match=rf"{former} = .*: this key is called {now} now\.") as error:
        load_recipe(name, [f"{former}=1"])
    assert "unknown" not in str(error.value)


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
