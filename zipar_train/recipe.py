"""Recipes found, overridden and checked. Imports no torch, so that mistakes show at once.

A recipe is one complete YAML file that is the whole run. It is found by name (beside the package, or shipped inside the
wheel) or by path; `key.path=value` overrides; `${NAME}` and `${NAME:-default}` stand for environment variables; every
mistake is reported at once, with its key, value and remedy.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from zipar_train.sections import Recipe, RecipeError, nearest


def recipe_folder() -> Path:
    """The folder of shipped recipes: inside the wheel, or at the root of a source checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find(recipe: str | Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        RecipeError: if there is none; names the nearest shipped recipe.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}. Shipped recipes: {', '.join(shipped())}.")
        return path
    path = recipe_folder() / f"{recipe}.yaml"
    if str(recipe) not in shipped():
        raise RecipeError(
            f"no recipe {str(recipe)!r}.{nearest('', str(recipe), shipped())} "
            f"Give one of {', '.join(shipped())}, or the path of a .yaml file."
        )
    return path


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        recipe: a shipped name or a path.
        overrides: `key.path=value`, the value in YAML.

    Raises:
        RecipeError: with every mistake found.
    """
    path = find(recipe)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no sections: a recipe starts with `name:`; see `zipar-train recipes`.")
    for override in overrides:
        _override(raw, override)
    return parse(raw, where=str(path))


def parse(raw: dict[str, Any], *, where: str) -> Recipe:
    """Check plain data as a recipe; `where` names its origin in errors."""
    mistakes: list[str] = []
    try:
        raw = _expand(raw, "", mistakes)
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply, or an anchor that holds itself") from error
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        mistakes += [line for problem in error.errors() for line in explain(problem)]
    if mistakes:
        raise RecipeError(f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n  " + "\n  ".join(mistakes))
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, complete and resolved."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def differences(a: Recipe, b: Recipe, *, ignore: Iterable[str] = ()) -> list[str]:
    """`key: a's value -> b's value` for every key in which two recipes differ, but for those in or under `ignore`."""
    left, right = _flat(a.model_dump()), _flat(b.model_dump())
    ignored = tuple(ignore)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The small print


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as the number people mean."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def _expand(value: Any, key: str, mistakes: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, f"{key}.{k}".lstrip("."), mistakes) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{key}.{i}", mistakes) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if _SECRET.search(name):
            mistakes.append(f"{key} = {value!r}: a recipe is written into run folders; keep ${name} out of it.")
        elif (found := os.environ.get(name, default)) is not None:
            return found
        else:
            mistakes.append(
                f"{key} = {value!r}: the environment variable {name} is not set. Set it, or write ${{{name}:-default}}."
            )
        return ""

    return _VARIABLE.sub(replace, value)


def _override(raw: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: write it as key.path=value, for example --set optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    *sections, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for section in sections:
        if raw.get(section) is None:  # a section that is not there, or null
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section with keys below it")
    raw[last] = value


def explain(problem: Any) -> list[str]:
    """One pydantic error as lines of `key = value: what is wrong, and the remedy`."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # our own validators, which say it all
        lines = str(problem["ctx"]["error"]).split("\n")
        return [f"{path}: {line}." for line in lines] if path else lines
    if problem["type"] == "missing":
        return [f"{path}: missing. Add it; `zipar-train recipes` names complete examples."]
    if problem["type"] == "extra_forbidden":
        *sections, last = problem["loc"]
        section: Any = Recipe
        for part in sections:
            section = section.model_fields[part].annotation
            section = next(
                (kind for kind in get_args(section) if kind is not type(None)), section
            )  # of an optional one
        prefix = "".join(f"{part}." for part in sections)
        return [f"{path} = {problem['input']!r}: unknown key." + nearest(prefix, str(last), list(section.model_fields))]
    return [f"{path} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {path: v for k, item in value.items() for path, v in _flat(item, f"{key}.{k}".lstrip(".")).items()}
