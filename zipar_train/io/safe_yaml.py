"""Safe reading of user-written YAML: bounded size, no duplicate keys, plain data only."""

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from zipar_train.io.errors import truncate
from zipar_train.io.files import open_regular

MAX_CHARACTERS = 2**18  # most characters in a file
MAX_VALUES = 20_000  # most values in a file, aliases expanded
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # no path contains these, but YAML can escape them


class StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that rejects duplicate keys and unbounded alias expansion."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None,
                None,
                f"it holds more than {MAX_VALUES:,} values, aliases expanded, or a recursive anchor",
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = Counter(self.construct_object(key) for key in scalars if not key.tag.endswith(":merge"))  # type: ignore[no-untyped-call]
        if duplicates := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {duplicates[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class RecipeLoader(StrictLoader):
    """A YAML loader that reads 1e-4 as a float."""


class RecipeDumper(yaml.SafeDumper):
    """A YAML dumper for files that `RecipeLoader` reads: it quotes strings that look like 1e-4."""


for _each in (RecipeLoader, RecipeDumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read(path: Path, *, loader: type[StrictLoader] = StrictLoader) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: If the file is not readable YAML; names the file and the reason.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            return parse(file.read(MAX_CHARACTERS + 1), loader=loader)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from None


def parse(text: str, *, loader: type[StrictLoader] = StrictLoader) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: If the text is not valid YAML; names the reason.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS // 1024} KiB")
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(truncate(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # a value that does not match its tag, for example `!!int ''`
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {truncate(error)})") from None


def unprintable(text: str) -> bool:
    return bool(_CONTROL.search(text))


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a node, aliases expanded; counting stops just above `MAX_VALUES`."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # in case the node contains itself
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = 0 if isinstance(node, yaml.ScalarNode) else sum(_expanded_size(part, known) for part in inside)
        known[id(node)] = min(1 + parts, MAX_VALUES + 1)
    return known[id(node)]
