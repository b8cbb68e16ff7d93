"""Command lines as the documentation prints them, checked against the command line and the recipes; nothing is run."""

import re
import shlex
from functools import cache
from typing import Any

import typer.main
from pages import ROOT

from zipar_train.cli.app import app
from zipar_train.cli.options import integers, numbers, one_of
from zipar_train.recipe.load import load_recipe, shipped
from zipar_train.recipe.schema import Recipe, RecipeError

NAME = "zipar-train"
LAUNCHERS = ("torchrun", "srun", "/usr/bin/time", "exec")  # programs that may stand before it
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*|\.\.\.|")  # NAME, ..., or nothing
UNKNOWN = re.compile("unknown key|not a section|not an argument|this key is called")
LISTS = {"windows": integers, "batch_sizes": integers, "grids": integers, "labels": integers, "slots": integers}
LISTS |= {"gpus": integers, "search_guidance": numbers}
CHOICES = {  # values that commands check themselves
    "views": ("one", "flip", "ten"),
    "to": ("hf", "original", "llamagen", "adapter"),
    "dtype": ("float32", "bfloat16"),
    "only": ("packages", "devices", "attention", "disk", "wandb", "recipes", "recipe"),
}


def lines_of(text: str) -> list[str]:
    """The lines of a shell block, with continued lines joined."""
    return [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]


def invocations(line: str) -> list[list[str]]:
    """The words after `zipar-train` of every call in a line of shell; comments are left out.

    Raises:
        ValueError: if something other than variables and a launcher stands before `zipar-train`.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    file = False  # whether the next word is a redirection's
    for word in lexer:
        if set(word) <= set(";|&"):
            parts.append([])
        elif not (file or set(word) <= set("<>")):
            parts[-1].append(word)
        file = set(word) <= set("<>")
    found = []
    for part in parts:
        if NAME in part:
            place = part.index(NAME)
            before = [word for word in part[:place] if not re.match(r"[A-Z_]+=", word)]
            if before and before[0] not in LAUNCHERS:
                raise ValueError(f"{before[0]!r} stands before {NAME}")
            found.append(part[place + 1 :])
    return found


@cache
def commands(whole: bool) -> dict[tuple[str, ...], Any]:
    """Every command by its words, parsed without a look at files; not `whole`: nothing is required."""
    found: dict[tuple[str, ...], Any] = {}

    def add(group: Any, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                add(command, (*words, name))
                continue
            found[(*words, name)] = command
            for param in command.params:
                param.callback = None  # looks at files
                param.required &= whole

    add(typer.main.get_command(app), ())
    return found


def check(words: list[str], *, whole: bool = True) -> None:
    """Check the words after `zipar-train`.

    Args:
        whole: whether all that the command requires must be there.

    Raises:
        Exception: If the command, an option or a value is wrong.
    """
    words = [re.sub(r"\$\{?\w+\}?", "0", word) for word in words if word not in ("-h", "--help")]
    if words and words[-1] == "...":
        words, whole = words[:-1], False
    if words and words[0] in {opt for param in typer.main.get_command(app).params for opt in param.opts}:
        assert len(words) == 1, words  # --version, --install-completion: they run no command
        return
    known = commands(whole)
    if words[:1] == ["COMMAND"]:
        for name in known:
            check([*name, *words[1:]], whole=False)
        return
    length = next((n for n in (1, 2) if tuple(words[:n]) in known), 0)
    if not length:
        raise ValueError(f"no command {' '.join(words[:2])!r}")
    name, words = tuple(words[:length]), words[length:]
    if not whole and words and words[-1] in options(name):  # an option alone
        words = words[:-1]
    given = known[name].make_context(" ".join(name), words).params
    _check_values(given)
    _check_recipe(name, given, whole)


def check_fragment(words: list[str]) -> None:
    """Check options without their command: they must belong to one.

    Raises:
        ValueError: If no command takes them all; with each other complaint once.
    """
    complaints = {}
    for name in commands(False):
        try:
            check([*name, *words], whole=False)
            return
        except Exception as error:
            complaints[str(error)] = " ".join(name)
    raise ValueError("no command takes them\n" + "\n".join(f"{name}: {text}" for text, name in complaints.items()))


def options(name: tuple[str, ...]) -> set[str]:
    return {text for param in commands(True)[name].params for text in (*param.opts, *param.secondary_opts)}


def check_overrides(overrides: list[str], recipe: str | None) -> None:
    """Check each `key=value` in a recipe, all at once; in any shipped one if none is named.

    Of an override with a placeholder as its value, only the key is checked.

    Raises:
        RecipeError: If no recipe takes them.
    """
    certain = [text for text in overrides if not PLACEHOLDER.fullmatch(text.partition("=")[2])]
    complaints = []
    for name in [recipe] if recipe else shipped():
        try:
            load_recipe(name, certain)
            break
        except RecipeError as error:
            complaints.append(str(error))
    else:
        raise RecipeError(complaints[0])
    for override in overrides:
        if override not in certain:
            _check_key(override.partition("=")[0], recipe or name)


def _check_key(key: str, recipe: str) -> None:
    """Check that a recipe may have a key, whatever its value."""
    if key and PLACEHOLDER.fullmatch(key):
        return
    try:
        load_recipe(recipe, [f"{key}=x"])
    except RecipeError as error:
        if UNKNOWN.search(str(error)):
            raise


def _check_values(given: dict[str, Any]) -> None:
    for name, parse in LISTS.items():
        if isinstance(given.get(name), str):
            parse(name, given[name])
    for name, choices in CHOICES.items():
        if isinstance(given.get(name), str) and not set(given[name].split(",")) <= {*choices}:
            raise ValueError(f"{given[name]!r} is none of {', '.join(choices)}")
    for key in given.get("allow", ()):
        check_overrides([f"{key}=..."], None)


def _check_recipe(name: tuple[str, ...], given: dict[str, Any], whole: bool) -> None:
    """Check what depends on the recipe: overrides, windows, classes and captions."""
    recipe, overrides = given.get("recipe"), list(given.get("overrides", ()))
    if name in {("generate",), ("export",)} and whole:
        one_of(given.get("checkpoint"), recipe, overrides)
    if recipe and PLACEHOLDER.fullmatch(recipe):
        recipe = None
    elif recipe:
        recipe = str(ROOT / recipe) if (ROOT / recipe).is_file() else recipe  # scripts run in the root
        load_recipe(recipe)
    check_overrides(overrides, recipe)
    if name == ("sweep",) and given.get("grid"):
        load_sweep(given["grid"])
    if recipe is None and (given.get("checkpoint") or "").removeprefix("runs/") in shipped():
        recipe = given["checkpoint"].removeprefix("runs/")
    if recipe:
        certain = [override for override in overrides if not PLACEHOLDER.fullmatch(override.partition("=")[2])]
        _check_model(load_recipe(recipe, certain), given)


def _check_model(recipe: Recipe, given: dict[str, Any]) -> None:
    model, windows = recipe.model, given.get("windows") or ""
    if not given.get("grids"):
        for window in [*(integers("--windows", windows) if windows else ()), given.get("window") or 1]:
            if not 1 <= window <= model.raster.row_length:
                raise ValueError(f"window {window} is wider than a row of {recipe.name}")
    if given.get("labels") is not None:
        if model.num_classes is None:
            raise ValueError(f"{recipe.name} takes captions")
        if any(label >= model.num_classes for label in integers("--labels", given["labels"])):
            raise ValueError(f"{recipe.name} has fewer classes")
    if isinstance(given.get("captions"), list) and given["captions"] and model.num_classes is not None:
        raise ValueError(f"{recipe.name} takes labels")


def load_sweep(path: Any) -> None:
    from zipar_train.sweep.spec import read_sweep

    read_sweep(ROOT / path)
