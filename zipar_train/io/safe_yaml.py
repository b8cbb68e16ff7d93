"""YAML that people write, read without trust: of bounded size, each key once, plain data alone."""

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from zipar_train.io.errors import truncate
from zipar_train.io.files import open_regular

LARGEST = 2**18  # characters of a file
MOST = 20_000  # values in it, those behind an alias as often as it stands there
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # no path holds these, and YAML can escape them


class Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and aliases that unfold without end."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _unfolded(node, {}) > MOST:
            raise yaml.composer.ComposerError(
                None, None, f"it holds more than {MOST:,} values, aliases unfolded, or an anchor that holds itself"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        given = Counter(self.construct_object(key) for key in scalars if not key.tag.endswith(":merge"))  # type: ignore[no-untyped-call]
        if twice := [key for key, count in given.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Recipes(Loader):
    """Reads 1e-4 as the number people mean."""


class Dumper(yaml.SafeDumper):
    """Writes what `Recipes` reads: quotes round a text that looks like 1e-4."""


for _each in (Recipes, Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read(path: Path, *, loader: type[Loader] = Loader) -> Any:
    """A file's content.

    Raises:
        ValueError: naming the file, and what is wrong.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            return parse(file.read(LARGEST + 1), loader=loader)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from None


def parse(text: str, *, loader: type[Loader] = Loader) -> Any:
    """A text's content.

    Raises:
        ValueError: saying what is wrong.
    """
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST // 1024} KiB")
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(truncate(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # of what a tag is put on, `!!int ''` say
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {truncate(error)})") from None


def unprintable(text: str) -> bool:
    return bool(_CONTROL.search(text))


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those behind an alias as often as it stands there; at most a little more than `MOST`."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # should it hold itself
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = 0 if isinstance(node, yaml.ScalarNode) else sum(_unfolded(part, known) for part in inside)
        known[id(node)] = min(1 + parts, MOST + 1)
    return known[id(node)]
