"""The house: one direction of imports, a core that needs little, files that stay short."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zipar_train"
PACKAGES = [
    "io",
    "plan",
    "recipe",
    "run",
    "models",
    "data",
    "decoding",
    "training",
    "evaluation",
    "benchmark",
    "export",
    "sweep",
    "doctor",
    "demo",
    "cli",
]
BESIDE = {"__init__.py", "__main__.py", "py.typed"}  # files that stand beside the packages
LONGEST = 300  # lines of a file
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "recipes" not in p.relative_to(PACKAGE).parts)


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.level else node.module or ""
            parts = [f"{module}.{alias.name}" for alias in node.names]  # of a folder
            files = [part for part in parts if (PACKAGE.parent / part.replace(".", "/")).with_suffix(".py").is_file()]
            found += files or [module]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [module for module in found if module.startswith("zipar_train.")]


def test_only_packages_and_the_entry_points_stand_at_the_top():
    found = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "recipes")}
    assert found == {*PACKAGES, *BESIDE}


def test_packages_import_only_from_those_before_them():
    for path in FILES:
        if path.parent == PACKAGE:
            continue
        mine = path.relative_to(PACKAGE).parts[0]
        for other in imports(path):
            package = other.split(".")[1]
            assert package in PACKAGES, f"{module(path)} imports {other}"
            assert PACKAGES.index(package) <= PACKAGES.index(mine), f"{module(path)} imports {other}"


def test_no_modules_import_each_other():
    graph = {module(path): {other for other in imports(path) if other != module(path)} for path in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_file_is_long():
    files = [path for folder in ("zipar_train", "tests", "scripts") for path in (PACKAGE.parent / folder).rglob("*.py")]
    lines = {str(path): len(path.read_text().splitlines()) for path in files}
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def test_files_are_short_and_say_what_they_are():
    for path in FILES:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert path.stem not in ("utils", "helpers", "misc")
    core = ["plan/grid", "plan/table", "plan/masks", "decoding/decoder"]
    assert sum(len((PACKAGE / f"{name}.py").read_text().split("\n")) for name in core) < 640


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("zipar_train.recipe.load", ["torch"]),
        ("zipar_train.plan.table", ["torch"]),
        ("zipar_train.decoding.generator", ["wandb", "webdataset", "torch_fidelity", "matplotlib", "lightning"]),
        ("zipar_train.training.trainer", ["wandb", "webdataset"]),
        ("zipar_train.doctor.examine", ["torch", "lightning", "transformers", "wandb", "packaging", "psutil"]),
    ],
)
def test_optional_packages_may_be_missing(module, absent):
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_ship_inside_the_wheel(tmp_path):
    """Built for real, installed nowhere: the archive's own list."""
    import zipfile

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        PACKAGE.parent,
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for recipe in (PACKAGE.parent / "recipes").glob("*.yaml"):
        assert f"zipar_train/recipes/{recipe.name}" in names
    assert "zipar_train/py.typed" in names


def test_docstrings_stand_without_the_names_they_describe():
    """Ruff checks their form; this, that they do not continue a sentence that the name begins."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or "Absent"
                assert text.split()[0] not in ("Of", "That", "What") and not text[0].islower(), f"{path}: {text[:60]}"
