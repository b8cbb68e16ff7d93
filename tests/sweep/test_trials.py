"""Sweep files: the trials are W&B's own, and so are the recipes that its agents make of them.

W&B's enumeration is the package `sweeps`, which its server runs. It asks for numpy below 2, though it works with numpy
2, so that pip refuses it beside ours; scripts/test installs it without its wishes. Where it is missing some of these
tests are skipped; those that hold enumerations by value are not.
"""

import json
import warnings
from math import log
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zipar_train.recipe.load import load_recipe, recipe_folder
from zipar_train.sweep.distributions import SPREADS
from zipar_train.sweep.overrides import overrides_of, overrides_of_agent
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of

SHIPPED = sorted((recipe_folder() / "sweeps").glob("*.yaml"))
GRIDS = {
    "nested": """
method: grid
parameters:
  zipar.stand_in: {value: nearest}
  optim:
    parameters:
      warmup: {values: [0.5, 0.1]}
      betas: {value: [0.9, 0.95]}
      lr: {values: [0.1, 1.0e-05, 2e-4]}
  data: {parameters: {label_dropout: {values: [0.0, 0.5]}}}
""",
    "ranges": """
method: grid
run_cap: 7
parameters:
  seed: {min: 3, max: 6}
  data.label_dropout: {distribution: q_uniform, min: 0.0, max: 0.6, q: 0.2}
  data.micro_batch_size: {distribution: q_uniform, min: 4, max: 16, q: 4}
  data.workers: {distribution: int_uniform, min: 0, max: 1}
""",
    "kinds": """
method: grid
parameters:
  tune.activation_checkpointing: {values: [true, false]}
  optim.ema_decay: {values: [null, 0.999]}
  optim.schedule: {values: [cosine, constant]}
  zipar.windows: {values: ["{8: 1}", {8: 2, 1: 1}, "{4: 1, 2: 0.5}"]}
  optim.warmup: {values: [0]}
""",
    "lora": """
method: grid
parameters:
  tune.lora: {values: [null, {rank: 2, alpha: 4, targets: [q_proj, v_proj]}]}
  tune.distill: {values: [0.5]}
""",
    "twice": "method: grid\nparameters: {optim.weight_decay: {values: [1, 0.5, 1.0, 0.5, 0]}}",
    "constants": "method: grid\nparameters: {seed: {value: 3}, optim.lr: {distribution: constant, value: 0.1}}",
    "one": "method: grid\nparameters: {optim.lr: {values: [0.1]}}",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def sweeps():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old pydantic
        return pytest.importorskip("sweeps")


def wandbs(sweeps, raw: dict, *, at_once: int = 1) -> list[dict]:
    """The configs of W&B's runs, in its order, until it has no more."""
    runs: list = []
    while len(runs) < raw.get("run_cap", 4000):  # validate=True would drop nested parameters
        runs += (found := [run for run in sweeps.next_runs(raw, runs, n=at_once) if run is not None])
        if not found:
            break
    return [run.config for run in runs]


def flat(config: dict, parameters: dict, before: str = "") -> dict:
    """recipe path: value, of what W&B nests as the file does; `value` stands at the first depth alone."""
    found = {}
    for key, spread in parameters.items():
        value = config[key] if before else config[key]["value"]
        if "parameters" in spread:
            found |= flat(value, spread["parameters"], f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def agents(config: dict) -> list[str]:
    """What an agent puts in the place of ${args_no_hyphens}, once the server has sent the config as JSON."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    return create_sweep_command_args({"args": json.loads(json.dumps(config))})["args_no_hyphens"]


def texts(trials: list[dict]) -> list[str]:
    return [json.dumps(trial, sort_keys=True) for trial in trials]  # 1 and 1.0 are two


@pytest.mark.parametrize("name", [*GRIDS, *(path for path in SHIPPED if "method: grid" in path.read_text())], ids=str)
def test_grids_are_wandbs_own_in_its_order(name, tmp_path, sweeps):
    path = write(tmp_path, GRIDS[name]) if name in GRIDS else name
    raw = yaml.safe_load(path.read_text())
    assert not sweeps.schema_violations_from_proposed_config(raw)
    configs, trials = wandbs(sweeps, raw), trials_of(read_sweep(path))
    theirs = [flat(config, raw["parameters"]) for config in configs]
    assert texts(trials) == texts(theirs) and len(set(texts(trials))) == len(trials) > 0
    common = ["model.weights=base", "trainer.accelerator=cpu"]
    for config, trial in zip(configs, trials, strict=True):  # and so are the recipes that come of them
        local = load_recipe("llamagen-b", [*common, *overrides_of(trial)])
        assert load_recipe("llamagen-b", [*common, *overrides_of_agent(agents(config))]) == local


values = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, 2.5, 1e-5, True, False, None, "a", "1", "b c", "{8: 1}"]),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2)),
)
spreads = st.one_of(
    st.fixed_dictionaries({"values": st.lists(values, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"value": values}),
    st.integers(-3, 3).flatmap(lambda low: st.fixed_dictionaries({"min": st.just(low), "max": st.just(low + 2)})),
    st.sampled_from([0.25, 1, 0.1, 2]).map(lambda q: {"distribution": "q_uniform", "min": 0, "max": 1.5, "q": q}),
)
nested = st.dictionaries(st.sampled_from("pqr"), spreads, min_size=1, max_size=2).map(lambda p: {"parameters": p})
keys = st.sampled_from(["a", "b", "B", "a.b", "c_d", "a_b"])
grids = st.dictionaries(keys, st.one_of(spreads, nested), min_size=1, max_size=3)


@settings(max_examples=60)
@given(parameters=grids)
def test_any_grid_is_wandbs_own(parameters, tmp_path_factory, sweeps):
    raw = {"method": "grid", "run_cap": 3000, "parameters": parameters}  # four ranges of 16 make 65,536 trials
    path = write(tmp_path_factory.mktemp("grid"), yaml.safe_dump(raw))
    theirs = [flat(config, parameters) for config in wandbs(sweeps, raw, at_once=3000)]
    assert texts(trials_of(read_sweep(path))) == texts(theirs)


parts = st.fixed_dictionaries(
    {},
    optional={
        "value": st.just(3),
        "values": st.sampled_from([[], [1], [1, 2]]),
        "probabilities": st.sampled_from([[1.0], [0.5, 0.5], [0.5, 0.6], [-0.5, 1.5]]),
        "min": st.sampled_from([0, 1, 0.5, True, "1"]),
        "max": st.sampled_from([1, 2, 2.0, None]),
        "q": st.sampled_from([1, 0.5, 0]),
        "mu": st.sampled_from([0, 1.5]),
        "sigma": st.sampled_from([0, 1, -1]),
        "a": st.just(2),
        "b": st.just(0.5),
        "distribution": st.sampled_from([*SPREADS, "gamma"]),
    },
)


@settings(max_examples=400)
@given(spread=parts, method=st.sampled_from(["grid", "random"]))
def test_what_wandb_refuses_is_refused_here_and_nothing_else(spread, method, tmp_path_factory, sweeps):
    raw = {"method": method, "parameters": {"p": spread}}
    path = write(tmp_path_factory.mktemp("spread"), yaml.safe_dump(raw))
    try:
        problems = sweeps.schema_violations_from_proposed_config(raw)
        fine = all("min/max specify base-e exponents" in problem for problem in problems)  # advice
        fine = fine and sweeps.next_run(raw, []) is not None
    except Exception:
        fine = False
    try:
        read_sweep(path)
        ours = True
    except ValueError:
        ours = False
    assert ours == fine


def kinds() -> list[dict]:
    """A spread of each distribution."""
    numbers = {"min": 1.0, "max": 3.0, "mu": 0.5, "sigma": 1.5, "q": 0.5, "a": 2.0, "b": 3.0}
    found = [
        {"distribution": kind, **{part: numbers[part] for part in has}}
        for kind, has in SPREADS.items()
        if has.keys() <= numbers.keys() and kind != "int_uniform"
    ]
    return [
        *found,
        {"min": 2, "max": 5},
        {"min": 0, "max": 9.5},
        {"distribution": "q_normal", "q": 2},
        {"distribution": "beta"},
        {"distribution": "q_uniform", "min": 2, "max": 40, "q": 3},
    ]


@pytest.mark.parametrize("spread", kinds(), ids=str)
def test_random_draws_are_of_wandbs_distributions(spread, tmp_path, sweeps):
    from scipy.stats import ks_2samp
    from sweeps.params import HyperParameter

    path = write(tmp_path, yaml.safe_dump({"method": "random", "parameters": {"p": spread}}))
    found = [trial["p"] for trial in trials_of(read_sweep(path), count=1000)]
    assert (
        not sweeps.schema_violations_from_proposed_config({"method": "random", "parameters": {"p": spread}})
        or "log_uniform" in spread["distribution"]
    )
    theirs = HyperParameter("p", spread).ppf((np.arange(1000) + 0.5) / 1000)
    assert ks_2samp(found, theirs).pvalue > 1e-3
    assert isinstance(found[0], int) == isinstance(np.asarray(theirs)[0], np.integer)


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
        ("method: grid\nruncap: 3\nparameters: {a: {value: 1}}", "runcap is no key of a sweep. Did you mean run_cap"),
        ("method: grid\nparameters: {a: 3}", "parameters.a = 3: write `value: 3`"),
        ("method: grid\nparameters: {a: {values: []}}", r"values = \[\]: a list of at least one"),
        ("method: grid\nparameters: {a: {min: 0.5, max: 1.0}}", "a grid needs values, not uniform"),
        ("method: grid\nparameters: {a: {values: [1], q: 2}}", "categorical has no q, but values"),
        ("method: grid\nparameters: {a: {parameters: 3}}", "parameters.a has `parameters`: give it some"),
        ("method: grid\nparameters: {a.b: {value: 1}, a: {parameters: {b: {value: 2}}}}", "a.b is there twice"),
        ("method: grid\nparameters: {a: {distribution: int_uniform, min: 0.5, max: 2}}", "0.5 is no whole number"),
        ("method: random\nparameters: {a: {min: 1e-4, max: 1.0}}", "min = '1e-4' is no number .write 1.0e-4"),
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


EVIDENCE = sorted((Path(__file__).parents[2] / "scripts" / "evidence").glob("*.yaml"))


@pytest.mark.parametrize(
    ("path", "recipe"),
    [
        *((path, recipe) for path in SHIPPED for recipe in ("digits", "llamagen-l")),
        *((path, "mnist") for path in EVIDENCE),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_shipped_sweeps_fit_recipes_and_are_for_wandb_too(path, recipe):
    for values in trials_of(read_sweep(path)):
        load_recipe(recipe, overrides_of(values))
    raw = yaml.safe_load(path.read_text())
    assert raw["command"][-1] == "${args_no_hyphens}" and raw["metric"]["name"].startswith("val/bits_w")


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
