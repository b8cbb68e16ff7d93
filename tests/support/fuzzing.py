"""How files are spoilt for fuzzing: as bytes, as lines, as values; and how long a verdict may take.

ZIPAR_FUZZ=5000 runs that many examples of each kind, others each time.
"""

import copy
import os
import time
from contextlib import contextmanager

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MANY = int(os.environ.get("ZIPAR_FUZZ", "0"))
SECONDS = 60  # that nothing may take, even on a busy machine

JUNK = [
    *("", " ", "\t", "\n", ":", ": ", "- ", "? ", "[", "]", "{", "}", "{{", "'", '"', "#", "|", ">-", "`", "@", "~"),
    *("&a ", "*a", "&a [*a]", "<<: *a\n", "<<: {x: 1}\n", "---\n", "...\n", "%YAML 9.9", "!x ", "!!int ", "!!float x"),
    *("!!bool ", "!!timestamp x", "!!binary é", "!!set ", "!!omap ", "!!python/tuple ", '"\\0"', '"\\ud800"'),
    *("${", "${HOME}", "${A:-b}", "${X_KEY:-}", ".inf", "-.inf", ".nan", "1e30", "-1", "0", "0b2", "1_0", "1:30"),
    *("0x" + "f" * 30, "9" * 400, "2001-02-30", "null", "true", "é", "\u2028", "\ufeff", "\U0001f600", "\x7f"),
    *("x" * 3000, "[" * 300, "a: " * 30),
]

ODD = st.sampled_from([
    *(None, True, False, 0, -1, 1, 2, 3, 8, 16, 10**9, 2**31, 2**63, 10**30, -(10**30), 16**3000, 0.0, -0.5, 0.5, 1.0),
    *(1e-300, 1e30, float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e5", "8", "auto", "true", "null"),
    *("x" * 5000, "../../etc/passwd", "é\u202e\U0001f600", "\0", "${NOWHERE}", "${HOME}", "a/b:c", "s3://x", b"\xff\0"),
    *([], [[]], [None], {}, {"a": {"a": {"a": {}}}}, {1: 2}, {None: None}, {"": ""}, [1] * 200),
])  # fmt: skip
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: (
        st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(), inside, max_size=4)
    ),
    max_leaves=6,
)
KEYS = ODD.filter(lambda key: not isinstance(key, list | dict)) | st.sampled_from(
    ["width", "windows", "lora", "k" * 9999]
)


def examples(count: int, *, least: int = 0, share: float = 1.0) -> settings:
    """So many examples in the suite, the same each time, and `share` of ZIPAR_FUZZ where that is set."""
    quick = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ]
    return settings(
        max_examples=max(least, int(MANY * share)) if MANY else count,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=quick,
    )


@contextmanager
def in_time():
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < SECONDS, f"it took {took:.1f} s"


@st.composite
def spoilt_text(draw, texts):
    """A text with some of its characters or lines removed, doubled, moved or replaced."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            lines = text.split("\n")
            at, to = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            kind = draw(st.sampled_from(["delete", "double", "move", "indent", "value", "key", "cut"]))
            line = lines[at]
            junk = draw(st.sampled_from(JUNK))
            if kind == "delete":
                del lines[at]
            elif kind == "double":
                lines.insert(to, line)
            elif kind == "move":
                lines.insert(to, lines.pop(at))
            elif kind == "indent":
                lines[at] = " " * draw(st.integers(0, 5)) + line.strip()
            elif kind == "value":
                lines[at] = line.partition(":")[0] + ": " + junk
            elif kind == "key":
                lines[at] = junk + ":" + line.partition(":")[2]
            else:
                del lines[at:to]
            text = "\n".join(lines)
        else:
            at = draw(st.integers(0, len(text)))
            end = min(len(text), at + draw(st.sampled_from([0, 0, 1, 2, 20, 400])))
            text = text[:at] + draw(st.sampled_from(JUNK)) * draw(st.sampled_from([1, 1, 1, 2, 50])) + text[end:]
    return text


@st.composite
def spoilt_bytes(draw, data):
    """Bytes with some flipped, removed, repeated, set or added."""
    data = bytearray(draw(st.sampled_from(data)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.sampled_from([1, 1, 1, 4, 8, 100, 512, 5000]))
        kind = draw(st.sampled_from(["flip", "set", "fill", "delete", "repeat", "cut", "add"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "fill":
            data[at : at + size] = bytes([draw(st.sampled_from([0, 255, 32, 48, 57]))]) * len(data[at : at + size])
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


def places(value, path=()):
    """The paths of all values in plain data."""
    found = [path] if path else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += places(part, (*path, key))
    return found


def put(data, path, value, *, key=None):
    """Put a value in its place, under another key if there is one."""
    for part in path[:-1]:
        data = data[part]
    if key is not None and isinstance(data, dict):
        del data[path[-1]]
        data[key] = value
    else:
        data[path[-1]] = value


def taken(data, path):
    for part in path[:-1]:
        data = data[part]
    value = data[path[-1]]
    del data[path[-1]]
    return value


def at(data, path):
    for part in path:
        data = data[part]
    return data


@st.composite
def spoilt_values(draw, sources, *, values=VALUES):
    """Plain data with some values replaced, removed, moved, doubled or under another key."""
    data = copy.deepcopy(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, 3))):
        known = places(data)
        if not known:
            break
        path = draw(st.sampled_from(known))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "move", "double", "key", "other"]))
        if kind == "replace":
            put(data, path, copy.deepcopy(draw(values)))
        elif kind == "delete":
            taken(data, path)
        elif kind == "move":
            value = taken(data, path)
            if rest := places(data):
                put(data, draw(st.sampled_from(rest)), value)
        elif kind == "double":
            put(data, draw(st.sampled_from(known[:1])), copy.deepcopy(at(data, path)))
        elif kind == "key":
            put(data, path, at(data, path), key=draw(KEYS))
        else:
            put(data, path, at(data, path), key=str(draw(st.sampled_from(known))[-1]))
    return data


class Odd(yaml.SafeDumper):
    """Writes whatever is in ODD."""


Odd.ignore_aliases = lambda self, data: True
Odd.add_representer(int, lambda self, value: self.represent_scalar("tag:yaml.org,2002:int", hex(value)))


def plain(value):
    """What JSON can say of it, and more than it should: NaN, and numbers of thousands of digits."""
    if isinstance(value, dict):
        return {str(key)[:4000]: plain(part) for key, part in value.items() if not isinstance(key, bytes)}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value
