"""Sweep files: their trials by value, the recipes that agents make of them, mistakes told."""

from math import log

import numpy as np
import pytest
import yaml
from sweep_files import GRIDS, SHIPPED, agents, write

from zipar_train.recipe.load import load_recipe, recipe_folder
from zipar_train.sweep.overrides import overrides_of, overrides_of_agent
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of


def test_shipped_grids_by_value():
    windows, distillation = (
        trials_of(read_sweep(recipe_folder() / "sweeps" / f"{name}.yaml")) for name in ("windows", "distillation")
    )
    val = {"data.val_windows": [8, 4, 2, 1]}
    mixes = ["{8: 1}", "{4: 1}", "{2: 1}", "{8: 1, 4: 1, 2: 1}"]
    assert windows == [{**val, "zipar.windows": mix} for mix in mixes]
    assert distillation == [
        {**val, "optim.lr": lr, "tune.distill": share} for lr in (3e-5, 1e-4, 3e-4, 1e-3) for share in (0.0, 0.8)
    ]


def test_made_up_grids_by_value(tmp_path):
    """The last key turns fastest; keys in W&B's order, each depth sorted; of 1 and 1.0 the last counts."""
    trials = trials_of(read_sweep(write(tmp_path, GRIDS["nested"])))
    assert len(trials) == 12 and list(trials[0]) == [
        "data.label_dropout",
        "optim.betas",
        "optim.lr",
        "optim.warmup",
        "zipar.stand_in",
    ]
    assert [(t["data.label_dropout"], t["optim.lr"], t["optim.warmup"]) for t in trials[:4]] == [
        (0.0, 0.1, 0.5),
        (0.0, 0.1, 0.1),
        (0.0, 1e-5, 0.5),
        (0.0, 1e-5, 0.1),
    ]
    path = write(tmp_path, GRIDS["ranges"])
    capped, whole = trials_of(read_sweep(path)), trials_of(read_sweep(path)._replace(cap=None))
    assert len(capped) == 7 and capped == whole[:7] == trials_of(read_sweep(path), count=9)[:7] and len(whole) == 72
    assert {t["data.micro_batch_size"] for t in whole} == {4, 8, 12} and {t["seed"] for t in whole} == {3, 4, 5, 6}
    twice = trials_of(read_sweep(write(tmp_path, GRIDS["twice"])))
    assert [repr(trial["optim.weight_decay"]) for trial in twice] == ["1.0", "0.5", "0"]


def test_random_trials_are_of_their_distributions_and_repeatable(tmp_path):
    path = write(
        tmp_path,
        """
method: random
parameters:
  a: {distribution: log_uniform_values, min: 0.001, max: 0.1}
  b: {min: 2, max: 4}
  c: {values: [x, y], probabilities: [0.9, 0.1]}
  d: {distribution: normal, mu: 5.0, sigma: 2.0}
  e: {min: 0.0, max: 1.0}
""",
    )
    sweep = read_sweep(path)
    with pytest.raises(ValueError, match="a random sweep has no end: give --count"):
        trials_of(sweep)
    found = trials_of(sweep, count=2000, seed=1)
    assert found == trials_of(sweep, count=2000, seed=1) != trials_of(sweep, count=2000, seed=2)
    assert found[:5] == trials_of(sweep, count=5, seed=1)
    a, b, d, e = (np.array([trial[key] for trial in found]) for key in "abde")
    assert abs(np.log(a).mean() - log(0.01)) < 0.1 and a.min() >= 0.001 and a.max() <= 0.1
    assert set(b) == {2, 3, 4} and {type(trial["b"]) for trial in found} == {int}
    assert 0.87 < np.mean([trial["c"] == "x" for trial in found]) < 0.93
    assert abs(d.mean() - 5) < 0.2 and abs(d.std() - 2) < 0.2
    assert abs(e.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not readable YAML"),
        ("method: grid", "a sweep file has `parameters`"),
        ("parameters: {a: {value: 1}}", "method = None: use grid or random here"),
        ("method: bayes\nparameters: {a: {value: 1}}", "method = 'bayes': use grid or random here"),
        (
            "method: grid\nruncap: 3\nparameters: {a: {value: 1}}",
            "runcap is not a key of a sweep. Did you mean run_cap",
        ),
        ("method: grid\nparameters: {a: 3}", "parameters.a = 3: write `value: 3`"),
        ("method: grid\nparameters: {a: {values: []}}", r"values = \[\]: a list of at least one"),
        ("method: grid\nparameters: {a: {min: 0.5, max: 1.0}}", "a grid needs values, not uniform"),
        ("method: grid\nparameters: {a: {values: [1], q: 2}}", "categorical has no q, but values"),
        ("method: grid\nparameters: {a: {parameters: 3}}", "parameters.a has `parameters`: give it some"),
        ("method: grid\nparameters: {a.b: {value: 1}, a: {parameters: {b: {value: 2}}}}", "a.b is there twice"),
        ("method: grid\nparameters: {a: {distribution: int_uniform, min: 0.5, max: 2}}", "0.5 is not a whole number"),
        ("method: random\nparameters: {a: {min: 1e-4, max: 1.0}}", "min = '1e-4' is not a number .write 1.0e-4"),
        ("method: random\nparameters: {a: {min: 2, max: 1}}", "min 2 is not below max 1"),
        ("method: random\nparameters: {a: {values: [1, 2], probabilities: [1.0]}}", "one for each of the values"),
        ("method: random\nparameters: {a: {distribution: gamma}}", "distribution 'gamma' is unknown. Known: constant"),
        ("method: random\nparameters: {a: {distribution: q_normal, q: 0}}", "q = 0 must be above 0"),
        ("method: grid\nparameters: {a: {}}", "distribution None is unknown"),
        ("method: grid\nrun_cap: 0\nparameters: {a: {value: 1}}", "run_cap = 0: a whole number from 1"),
        ("method: grid\nmetric: {goal: most}\nparameters: {a: {value: 1}}", "metric = .*goal: minimize or maximize"),
    ],
)
def test_files_with_mistakes_say_which(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(write(tmp_path, text))


@pytest.mark.parametrize("recipe", ["digits", "llamagen-l"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_fit_recipes_and_are_for_wandb_too(path, recipe):
    for values in trials_of(read_sweep(path)):
        load_recipe(recipe, overrides_of(values))
    raw = yaml.safe_load(path.read_text())
    assert raw["command"][-1] == "${args_no_hyphens}" and raw["metric"]["name"].startswith("val/bits_w")


@pytest.mark.slow
def test_values_reach_the_recipe_as_they_are_meant():
    values = {
        "tune": {"distill": 0.5},
        "optim.ema_decay": None,
        "optim.lr": 1e-5,
        "zipar.windows": {"8": 2, 4: 1},
        "optim.schedule": "constant",
        "data.val_windows": [4, 2],
    }
    local = overrides_of(values)
    assert local == [
        "tune.distill=0.5",
        "optim.ema_decay=null",
        "optim.lr=1.0e-05",
        "zipar.windows={8: 2, 4: 1}",
        "optim.schedule=constant",
        "data.val_windows=[4, 2]",
    ]
    recipe = load_recipe("digits", local)
    assert recipe.tune.distill == 0.5 and recipe.tune.attention == "sdpa"  # beside it
    assert list(recipe.zipar.windows.items()) == [(8, 2), (4, 1)]
    assert overrides_of_agent(agents({key: {"value": value} for key, value in values.items()})) == local
    assert overrides_of_agent(["plain", "a=b=c", "optim.lr=", "x=[1"]) == ["plain", "a=b=c", "optim.lr=", "x=[1"]
