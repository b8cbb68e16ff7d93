"""The documentation's blocks run as printed: Python, shell on small models, YAML, and what a page shows as output."""

import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import small_recipes
from command_lines import NAME
from pages import Block, blocks, blocks_of
from shell import Shell

from zipar_train.io import safe_yaml
from zipar_train.recipe.load import find, parse
from zipar_train.recipe.schema import Recipe, RecipeError

DIGITS, IMAGENET, L = "data/digits", "data/imagenet-384", "c2i_L_384.pt"
SLOW = pytest.mark.slow

PYTHON = [  # a block's page and first line, what it finds in its folder, and what its comments say
    (
        ("README.md", "from zipar_train import Grid, Plan, load"),
        ["runs/digits"],
        {"plan.passes": 400, "plan.grid.num_codes": 576, "images.passes.tolist()": [40, 40], "len(images.codes)": 2},
    ),
    (
        ("docs/plan.md", "from zipar_train import Grid, Plan"),
        [],
        {"plan.passes": 400, "plan.width": 2, "len(plan)": 598, "plan.visible().shape": (598, 598)},
    ),
    (("docs/models.md", "import torch"), [], {"codes.shape": (2, 20), "logits.shape": (2, 20, 16)}),
]
SHELL = [  # a block's page and first line, what it finds in its folder, what it leaves, marks
    (("README.md", f"{NAME} tokenize"), ["imagenet", L], ["dogs.png", "c2i_L_384_zipar.pt"], SLOW),
    (("README.md", f"{NAME} generate --checkpoint runs/digits --labels 3,5,8"), ["runs/digits"], ["grow.gif"], ()),
    (("data/README.md", f"{NAME} tokenize"), ["imagenet"], [DIGITS, IMAGENET], ()),
    (("docs/digits.md", f"{NAME} fit"), [DIGITS], ["runs/digits-0/evaluation/report.html"], SLOW),
    (("docs/digits.md", f"{NAME} evaluate"), [DIGITS, "runs/digits-base"], ["runs/effect/report.html"], SLOW),
    (
        ("docs/evaluation.md", f"{NAME} evaluate --recipe llamagen-l --checkpoint runs/llamagen-l --compare"),
        [IMAGENET, L, "runs/llamagen-l"],
        ["runs/llamagen-l/evaluation/report.json"],
        SLOW,
    ),
    (("docs/evaluation.md", f"{NAME} advise"), [DIGITS, "runs/digits-base"], ["advice.png"], ()),
    (("docs/llamagen.md", f"{NAME} tokenize"), ["imagenet", L], ["dogs.png", "c2i_L_384_zipar.pt"], ()),
    (
        ("docs/performance.md", f"{NAME} bench --recipe llamagen-b --windows 24,16,8,4 --repeats 2 --json"),
        [],
        ["bench.png", "bench.json"],
        SLOW,
    ),
    (
        ("docs/lookahead.md", f"{NAME} generate"),
        [DIGITS, "runs/digits"],
        ["digits.png", "runs/digits/evaluation/report.html"],
        SLOW,
    ),
    (("docs/performance.md", f"{NAME} bench --train"), [], [], ()),
    (
        ("docs/training.md", f"{NAME} fit --recipe llamagen-l"),
        [IMAGENET, L],
        ["runs/llamagen-l/checkpoints/last.ckpt"],
        (),
    ),
]
NOT_RUN = {  # a block's page and first line: the reason
    ("README.md", "scripts/quickstart"): "installs, and trains for minutes",
    (
        "docs/evaluation.md",
        f"{NAME} evaluate --recipe llamagen-l --checkpoint runs/llamagen-l --search-guidance",
    ): "5,000 images; tests/evaluation searches among fewer",
    ("docs/evidence.md", "scripts/gpu/prepare"): "downloads, and needs a GPU; tests/scripts run it at a small size",
    (
        "docs/performance.md",
        "python scripts/gpu/compile_kernels.py",
    ): "takes minutes; tests/scripts/test_compile_kernels.py runs parts of it",
    ("docs/evidence.md", "git clone"): "downloads, and trains for hours; tests/scripts run the steps at a small size",
    ("docs/lookahead.md", ".venv/bin/python"): "needs trained models; tests/scripts/test_lookahead_tables.py runs it",
    ("docs/models.md", f"{NAME} fit  --recipe lumina"): "7 B weights; tests/models/test_lumina.py has small ones",
    ("docs/models.md", f"{NAME} fit  --recipe janus"): "1 B weights; tests/models/test_janus.py has small ones",
    ("docs/models.md", f"{NAME} fit  --recipe emu3"): "8 B weights; tests/models/test_emu3.py has small ones",
    ("docs/models.md", f"{NAME} fit  --recipe simplear"): "551 M weights; tests/models/test_simplear.py has small ones",
    (
        "docs/models.md",
        f"{NAME} fit  --recipe glm",
    ): "9 B weights; tests/models/test_glm_image_commands.py has small ones",
    (
        "docs/performance.md",
        f"{NAME} bench --recipe llamagen-b --windows 24,16,8,4 --repeats 2 --png",
    ): "the page's first command with its picture elsewhere",
    (
        "docs/performance.md",
        f"{NAME} bench --recipe llamagen-b --no-baselines",
    ): "takes minutes with small models too; tests/benchmark run the options",
    (
        "docs/performance.md",
        f"{NAME} bench --recipe llamagen-b --rows 2,4,8,16,32 --repeats 3",
    ): "takes a minute with small models too; tests/benchmark/test_rows.py runs the options",
    (
        "docs/performance.md",
        f"{NAME} bench --recipe llamagen-b --rows 2,4,8,16,32 --repeats 5 --no-baselines --int8",
    ): "takes minutes; tests/benchmark/test_int8_rounds.py runs the options",
    (
        "docs/performance.md",
        ".venv/bin/python scripts/evidence/int8.py",
    ): "needs trained models; tests/scripts/test_int8_table.py runs it",
    (
        "docs/models.md",
        f"{NAME} tokenize --recipe emu3-gen",
    ): "needs pictures and the published tokenizer; tests/data/test_several_grids.py runs it at a small size",
    ("docs/sweeps.md", f"{NAME} sweep"): "trains for minutes; tests/sweep run such files",
    ("docs/demo.md", "pip install"): "installs, and waits for people; tests/demo run the page",
    ("docs/sweeps.md", "wandb sweep"): "needs W&B's server",
    ("docs/training.md", f"{NAME} doctor"): "tries torch.compile for half a minute; tests/doctor run it",
    ("docs/training.md", f"{NAME} fit --recipe llamagen-l --set"): "needs eight GPUs, and SLURM",
}
PRINTED = {  # a block without a language: the command whose output ends so, or the reason why there is none
    ("README.md", "zipar_train/"): "a tree: test_pages.py",
    ("CONTRIBUTING.md", "zipar_train/"): "a tree: test_pages.py",
    ("docs/plan.md", "342.9 M"): ["plan", "--recipe", "llamagen-l", "--device-memory", "16"],
    ("docs/sweeps.md", "trial"): "an example of a sweep's table",
}
COVERED = {
    "python": [key for key, *_ in PYTHON],
    "sh": [*(key for key, *_ in SHELL), *NOT_RUN],
    "": [*PRINTED],
    "yaml": [],  # all are loaded
}


def block_of(key: tuple[str, str]) -> Block:
    """The one block of a page whose first line starts so, or is so."""
    page, start = key
    found = [block for block in blocks() if block.page == page and block.name[1].startswith(start)]
    found = [block for block in found if block.name[1] == start] or found
    assert len(found) == 1, f"{page}: {len(found)} blocks begin with {start!r}: {[str(block) for block in found]}"
    return found[0]


def test_every_block_is_run_or_has_a_reason():
    """A new block needs an entry in a table above; the entry of a block that is gone needs to go."""
    for language, keys in COVERED.items():
        named = [block_of(key) for key in keys]
        assert all(block.language == language for block in named)
        assert len(set(named)) == len(named)
        if language != "yaml":
            missing = [str(block) for block in blocks(language) if block not in named]
            assert not missing, f"neither run nor listed: {missing}"
    assert {block.language for block in blocks()} <= {*COVERED}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    recipes = tmp_path_factory.mktemp("recipes")
    small_recipes.write_recipes(recipes)
    shell = Shell(tmp_path_factory.mktemp("shell"), partial(small_recipes.use, recipes))
    yield shell
    shell.close()


@pytest.fixture(scope="module")
def stock(shell, tmp_path_factory):
    """A folder with all that blocks need, made by the commands that the pages print."""
    folder, before = tmp_path_factory.mktemp("stock"), Path.cwd()
    small_recipes.write_weights(folder / L)
    small_recipes.write_pictures(folder / "imagenet", classes=small_recipes.CLASSES)
    small_recipes.write_pictures(folder / "pictures", classes=10, train=10, val=4)
    os.chdir(folder)
    done = shell(f"""
        zipar-train tokenize --recipe digits --images pictures --out {DIGITS}
        zipar-train tokenize --recipe llamagen-l --images imagenet --out {IMAGENET}
        for recipe in digits-base digits llamagen-l; do zipar-train fit --recipe $recipe; done
    """)
    os.chdir(before)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def supplied(stock):
    """Copy parts of the stock into this folder."""

    def copy(parts):
        for part in parts:
            Path(part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(stock / part, part) if (stock / part).is_dir() else shutil.copy(stock / part, part)

    return copy


@pytest.mark.slow
@pytest.mark.parametrize(("key", "needs", "said"), PYTHON, ids=[" ".join(key) for key, *_ in PYTHON])
def test_python_runs_as_printed(key, needs, said, supplied):
    block = block_of(key)
    supplied(needs)
    names = {"__name__": "page"}
    exec(compile(block.text, str(block), "exec"), names)
    for expression, value in said.items():
        assert eval(expression, names) == value, expression
    assert all(Path(file).exists() for file in re.findall(r'save\("(.+?)"\)', block.text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "needs", "leaves"),
    [pytest.param(*entry, marks=marks, id=" ".join(entry[0])) for *entry, marks in SHELL],
)
def test_shell_runs_as_printed(key, needs, leaves, supplied, shell):
    block = block_of(key)
    supplied(needs)
    done = shell(block.text, s="0")
    assert done.returncode == 0, f"{block}: {done.stderr}"
    for path in leaves:
        assert Path(path).exists(), f"{block} left no {path}"


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, made in PRINTED.items() if isinstance(made, list)], ids=" ".join)
def test_commands_print_what_the_page_shows(key, run):
    status, out, err = run(*PRINTED[key])
    assert status == 0, err
    shown = block_of(key).text
    assert out[-len(shown) :] == shown


def recipe_of(block: Block) -> Recipe:
    """The recipe that a YAML block is, or is part of: the word after `yaml` names the one that it changes."""
    part = safe_yaml.parse(block.text, loader=safe_yaml.RecipeLoader)
    raw = {} if "name" in part else safe_yaml.read(find(block.words), loader=safe_yaml.RecipeLoader)

    def merge(old, new):
        for name, value in new.items():
            old[name] = merge(old[name], value) if isinstance(old.get(name), dict) and name != "windows" else value
        return old

    return parse(merge(raw, part), where=str(block))


def test_yaml_blocks_are_recipes():
    for block in blocks("yaml"):
        recipe_of(block)


def test_yaml_blocks_change_the_recipe_that_they_name():
    good, bad, alone = blocks_of(
        "```yaml digits\nzipar:\n  windows: {8: 1}\noptim: {lr: 1e-4}\n```\n"
        "```yaml digits\noptim: {rate: 1e-4}\n```\n```yaml\noptim: {lr: 1e-4}\n```",
        "page",
    )
    recipe = recipe_of(good)
    assert (recipe.zipar.windows, recipe.optim.lr, recipe.optim.warmup) == ({8: 1}, 1e-4, 0.05)
    with pytest.raises(RecipeError, match="page:6: 1 mistake\\n  optim.rate"):
        recipe_of(bad)
    with pytest.raises(RecipeError, match="no recipe ''"):
        recipe_of(alone)


def test_shell_text_ends_with_its_first_failure(shell):
    done = shell("echo one; zipar-train plan --recipe llamagen-l --window 99; echo two")
    assert done.returncode == 2 and done.stdout == "one\n" and done.stderr.startswith("zipar-train: ")
    assert shell("zipar-train recipes | grep -c digits").stdout == "2\n"
