"""One recipe on several grids: tokenized by aspect ratio, trained in batches of one grid, generated on any of them."""

import json
from collections import Counter

import pytest
import several_grids
import torch
from commands import picture, sets
from several_grids import CODES, COUNT, NEAREST, SIDES, SIZES, overrides

from zipar_train.data.batch import Batch
from zipar_train.data.crops import views
from zipar_train.data.epoch_order import Share
from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.decoding.generator import Generator
from zipar_train.export.model_card import model_card
from zipar_train.models.family import build, target_hidden_states
from zipar_train.models.restore import LoadedWeights, load_family
from zipar_train.models.tokenizers.base import Palette
from zipar_train.plan.masks import dense
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import RecipeError, load_recipe
from zipar_train.training.trainer import module_of


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return several_grids.words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def shards(words, tmp_path_factory):
    return several_grids.shards(words, tmp_path_factory.mktemp("shards"))


def test_every_image_has_the_grid_of_the_nearest_aspect_ratio(shards):
    manifest = read_manifest(shards / "train.json")
    found = {}
    for shard in manifest.shards:
        grid = manifest.grid_of(shard)
        for sample in read_shard(shards / "train.json", shard, manifest):
            assert sample.codes.shape == (1, grid.height, grid.width)
            found[sample.key] = (grid.height, grid.width)
    assert [found[key] for key in sorted(found)] == [NEAREST[i % 5] for i in range(COUNT)]
    assert len(manifest.shards) == 3 * 3  # parts times grids
    assert sorted((grid.height, grid.width) for grid, _ in manifest.split()) == sorted(SIDES)


def test_codes_are_those_of_the_whole_picture_at_its_grid(shards):
    manifest = read_manifest(shards / "train.json")
    shard = next(s for s in manifest.shards if s.grid == (3, 6))
    sample = next(iter(read_shard(shards / "train.json", shard, manifest)))
    number = int(sample.key[-4:])
    pixels = views(picture(number, SIZES[number % 5]), 3, 6, "one")
    assert (Palette.grey(CODES).encode(pixels).numpy() == sample.codes).all()


@pytest.mark.parametrize("shuffle", [1, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_one_grid_and_every_sample_is_seen(shards, shuffle, workers):
    loader = ShardLoader(shards / "train.json", batch_size=3, seed=1, shuffle=shuffle, workers=workers)
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        assert batch.codes.shape[1] == batch.sides[0] * batch.sides[1]
        for key in batch.keys:
            assert NEAREST[int(key[-4:]) % 5] == batch.sides
    counts = Counter(key for batch in batches for key in batch.keys)
    assert len(counts) == COUNT
    assert {batch.sides for batch in batches} == set(SIDES)
    if shuffle == 1:
        assert set(counts.values()) == {1}
    else:
        turns = [batch.sides for batch in batches]
        assert turns != sorted(turns, key=turns.index)  # mixed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_epoch_goes_on_where_it_stopped(shards, ranks):
    def steps(first, rank):
        loader = ShardLoader(
            shards / "train.json", batch_size=2, step=2 * ranks, shuffle=50, seed=3, share=Share(rank, ranks)
        )
        loader.load_state_dict({"epoch": 0, "steps": first})
        return [batch.keys for batch in loader]

    for rank in range(ranks):
        whole = steps(0, rank)
        for first in range(len(whole)):
            assert steps(first, rank) == whole[first:]


def test_only_one_grid_can_be_read(shards):
    loader = ShardLoader(shards / "train.json", batch_size=4, sides=[6, 3])
    assert {batch.sides for batch in loader} == {(6, 3)}
    assert loader.manifest.samples == COUNT // 5
    with pytest.raises(ValueError, match="train.json has no images of 5x5 codes, only of 4x4, 3x6, 6x3: use shards"):
        ShardLoader(shards / "train.json", batch_size=4, sides=[5, 5])


def test_the_loss_of_a_batch_is_that_of_a_model_built_on_its_grid(shards, words):
    """Every grid, with its own size in the prompt; the widest window is next-token on each."""
    recipe = load_recipe("emu3-gen", overrides(words, shards))
    torch.manual_seed(0)
    family = build(recipe.model, dtype=torch.float64)
    module = module_of(recipe, family)
    seen = set()
    for batch in ShardLoader(shards / "train.json", batch_size=3):
        seen.add(batch.sides)
        alone = build(recipe.model.on(batch.sides), dtype=torch.float64)
        alone.model.load_state_dict(family.model.state_dict())
        condition = alone.check(batch.condition)
        for window in (5, 2):
            size = alone.grid.row_length if window == 5 else window
            plan = Plan.zipar(alone.grid, window=size, prompt=alone.prompt_length)
            hidden = target_hidden_states(alone, plan, batch.codes, condition, dense(plan))
            logits = alone.head(hidden).log_softmax(-1)
            expected = -logits.gather(-1, batch.codes[..., None]).mean()
            found = module.losses(batch, module.plans.family(batch.sides).check(batch.condition), window)[0]
            assert abs(found - expected) < 1e-9
    assert seen == set(SIDES)


def test_images_of_a_grid_are_those_of_a_model_of_that_grid(words, tmp_path):
    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    torch.manual_seed(0)
    state = build(recipe.model).model.state_dict()
    saved = LoadedWeights(tmp_path, recipe, state, {})
    generator = Generator(recipe, saved, device="cpu")
    for rows, columns in SIDES:
        own = recipe.model_copy(update={"model": recipe.model.on([rows, columns])})
        alone = Generator(own, saved._replace(recipe=own), device="cpu").generate(["a car", "a red car"], window=2)
        found = generator.generate(["a car", "a red car"], window=2, grid=[rows, columns])
        assert torch.equal(found.codes, alone.codes)
        assert found.codes.shape[1:] == (rows, columns)
        assert found.pixels.shape[2:] == (rows, columns)
    with pytest.raises(ValueError, match="grid 5x5: the recipe has 4x4, 3x6, 6x3. Add it to model.other_grids"):
        generator.generate(["a car"], grid=[5, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.other_grids=[[3,6],[3,6]]"], r"other_grids: \[3, 6\] is given twice"),
        (["model.other_grids=[[4,4]]"], r"other_grids: \[4, 4\] is given twice, or is grid"),
        (["model.other_grids=[[200,200]]"], "40,000 codes, more than 16,384"),
        (["model.preview=[2,2]"], "only glm-image has one"),
    ],
)
def test_what_recipes_cannot_have(words, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("emu3-gen", overrides(words, tmp_path, *changes))


def test_models_without_sizes_in_their_prompt_have_one_grid():
    with pytest.raises(RecipeError, match="family llamagen does not know the size of an image"):
        load_recipe("digits", ["model.other_grids=[[4,4]]"])


def test_shards_of_a_grid_that_the_recipe_lacks_are_refused(shards, words):
    recipe = load_recipe("emu3-gen", overrides(words, shards, "model.other_grids=[[3,6]]"))
    with pytest.raises(ValueError, match="grid 6x3, but the recipe's model has 4x4 or 3x6"):
        read_manifest(shards / "train.json", grids=recipe.model.rasters)


def test_the_command_line(shards, words, tmp_path, run):
    """Tokenized before: trained for an epoch, evaluated on the first grid, generated on another."""
    settings = sets(overrides(words, shards, f"run_dir={tmp_path}/run", "optim.lr=1e-2"))
    status, out, err = run("shards", "check", shards / "train.json", "--recipe", "emu3-gen", *settings)
    assert status == 0, err
    assert "4 x 4, 3 x 6, 6 x 3" in out
    status, out, err = run("fit", "--recipe", "emu3-gen", *settings)
    assert status == 0, err
    written = (tmp_path / "run" / "metrics.csv").read_text() if (tmp_path / "run" / "metrics.csv").exists() else ""
    assert "nan" not in written
    status, out, err = run(
        "generate", "--checkpoint", tmp_path / "run", "--caption", "a car", "--grid", "6x3", "--window", "2",
        "--out", tmp_path / "wide.png",
    )  # fmt: skip
    assert status == 0, err
    status, out, err = run(
        "generate", "--checkpoint", tmp_path / "run", "--caption", "a car", "--grid", "6 by 3", "--out",
        tmp_path / "wide.png",
    )  # fmt: skip
    assert status == 2 and "--grid '6 by 3': write rows and columns of codes, for example 48x64" in err
    manifest = json.loads((shards / "train.json").read_text())
    assert manifest["other_grids"] == [[3, 6], [6, 3]]


def test_weights_of_a_run_fit_each_of_its_grids(words, tmp_path):
    """So that `evaluate --set model.grid=...` and `advise` work on each."""
    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    saved = LoadedWeights(tmp_path, recipe, build(recipe.model).model.state_dict(), {})
    for sides in SIDES:
        assert load_family(recipe.model.on(sides), saved).grid == recipe.model.on(sides).raster
    with pytest.raises(ValueError, match=r"its model.grid is \[4, 4\], here it is \[5, 5\]"):
        load_family(recipe.model.on((5, 5)), saved)


def test_a_batch_without_sides_has_the_grid_of_the_recipe(words, tmp_path):
    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    family = build(recipe.model)
    module = module_of(recipe, family)
    assert module.plans.family(Batch(torch.zeros(1, 16), None).sides) is family


def test_a_model_card_names_all_grids_and_generates_from_a_caption(words, tmp_path):
    recipe = load_recipe("emu3-gen", overrides(words, tmp_path))
    card = model_card(recipe, LoadedWeights(tmp_path, recipe, {}, {}), [], "hf")
    assert "4 x 4 or 3 x 6 or 6 x 3 codes" in card
    assert "A window of 5 is next-token decoding" in card  # 4 codes and the row end
    assert '.generate(["a blue car"]' in card and "[3, 5]" not in card
