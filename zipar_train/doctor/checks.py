"""Checks and their rows: ok, a note or a problem, with a remedy and without secrets.

This module does not import torch, so that a broken torch is reported and does not stop the report.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from pydantic import BaseModel, field_validator, model_validator

from zipar_train.io.expansion import SECRET
from zipar_train.recipe.schema import Recipe

GIB = 2**30


class CheckResult(BaseModel):
    """Result of a check; a problem prevents what was asked for, a note does not."""

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
    def _mended(self) -> "CheckResult":
        assert (self.status == "ok") == (not self.remedy), f"{self.name}: a remedy for what is not ok, and only for it"
        return self


class CheckContext(BaseModel):
    """Input of the checks: the recipe, if one is given, and a folder for temporary files."""

    recipe: Recipe | None = None
    scratch: str | None = None  # a folder that is removed at the end; None: the system's default
    patience: float = 30  # seconds

    @property
    def cpu(self) -> bool:
        """True if the recipe demands the CPU."""
        return self.recipe is not None and self.recipe.trainer.get("accelerator") == "cpu"


class Check(NamedTuple):
    name: str
    run: Callable[[CheckContext], Iterable[CheckResult]]
    remedy: str  # for a check that fails or does not end


def ok(name: str, seen: str) -> CheckResult:
    return CheckResult(name=name, status="ok", seen=seen)


def note(name: str, seen: str, remedy: str) -> CheckResult:
    return CheckResult(name=name, status="note", seen=seen, remedy=remedy)


def problem(name: str, seen: str, remedy: str) -> CheckResult:
    return CheckResult(name=name, status="problem", seen=seen, remedy=remedy)


def guarded(check: Check, asked: CheckContext) -> Iterator[CheckResult]:
    """Yield the check's rows; an exception becomes a problem row with its message."""
    try:
        yield from check.run(asked)
    except Exception as error:
        if os.environ.get("ZIPAR_TRACEBACK"):
            raise
        yield problem(check.name, words(error), check.remedy)


def words(error: BaseException) -> str:
    """Return an exception's message: in full for the package's errors, else its class and first line."""
    if type(error).__module__.startswith("zipar_train") or type(error) is ValueError:
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else ""
    kind = type(error).__name__
    line = line if line.startswith(kind) else f"{kind}: {line}"
    return line if len(line) <= 200 else f"{line[:197]}..."


def size(count: float) -> str:
    """Return a number of bytes as text, in GiB or MiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.0f} MiB"


def hidden(text: str) -> str:
    """Return the text with secrets replaced by ***: values of secret environment variables, and those in URLs."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and not value.startswith(("/", "~", ".")):  # paths are not secrets
            text = text.replace(value, "***")
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", re.sub(r"(\w://[^\s?'\"]+\?)[^\s'\"]+", r"\1***", text))
