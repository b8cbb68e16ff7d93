"""Sweep files: the trials are W&B's own.

W&B's enumeration is the package `sweeps`, which its server runs. It asks for numpy below 2, though it works with numpy
2, so that pip refuses it beside ours; scripts/install adds it without that requirement. Where it is missing these tests
are skipped; tests/sweep/test_sweep_files.py holds enumerations by value.
"""

import json
import warnings

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_files import GRIDS, SHIPPED, agents, write

from zipar_train.recipe.load import load_recipe
from zipar_train.sweep.distributions import SPREADS
from zipar_train.sweep.overrides import overrides_of, overrides_of_agent
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of


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


def texts(trials: list[dict]) -> list[str]:
    return [json.dumps(trial, sort_keys=True) for trial in trials]  # 1 and 1.0 are two


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
