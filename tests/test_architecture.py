"""The house: one direction of imports, a core that needs little, files that stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zipar_train"
ROOMS = [
    *(
        "grid",
        "stand_in",
        "plan",
        "masks",
        "launcher",
        "signals",
        "output",
        "files",
        "wording",
        "checkpoints",
        "history",
        "picture",
    ),
    "plain",
    "trainer_arguments",
    *("section", "paper", "sections", "remote", "expansion", "recipe", "processes", "environment", "peak_flops"),
    *(
        "models.additive",
        "models.attention",
        "models.compiled",
        "models.cache_argument",
        "models.rope",
        "models.modeling_llamagen",
        "models.published",
        "models.filling",
        "models.pretrained",
        "models.text",
        "models.layout",
        "models.lora",
    ),
    "models.prompts",
    *(
        "models.vq16",
        "models.emu3_vq",
        "models.chameleon_vq",
        "models.vq",
        "models.llamagen",
        "models.captioned",
        "models.janus",
        "models.emu3",
        "models.lumina",
    ),
    *("models.family", "models"),
    *("labels", "foreign", "shards", "order", "loader", "crops", "keys", "picture_decoding", "picture_files"),
    *("source", "source_tars", "source_tables", "images", "splits", "tokenize", "importers", "check"),
    *("decoding.cache", "decoding.memory", "decoding.canvas", "decoding.capture", "decoding.packed", "decoding.body"),
    *("decoding.place", "decoding.pixels", "decoding.sampling", "decoding.decoder", "decoding.rows"),
    *("decoding.adaptive", "decoding"),
    *("training.guard", "training.loss", "training.optimizer", "training.module", "training.datamodule"),
    *("training.resumable", "training.average", "training.log", "training.callbacks", "training.meter"),
    *("training.samples", "training.tracking"),
    *("training.trainer", "training.fit", "training.memory", "training"),
    *("evaluation.metrics", "evaluation.adm", "evaluation.features", "evaluation.classifier", "evaluation.drawing"),
    *("evaluation.captions", "evaluation.subjects", "evaluation.reference", "evaluation.scores", "evaluation.clip"),
    *("evaluation.protocol", "evaluation.results", "evaluation.evaluate", "evaluation.search", "evaluation.plots"),
    *("evaluation.page", "evaluation.report", "evaluation.advise", "evaluation"),
    *("benchmark.floor", "benchmark.turns", "benchmark.subject", "benchmark.baseline", "benchmark.stock"),
    *("benchmark.decode", "benchmark.train", "benchmark.report", "benchmark"),
    *("export", "trials", "outcome", "sweep"),
    *("doctor.rows", "doctor.report", "doctor.packages", "doctor.devices", "doctor.attention", "doctor.disk"),
    *("doctor.tracking", "doctor.recipes", "doctor.sources", "doctor.examine", "doctor"),
    *("options", "shards_cli", "bench_cli", "evaluate_cli", "sweep_cli", "doctor_cli", "cli", "__main__"),
]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" and "recipes" not in p.parts)


def room(module: str) -> int:
    """The place of a module's room: its own entry, or its folder's."""
    name = module.removeprefix("zipar_train.")
    while name not in ROOMS:
        assert "." in name, f"{module} has no room: add it to ROOMS where it belongs"
        name = name.rpartition(".")[0]
    return ROOMS.index(name)


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down_the_list_only(path):
    mine = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for other in imports(path):
        same_folder = room(other) == room(mine) and other.rpartition(".")[0] == mine.rpartition(".")[0]
        assert room(other) < room(mine) or same_folder, f"{mine} imports {other}"


def test_files_are_short_and_say_what_they_are():
    for path in FILES:
        text = path.read_text()
        assert len(text.split("\n")) <= 350, path
        assert ast.get_docstring(ast.parse(text)), path
        assert path.stem not in ("utils", "helpers", "misc")
    core = ["grid", "plan", "masks", "decoding/decoder"]
    assert sum(len((PACKAGE / f"{name}.py").read_text().split("\n")) for name in core) < 510


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("zipar_train.recipe", ["torch"]),
        ("zipar_train.plan", ["torch"]),
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
