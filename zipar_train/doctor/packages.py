"""Checks of Python and the packages: within zipar-train's version ranges, and importable."""

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok, problem, words
from zipar_train.run.provenance import versions

TRIED = (
    "torch",
    "torchvision",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "webdataset",
    "wandb",
    "torch-fidelity",
)


def python(asked: CheckContext) -> Iterator[CheckResult]:
    here = platform.python_version()
    try:
        wanted = SpecifierSet(metadata("zipar-train")["Requires-Python"] or "")
    except PackageNotFoundError:
        yield note("python", f"{here}; zipar-train is not installed: its ranges are not known", "pip install -e .")
        return
    if wanted.contains(here, prereleases=True):
        yield ok("python", here)
    else:
        yield problem("python", f"{here} is outside {wanted}", f"Make an environment of Python {wanted}")


def required() -> list[Requirement]:
    """Return the requirements of the installed zipar-train, with the packages in TRIED first."""
    try:
        found = [Requirement(line) for line in requires("zipar-train") or []]
    except PackageNotFoundError:
        return [Requirement(name) for name in TRIED]
    found = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    return sorted(found, key=lambda each: TRIED.index(each.name) if each.name in TRIED else len(TRIED))


def in_range(asked: CheckContext) -> Iterator[CheckResult]:
    """Yield a row for each package in TRIED or with a problem, and one row for all others."""
    wanted = required()
    here, others = versions(*(each.name for each in wanted)), 0
    for each in wanted:
        found = here[each.name]
        remedy = f"pip install '{each.name}{each.specifier}'"
        if found == "not installed":
            yield problem(each.name, f"not installed, {each.specifier or 'any version'} is needed", remedy)
        elif not each.specifier.contains(found, prereleases=True):
            yield problem(each.name, f"{found} is outside {each.specifier}", remedy)
        elif each.name in TRIED:
            yield importable(each, found)
        else:
            others += 1
    if others:
        yield ok("and", f"{others} more")


def importable(wanted: Requirement, found: str) -> CheckResult:
    try:
        import_module(wanted.name.replace("-", "_"))
    except Exception as error:  # importing a package can raise anything
        together = " torch" if wanted.name == "torchvision" else ""  # they are built for each other
        remedy = f"pip install --force-reinstall '{wanted.name}{wanted.specifier}'{together}"
        return problem(wanted.name, f"{found} does not import. {words(error)}", remedy)
    return ok(wanted.name, found)


CHECKS = (
    Check("python", python, "Make a new environment and pip install zipar-train"),
    Check("packages", in_range, "Make a new environment and pip install zipar-train"),
)
