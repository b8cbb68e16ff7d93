"""A recipe: one complete YAML file that is the whole run. Imports no torch, so that mistakes show at once.

Found by name (beside the package, or shipped inside the wheel) or by path; `key.path=value` overrides; `${NAME}` and
`${NAME:-default}` stand for environment variables; every mistake is reported at once, with its key, value and remedy.
"""

import ast
import difflib
import importlib.util
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zipar_train.grid import Grid

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Window = Annotated[int, Field(ge=1)]


class RecipeError(ValueError):
    """One or more mistakes in a recipe, a line each."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """The generator: a family at a size, its grid of codes, and where its weights come from."""

    family: Literal["llamagen"]
    size: Literal["B", "L", "XL", "XXL", "3B"] | None = None  # or depth, heads and width
    depth: Positive | None = None  # layers
    heads: Positive | None = None
    width: Positive | None = None
    feed_forward: Positive | None = None  # hidden width of the feed-forward; null: the family's rule
    grid: Annotated[list[Positive], Field(min_length=2, max_length=2)]  # rows, columns of codes
    codes: Annotated[int, Field(ge=2, le=65536)]  # codebook size (shards store uint16)
    classes: Positive
    tokenizer: Literal["palette"] | None = None  # codes <-> pixels; null: codes only
    weights: str | None = None  # run folder, checkpoint or export; null: random
    attention: Literal["sdpa", "flex_attention"] = "sdpa"

    @model_validator(mode="after")
    def _size_or_shape(self) -> "Model":
        shape = (self.depth, self.heads, self.width)
        if self.size is None and None in shape:
            raise ValueError("give either size, or depth, heads and width")
        if self.size is not None and shape != (None, None, None):
            raise ValueError("size already fixes depth, heads and width: drop one or the other")
        if self.width and self.heads and (self.width % self.heads or self.width // self.heads % 4):
            raise ValueError(f"width {self.width} over {self.heads} heads: a head's width must be a multiple of 4")
        return self

    @property
    def raster(self) -> Grid:
        return Grid(self.grid[0], self.grid[1])


class ZipAR(Section):
    """The windows trained for, and what stands in for codes not yet drawn."""

    windows: Annotated[dict[Window, Annotated[float, Field(gt=0)]], Field(min_length=1)]  # window: weight in the mix
    stand_in: Literal["nearest", "released"] = "nearest"


class Data(Section):
    train: str  # tar shards: a path, braces allowed
    val: str
    batch_size: Positive  # images per device and step
    workers: Annotated[int, Field(ge=0)] = 0  # loader processes per device
    shuffle: Positive = 10000  # samples in the shuffle buffer
    label_dropout: Share = 0.1  # share of labels replaced by the null class, for guidance


class Optim(Section):
    lr: Annotated[float, Field(gt=0)]  # peak learning rate
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # on matrices alone
    warmup: Share = 0.02  # share of all steps
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the averaged weights


class Draw(Section):
    """How codes are sampled, everywhere images are drawn."""

    guidance: Annotated[float, Field(ge=0)] = 1.0  # classifier-free; 1: none
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: the most probable code
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: no cut
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: no cut


class Evaluate(Section):
    windows: Annotated[list[Window], Field(min_length=1)]
    images: Annotated[int, Field(ge=10)]  # drawn per window, checkpoint and seed
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    batch_size: Positive = 64
    features: Literal["classifier"] = "classifier"  # a small network trained on data.train


class Log(Section):
    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "zipar-train"


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str  # one line for `zipar-train recipes`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run: str  # the folder this run writes
    checkpoint_every: Positive | None = None  # optimizer steps between checkpoints; null: epoch ends only
    model: Model
    zipar: ZipAR
    data: Data
    optim: Optim
    trainer: dict[str, Any] = {}  # any argument of lightning.Trainer
    draw: Draw = Draw()
    evaluate: Evaluate
    log: Log = Log()

    @model_validator(mode="after")
    def _agree(self) -> "Recipe":
        widest = self.model.raster.row_length
        mistakes = [
            f"{key} = {window}: wider than a row of {widest} codes. Use 1 .. {widest}."
            for key, windows in (("zipar.windows", self.zipar.windows), ("evaluate.windows", self.evaluate.windows))
            for window in windows
            if window > widest
        ]
        for key, value in self.trainer.items():
            if key in _OURS:
                mistakes.append(f"trainer.{key} = {value!r}: zipar-train sets this itself. {_OURS[key]}")
            elif key not in trainer_arguments():
                mistakes.append(
                    f"trainer.{key} = {value!r}: not an argument of lightning.Trainer."
                    + _nearest("trainer.", key, trainer_arguments())
                )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


_OURS = {
    "callbacks": "In Python, add yours to the trainer that zipar_train.training.trainer.build_trainer returns.",
    "logger": "See log.wandb; a CSV log is always written.",
    "default_root_dir": "See run.",
    "enable_checkpointing": "See checkpoint_every.",
}


@cache
def trainer_arguments() -> tuple[str, ...]:
    """Names of lightning.Trainer's arguments, read from its source so that torch stays unimported."""
    spec = importlib.util.find_spec("lightning")
    if spec is None or spec.origin is None:
        raise RecipeError("lightning is not installed: pip install 'lightning>=2.6.4'")
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
            return tuple(argument.arg for argument in init.args.kwonlyargs)
    raise RecipeError(f"no Trainer class in {source}: this lightning is not supported")


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading


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
            f"no recipe {str(recipe)!r}.{_nearest('', str(recipe), shipped())} "
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
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no sections: a recipe starts with `name:`; see `zipar-train recipes`.")
    for override in overrides:
        _override(raw, override)
    return parse(raw, where=str(path))


def parse(raw: dict[str, Any], *, where: str) -> Recipe:
    """Check plain data as a recipe; `where` names its origin in errors."""
    mistakes: list[str] = []
    raw = _expand(raw, "", mistakes)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        mistakes += [line for problem in error.errors() for line in _explain(problem)]
    if mistakes:
        raise RecipeError(f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n  " + "\n  ".join(mistakes))
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, complete and resolved."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def differences(a: Recipe, b: Recipe, *, ignore: Iterable[str] = ()) -> list[str]:
    """`key: a's value -> b's value` for every key in which two recipes differ, `ignore` naming top-level keys."""
    left, right = _flat(a.model_dump(exclude=set(ignore))), _flat(b.model_dump(exclude=set(ignore)))
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
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
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    *sections, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section with keys below it")
    raw[last] = value


def _explain(problem: Any) -> list[str]:
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
        prefix = "".join(f"{part}." for part in sections)
        return [
            f"{path} = {problem['input']!r}: unknown key." + _nearest(prefix, str(last), list(section.model_fields))
        ]
    return [f"{path} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."]


def _nearest(prefix: str, name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else f" Known: {', '.join(names)}."


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {path: v for k, item in value.items() for path, v in _flat(item, f"{key}.{k}".lstrip(".")).items()}
