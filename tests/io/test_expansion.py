"""Paths mean the same in recipes, in --set and in options: home folders, variables, characters that no path holds."""

import pytest

from zipar_train.io.expansion import expand
from zipar_train.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/runs/a", "/home/me/runs/a"),
        ("~", "~"),  # null in YAML, and a name elsewhere
        ("a/~/b", "a/~/b"),
        ("~x~", "~x~"),
        ("${PLACE}/x", "/data/x"),
        ("${PLACE:-other}/x", "/data/x"),
        ("${EMPTY:-runs}/x", "runs/x"),
        ("${NOWHERE:-~/runs}/x", "/home/me/runs/x"),
        ("${NOWHERE:-}x", "x"),
        ("$PLACE", "$PLACE"),
        ("s3://bucket/~/x", "s3://bucket/~/x"),
    ],
)
def test_text_is_expanded_as_in_a_shell(monkeypatch, text, expected):
    for name, value in {"HOME": "/home/me", "PLACE": "/data", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NOWHERE}/x", "NOWHERE is not set"),
        ("${EMPTY}/x", "EMPTY is empty"),
        ("${WINDOWS}/x", "carriage return"),
        ("runs\r", "cannot be printed"),
        ("${MY_TOKEN}", "keep \\$MY_TOKEN out"),
        ("${PLACE", "write variables as"),
        ("~no-such-person/x", "home folder of nobody"),
    ],
)
def test_text_that_cannot_be_expanded_is_refused(monkeypatch, text, message):
    for name, value in {"PLACE": "/data", "EMPTY": "", "WINDOWS": "/data\r", "MY_TOKEN": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        expand(text)


def test_a_recipe_an_override_and_an_option_expand_alike(monkeypatch, tmp_path, run):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_recipe("digits-base", ["run_dir=~/runs/a"]).run_dir == f"{tmp_path}/home/runs/a"
    (tmp_path / "home").mkdir()
    status, _, err = run("plan", "--recipe", "digits", "--no-memory", "--json", "~/plan.json")
    assert (status, err) == (0, "") and (tmp_path / "home" / "plan.json").is_file()
    monkeypatch.setenv("ZIPAR_RUNS", "")
    assert load_recipe("digits-base").run_dir == "runs/digits-base"
    monkeypatch.setenv("ZIPAR_RUNS", f"{tmp_path}/runs\r")
    with pytest.raises(ValueError, match=r"run_dir = .*ZIPAR_RUNS.*carriage return"):
        load_recipe("digits-base")
    status, _, err = run("plan", "--recipe", "digits", "--no-memory", "--json", "${ZIPAR_RUNS}/plan.json")
    assert status == 2 and "--json" in err and "carriage return" in err and "Traceback" not in err
