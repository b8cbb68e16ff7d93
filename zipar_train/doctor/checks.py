"""What a check has to say: a row that is fine, a note or a problem, with a remedy and never with a secret.

Imports no torch: what is broken is told, not stumbled over.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from pydantic import BaseModel, field_validator, model_validator

from zipar_train.io.expansion import SECRET
from zipar_train.recipe.schema import Recipe

GIB = 2**30


class Row(BaseModel):
    """What was seen. A note stops nothing that was asked about; a problem does."""

    section: str = ""
    name: str
    status: Literal["ok", "note", "problem"]
    seen: str
    remedy: str = ""

    @field_validator("seen", "remedy")
    @classmethod
    def _no_secrets(cls, text: str) -> str:
        return hidden(text)

    @model_validator(mode="after")
    def _mended(self) -> "Row":
        assert (self.status == "ok") == (not self.remedy), f"{self.name}: a remedy for what is not ok, and only for it"
        return self


class CheckContext(BaseModel):
    """What checks are told: the recipe, if one is given, and where they may leave files."""

    recipe: Recipe | None = None
    scratch: str | None = None  # a folder that is removed in the end; None: the system's
    patience: float = 30  # seconds

    @property
    def cpu(self) -> bool:
        """Whether the recipe keeps to the CPU, whatever the machine has."""
        return self.recipe is not None and self.recipe.trainer.get("accelerator") == "cpu"


class Check(NamedTuple):
    name: str
    run: Callable[[CheckContext], Iterable[Row]]
    remedy: str  # for a check that fails, or never ends


def ok(name: str, seen: str) -> Row:
    return Row(name=name, status="ok", seen=seen)


def note(name: str, seen: str, remedy: str) -> Row:
    return Row(name=name, status="note", seen=seen, remedy=remedy)


def problem(name: str, seen: str, remedy: str) -> Row:
    return Row(name=name, status="problem", seen=seen, remedy=remedy)


def guarded(check: Check, asked: CheckContext) -> Iterator[Row]:
    """The check's rows; what it raises is a problem in the exception's words."""
    try:
        yield from check.run(asked)
    except Exception as error:
        if os.environ.get("ZIPAR_TRACEBACK"):
            raise
        yield problem(check.name, words(error), check.remedy)


def words(error: BaseException) -> str:
    """An exception in a line: our own errors as they are, others' first line, and what kind it is."""
    if type(error).__module__.startswith("zipar_train") or type(error) is ValueError:
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else ""
    kind = type(error).__name__
    line = line if line.startswith(kind) else f"{kind}: {line}"
    return line if len(line) <= 200 else f"{line[:197]}..."


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.0f} MiB"


def hidden(text: str) -> str:
    """The text without the values of environment variables that hold secrets, and without those in URLs."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and not value.startswith(("/", "~", ".")):  # a path is none
            text = text.replace(value, "***")
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", re.sub(r"(\w://[^\s?'\"]+\?)[^\s'\"]+", r"\1***", text))
