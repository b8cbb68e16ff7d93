"""Loading of recipes: finding, overriding and checking. Does not import torch, so that mistakes are reported fast.

A recipe is one complete YAML file that defines a whole run. It is found by name (in a source checkout or in the wheel)
or by path. `key.path=value` overrides a key. `~`, `${NAME}` and `${NAME:-default}` are expanded, see `expansion`. All
mistakes are reported together, each with its key, value and remedy.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from zipar_train.io import safe_yaml
from zipar_train.io.errors import did_you_mean, safe_repr, truncate
from zipar_train.io.expansion import expand
from zipar_train.recipe.renamed import KEYS, REMOVED, renamed
from zipar_train.recipe.schema import Recipe, RecipeError

MAX_MISTAKES = 50  # most mistakes in one report


def recipe_folder() -> Path:
    """Return the folder of shipped recipes: inside the wheel, or at the root of a source checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find(recipe: str | Path) -> Path:
    """Return the path of a recipe given by name or path.

    Raises:
        RecipeError: If it does not exist; names the closest shipped recipe.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}. Shipped recipes: {', '.join(shipped())}.")
        return path
    path = recipe_folder() / f"{recipe}.yaml"
    if str(recipe) not in shipped():
        raise RecipeError(
            f"no recipe {str(recipe)!r}.{did_you_mean('', str(recipe), shipped())} "
            f"Give one of {', '.join(shipped())}, or the path of a .yaml file."
        )
    return path


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        recipe: The name of a shipped recipe, or a path.
        overrides: `key.path=value`, with the value in YAML.

    Raises:
        RecipeError: If there are mistakes; lists all of them.
    """
    path = find(recipe)
    try:
        raw = safe_yaml.read(path, loader=safe_yaml.RecipeLoader)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no sections: a recipe starts with `name:`; see `zipar-train recipes`.")
    for given in overrides:
        _override(raw, given)
    return parse(raw, where=str(path))


def parse(raw: dict[str, Any], *, where: str) -> Recipe:
    """Validate plain data and return it as a recipe; `where` names its origin in errors."""
    mistakes: list[str] = []
    try:
        raw = _expand(raw, "", mistakes, count())
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply, too large, or with a recursive anchor") from None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        for problem in error.errors(include_url=False)[:MAX_MISTAKES]:
            mistakes += explain(problem)
    if mistakes:
        lines = [truncate(mistake) for mistake in mistakes[:MAX_MISTAKES]] + ["and more"] * (
            len(mistakes) > MAX_MISTAKES
        )
        raise RecipeError(f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n  " + "\n  ".join(lines))
    return recipe


def parse_stored(raw: Any, *, where: str) -> Recipe:
    """Check a recipe that a checkpoint, an export or a sweep has stored; keys of earlier versions are renamed.

    Args:
        raw: Plain data, or the path of a YAML file.
        where: Origin, for errors.

    Raises:
        RecipeError: With every mistake found.
    """
    if isinstance(raw, Path):
        try:
            raw = safe_yaml.read(raw, loader=safe_yaml.RecipeLoader)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    return parse(renamed(raw) if isinstance(raw, dict) else raw, where=where)


def overridden(recipe: Recipe, overrides: Iterable[str], *, where: str) -> Recipe:
    """Return the recipe with `key.path=value` set, checked again; `where` names its origin in errors."""
    raw, changes = recipe.model_dump(), list(overrides)
    for change in changes:
        _override(raw, change)
    return parse(raw, where=where) if changes else recipe


def override(key: str, text: str) -> str:
    """Return the override that sets a key to exactly this text, even if YAML would not read it as text (`no`)."""
    quoted = yaml.dump(text, Dumper=safe_yaml.RecipeDumper, default_style='"', width=2**31, allow_unicode=True)
    return f"{key}={quoted.strip()}"


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, complete and resolved."""
    return yaml.dump(recipe.model_dump(), Dumper=safe_yaml.RecipeDumper, sort_keys=False, allow_unicode=True)


def differences(a: Recipe, b: Recipe, *, ignore: Iterable[str] = ()) -> list[str]:
    """List every key in which two recipes differ as `key: value in a -> value in b`.

    Args:
        ignore: Keys that are not compared, nor the keys below them.
    """
    left, right = _flat(a.model_dump()), _flat(b.model_dump())
    ignored = tuple(ignore)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


_WHOLE = re.compile(r"[0-9]{1,9}")


def _expand(value: Any, key: str, mistakes: list[str], met: Iterator[int]) -> Any:
    if next(met) > safe_yaml.MAX_VALUES:
        raise RecursionError
    if isinstance(value, dict):
        return {k: _expand(v, f"{key}.{truncate(k, length=60)}".lstrip("."), mistakes, met) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{key}.{i}", mistakes, met) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        return expand(value)
    except ValueError as error:
        mistakes.append(f"{key} = {safe_repr(value)}: {error}")
        return value


def _override(raw: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {safe_repr(override)}: write it as key.path=value, for example --set optim.lr=1e-4")
    try:
        value = safe_yaml.parse(text, loader=safe_yaml.RecipeLoader)
    except ValueError as error:
        raise RecipeError(f"--set {safe_repr(override)}: the value is not YAML: {error}") from None
    *sections, last = [int(part) if _WHOLE.fullmatch(part) else part for part in key.split(".")]
    for section in sections:
        if raw.get(section) is None:  # a missing section, or null
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {safe_repr(override)}: {section} is a value, not a section with keys below it")
    raw[last] = value


def explain(problem: Any) -> list[str]:
    """Return one pydantic error as lines of the form `key = value: problem and remedy`."""
    path, given = ".".join(truncate(part, length=60) for part in problem["loc"]), problem["input"]
    if problem["type"] == "value_error":  # from our own validators, whose messages are complete
        lines = str(problem["ctx"]["error"]).split("\n")
        if path and (not isinstance(given, dict) or problem["loc"][0] == "trainer"):  # not for sections
            return [f"{path} = {safe_repr(given)}: {lines[0]}."]
        return [f"{path}: {line}." for line in lines] if path else lines
    if problem["type"] == "missing":
        return [f"{path}: missing. Add it; `zipar-train recipes` names complete examples."]
    if problem["type"] == "extra_forbidden":
        *sections, last = problem["loc"]
        prefix = "".join(f"{part}." for part in sections)
        if path in KEYS:
            return [f"{path} = {safe_repr(given)}: this key is called {KEYS[path]} now."]
        if path in REMOVED:
            return [f"{path} = {safe_repr(given)}: this key was removed: {REMOVED[path]}. Drop it."]
        return [f"{path} = {safe_repr(given)}: unknown key." + did_you_mean(prefix, str(last), _keys(sections))]
    return [f"{path or 'the recipe'} = {safe_repr(given)}: {problem['msg'][0].lower()}{problem['msg'][1:]}."]


def _keys(path: list[str | int]) -> list[str]:
    """Return the keys of a section of the recipe."""
    section: Any = Recipe
    for part in path:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        while not (isinstance(section, type) and issubclass(section, BaseModel)):  # an optional section, or a list
            section = next(kind for kind in get_args(section) if kind is not type(None))
    return list(section.model_fields)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {path: v for k, item in value.items() for path, v in _flat(item, f"{key}.{k}".lstrip(".")).items()}
