"""Recipes: every shipped one parses; every mistake is named with its key, value and remedy, all at once."""

import inspect

import lightning as L
import pytest
import yaml

from zipar_train.models.family import build
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import differences, dump, load_recipe, parse, shipped
from zipar_train.recipe.schema import RecipeError
from zipar_train.recipe.trainer import trainer_arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_builds_its_plans_and_its_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    for window in (*recipe.zipar.windows, *recipe.evaluate.windows):
        Plan.zipar(recipe.model.raster, window=window)
    family = build(recipe.model, device="meta")
    if recipe.model.size == "L":
        assert sum(p.numel() for p in family.model.parameters()) == 342_910_976  # LlamaGen's own count


def test_dump_is_the_whole_recipe():
    recipe = load_recipe("digits", ["seed=7", "zipar.windows={8: 2, 3: 0.5}"])
    assert parse(yaml.safe_load(dump(recipe)), where="dump") == recipe


def test_overrides_environment_and_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPAR_DATA", "/shards")
    recipe = load_recipe("digits", ["optim.lr=1e-5", "zipar.windows.3=2", "trainer.precision=bf16-mixed"])
    assert recipe.data.train == "/shards/digits/train.json"
    assert (recipe.optim.lr, recipe.zipar.windows[3], recipe.trainer["precision"]) == (1e-5, 2, "bf16-mixed")
    copy = tmp_path / "mine.yaml"
    copy.write_text(dump(recipe))
    assert load_recipe(copy) == recipe
    assert load_recipe(copy, ["seed=3"]).seed == 3


def test_trainer_arguments_are_lightnings_own():
    assert trainer_arguments() == tuple(n for n in inspect.signature(L.Trainer.__init__).parameters if n != "self")


MISTAKES = [
    (["zipar.window=3"], "zipar.window = 3: unknown key. Did you mean zipar.windows?"),
    (["modle.depth=3"], "modle = {'depth': 3}: unknown key. Did you mean model?"),
    (["optim.lr=-1"], "optim.lr = -1: input should be greater than 0"),
    (["optim.lr=.inf"], "optim.lr = inf: input should be a finite number"),
    (["seed=true"], "seed = True: input should be a valid integer"),
    (["data.micro_batch_size=many"], "data.micro_batch_size = 'many': input should be a valid integer"),
    (["data.label_dropout=1.5"], "data.label_dropout = 1.5"),
    (["model.tokenizer=palet"], "model.tokenizer = 'palet': input should be 'palette'"),
    (["model.family=dalle"], "model.family = 'dalle': input should be 'llamagen'"),
    (["model.codebook_size=70000"], "model.codebook_size = 70000: input should be less than or equal to 65536"),
    (["model.grid=[8]"], "model.grid = [8]"),
    (["model.size=L"], "model: size already fixes num_layers, num_heads, hidden_size"),
    (["model.num_layers=null"], "model: give either size, or num_layers, num_heads and hidden_size"),
    (["model.num_heads=5"], "model: hidden_size 96 over 5 heads"),
    (["zipar.windows={9: 1}"], "zipar.windows = 9: wider than a row of 8 codes. Use 1 .. 8."),
    (["zipar.windows={0: 1}"], "zipar.windows"),
    (["zipar.windows={4: 0}"], "zipar.windows.4 = 0: input should be greater than or equal to 0.0001"),
    (["evaluate.windows=[8, 10]"], "evaluate.windows = 10: wider than a row of 8 codes"),
    (["evaluate.seeds=[3, 3]"], "the same images twice would be taken for a spread"),
    (["evaluate.clip=x"], "evaluate.clip scores captions, and this model is prompted by classes"),
    (["evaluate.resize_to=100000"], "evaluate.resize_to = 100000"),
    (
        ["trainer.max_epoch=3"],
        "trainer.max_epoch = 3: not an argument of lightning.Trainer. Did you mean trainer.max_epochs?",
    ),
    (["trainer.callbacks=[x]"], "trainer.callbacks = ['x']: zipar-train sets this itself"),
    (
        ["trainer.strategy=fsdp", "trainer.devices=2", "optim.ema_decay=0.9"],
        "optim.ema_decay: averages are not kept under",
    ),
    (["trainer.strategy=fsdp"], "trainer.devices = None: trainer.strategy = fsdp needs their number on a node"),
    (["trainer.strategy=fsdp", "trainer.devices=2", "trainer.num_nodes=null"], "trainer.num_nodes = None"),
    (["data.train=${NOWHERE}/x"], "data.train = '${NOWHERE}/x': the environment variable NOWHERE is not set"),
    (["run_dir=${WANDB_API_KEY:-x}"], "keep $WANDB_API_KEY out of it"),
    (["name=../x"], "name = '../x'"),
    (["seed"], "--set 'seed': write it as key.path=value"),
    (["seed=[1"], "the value is not YAML"),
    (["seed.x=1"], "--set 'seed.x=1': seed is a value, not a section"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes_are_named_with_their_remedy(overrides, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", overrides)
    assert message in str(error.value)


def test_all_mistakes_at_once():
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", ["zipar.window=3", "optim.lr=-1", "seed=x", "data.val=${NOWHERE}"])
    lines = str(error.value).split("\n")
    assert "4 mistakes" in lines[0]
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not readable YAML"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("just words", "holds no sections"),
        ("", "holds no sections"),
        ("name: x", "model: missing"),
        ("!!python/object/apply:os.system ['true']", "is not readable YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message in str(error.value)
    assert "r.yaml" in str(error.value)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(RecipeError, match="no recipe 'digit'. Did you mean digits?"):
        load_recipe("digit")
    with pytest.raises(RecipeError, match="no recipe file gone.yaml"):
        load_recipe("gone.yaml")


def test_differences_name_keys():
    a, b = load_recipe("digits"), load_recipe("digits", ["optim.lr=0.5", "log.project=x"])
    assert differences(a, b, ignore=("log",)) == ["optim.lr: 0.001 -> 0.5"]


@pytest.mark.parametrize(
    ("recipe", "grid", "message"),
    [
        ("janus-pro-1b", "[24,16]", "grid [24, 16]: Janus-Pro's prompt names no size"),
        ("lumina-mgpt-7b-768", "[48,47]", "grid [48, 47]: Lumina-mGPT's prompt counts sides in steps of 2 codes"),
        ("emu3-gen", "[96,96]", "grid [96, 96]: 9,408 tokens with row ends and prompt, and Emu3 knows 9,216"),
    ],
)
def test_grids_that_a_format_cannot_hold(recipe, grid, message):
    windows = ["zipar.windows={8: 1}", "evaluate.windows=[8]"]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, [*windows, f"model.grid={grid}"])
    assert message in str(error.value)
    load_recipe(recipe, [*windows, "model.grid=[24,24]"])
