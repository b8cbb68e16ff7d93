"""Ranges: a number just outside its own is refused by name, just inside accepted; none is without one."""

import copy

import pytest
import yaml
from pydantic import ValidationError
from ranges import RANGES, TRAINER, beyond, numbers_of

from zipar_train.recipe.load import dump, load_recipe, shipped
from zipar_train.recipe.schema import Recipe
from zipar_train.recipe.trainer import OURS, TrainerArguments, trainer_arguments


def whole():
    """A recipe's data in which every optional section is there, though they do not go together."""
    raw = yaml.safe_load(dump(load_recipe("digits")))
    raw["model"] |= {
        "t5_features": {"encoder": "x", "tokens": 3, "features": 3},
        "token_prompt": {"encoder": "x", "tokens": 3},
    }
    raw["model"] |= {"preview": [1, 1], "other_grids": [[1, 1]]}
    raw["tune"]["lora"] = {"rank": 1, "alpha": 1, "targets": ["q_proj"]}
    raw["data"]["val_windows"] = [1]
    raw["published_results"] = {"source": "x", "protocol": {}, "rows": [{"window": 1, "passes": 1}]}
    return raw


WHOLE = whole()


def refused(path: str, value: object) -> bool:
    """Whether a recipe with this value is refused because of it."""
    raw = copy.deepcopy(WHOLE)
    *sections, last = path.split(".")
    place, at = raw, []
    for part in sections:
        at.append(0 if part == "*" else part)
        place = place[at[-1]]
    if last == "#":
        place.clear()
        place[value] = 1.0
    elif last == "*":
        at.append(1 if isinstance(place, dict) else 0)
        place[at[-1]] = value
        at[-1] = "1" if isinstance(place, dict) else 0
    else:
        place[last] = value
        at.append(last)
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        return any([str(part) for part in problem["loc"]][: len(at)] == [*map(str, at)] for problem in error.errors())
    return False


def test_every_number_has_a_range():
    assert sorted(numbers_of(Recipe)) == sorted(RANGES)


@pytest.mark.parametrize("path", RANGES)
def test_numbers_just_outside_are_refused_and_just_inside_accepted(path):
    for value in RANGES[path].inside():
        assert not refused(path, value), value
    for value in RANGES[path].outside():
        if path.endswith("#") and not isinstance(value, int | float | str):
            continue  # no key of a mapping
        assert refused(path, value), value


@pytest.mark.parametrize("value", [1e-300, 1e-9, 0.00099])
def test_a_temperature_that_leaves_no_finite_numbers_is_refused(value):
    assert refused("sampling.temperature", value)
    assert not refused("sampling.temperature", 0.001)


def test_every_argument_of_lightnings_trainer_has_a_rule():
    assert sorted(TRAINER) == sorted(trainer_arguments())
    assert sorted({*TrainerArguments.__annotations__, *OURS}) == sorted(trainer_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINER)
def test_trainers_arguments_have_ranges(name):
    for value in TRAINER[name][0]:
        more = ["trainer.max_steps=3"] if name == "max_epochs" and value == -1 else []
        load_recipe("digits", [*more, f"trainer.{name}={yaml.safe_dump(value, default_flow_style=True)}"])
    for value in TRAINER[name][1]:
        with pytest.raises(ValueError, match=f"digits.yaml: 1 mistake\n  trainer.{name} = "):
            load_recipe("digits", [f"trainer.{name}={yaml.safe_dump(value, default_flow_style=True)}"])


def test_shipped_recipes_are_within_the_ranges():
    for name in shipped():
        assert beyond(yaml.safe_load(dump(load_recipe(name)))) == []


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="trainer.max_epochs = -1: the schedule needs an end"):
        load_recipe("digits", ["trainer.max_epochs=-1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.grid=[129,128]"], "grid [129, 128]: 16,512 codes, more than 16,384"),
        (
            ["data.micro_batch_size=65536", "model.codebook_size=65536"],
            "data.micro_batch_size = 65536: 3e+11 logits a step, more than 3e+10",
        ),
        (
            ["optim.global_batch_size=1048576", "model.grid=[128,128]"],
            "a step of 1,048,576 images has 2e+10 codes, more than 3e+08",
        ),
        (
            ["model.num_layers=128", "model.hidden_size=65536", "model.num_heads=16"],
            "parameters by its shape, more than",
        ),
        (["model.num_kv_heads=2"], "num_kv_heads 2: family llamagen has a key for every query"),
    ],
)
def test_shapes_that_nothing_could_hold_are_refused(overrides, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        load_recipe("digits", overrides)
    assert message in str(error.value)


def test_key_heads_and_vocabularies_fit():
    small = ["model.size=null", "model.num_layers=1", "model.num_heads=4", "model.hidden_size=16"]
    with pytest.raises(ValueError, match="num_kv_heads 3: 4 heads cannot share them evenly"):
        load_recipe("emu3-gen", [*small, "model.num_kv_heads=3"])
    with pytest.raises(
        ValueError, match="codebook_size 32768: token_prompt.vocabulary 32775 cannot hold them and 8 ids more"
    ):
        load_recipe("emu3-gen", [*small, "model.token_prompt.vocabulary=32775"])
    load_recipe("emu3-gen", [*small, "model.num_kv_heads=2", "model.token_prompt.vocabulary=32776"])
    with pytest.raises(ValueError, match="size already fixes"):
        load_recipe("emu3-gen", ["model.ffn_size=64"])
