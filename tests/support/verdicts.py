"""What may come of a recipe or a sweep, whatever its text: one message that names it, or all within its range."""

import contextlib
import io
import json
import sys

import pytest
from fuzzing import in_time
from ranges import beyond

from zipar_train import cli
from zipar_train.io import safe_yaml
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import dump, load_recipe, parse, recipe_folder, shipped
from zipar_train.recipe.schema import RecipeError
from zipar_train.sweep.distributions import MAX_TRIALS
from zipar_train.sweep.overrides import overrides_of
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of

TEXTS = {name: (recipe_folder() / f"{name}.yaml").read_text() for name in shipped()}
PLAIN = {name: safe_yaml.parse(text, loader=safe_yaml.RecipeLoader) for name, text in TEXTS.items()}


def judged(path, overrides=()):
    """The recipe if it is accepted, and everything that then must hold; None after one message."""
    with in_time():
        try:
            recipe = load_recipe(path, overrides)
        except RecipeError as error:
            message = str(error)
            assert path.name in message or "--set" in message
            assert message.strip() and len(message) < 60_000 and "Traceback" not in message
            return None
        again = parse(safe_yaml.parse(dump(recipe), loader=safe_yaml.RecipeLoader), where="its dump")
    assert again == recipe
    assert beyond(recipe.model_dump()) == []
    json.dumps(recipe.model_dump(), allow_nan=False)
    with in_time():
        windows = {*recipe.zipar.windows, *recipe.evaluate.windows, *(recipe.data.val_windows or ())}
        for window in windows:
            Plan.zipar(recipe.model.raster, window=window, prompt=recipe.model.prompt, **recipe.zipar.rule)
    return recipe


def planned(path, *more):
    """`zipar-train plan`: its table, or one message."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = ["zipar-train", "plan", "--recipe", str(path), *more]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        in_time(),
    ):
        patch.setattr(sys, "argv", argv)
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    assert status in (0, 2), err.getvalue()
    assert (status == 0) == ("next-token passes" in out.getvalue() and not err.getvalue())
    assert "Traceback" not in err.getvalue()


def swept(path, count):
    with in_time():
        try:
            trials = trials_of(read_sweep(path), count=count)
        except ValueError as error:
            message = str(error)
            assert len(message) < 5000 and any(word in message for word in (path.name, "grid of", "--count"))
            return
        assert 1 <= len(trials) <= (count or MAX_TRIALS)
        for trial in trials[:3]:
            json.dumps(trial, allow_nan=False)
            with contextlib.suppress(RecipeError):
                load_recipe("digits", overrides_of(trial))
