"""Spoilt sweeps: one message that names them, or trials; never a traceback, nor a hang.

`ZIPAR_FUZZ=5000 pytest tests/recipe/test_fuzz_sweeps.py` tries thousands of each kind.
"""

import pytest
import yaml
from fuzzing import ODD, VALUES, Odd, examples, in_time, spoilt_text, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from verdicts import swept

from zipar_train.recipe.load import recipe_folder
from zipar_train.sweep.distributions import SPREADS
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of

SWEEPS = [path.read_text() for path in sorted((recipe_folder() / "sweeps").glob("*.yaml"))]
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "distribution": st.sampled_from(list(SPREADS)) | ODD,
        "value": VALUES,
        "values": st.lists(VALUES, max_size=4) | ODD,
        "probabilities": st.lists(st.floats(0, 1)) | ODD,
        "min": st.integers() | st.floats() | ODD,
        "max": st.integers() | st.floats() | ODD,
        "q": st.floats(0, 1) | ODD,
        "mu": st.floats() | ODD,
        "sigma": st.floats() | ODD,
        "parameters": ODD,
    },
)
WHOLE_SWEEPS = st.fixed_dictionaries(
    {
        "parameters": st.dictionaries(
            st.sampled_from(["optim.lr", "seed", "zipar.windows", "a=b", "", "x.1"]), PARAMETERS
        )
    },
    optional={
        "method": st.sampled_from(["grid", "random", "bayes"]) | ODD,
        "metric": st.fixed_dictionaries({}, optional={"name": ODD, "goal": ODD}) | ODD,
        "run_cap": st.integers(1, 20) | ODD,
    },
)


@pytest.mark.slow
@examples(150)
@given(text=spoilt_text(SWEEPS), count=st.sampled_from([None, 3]))
def test_sweeps_with_spoilt_lines(file, text, count):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    swept(file, count)


@pytest.mark.slow
@examples(250)
@given(data=spoilt_values([*map(yaml.safe_load, SWEEPS)]) | WHOLE_SWEEPS, count=st.sampled_from([None, 3]))
def test_sweeps_with_spoilt_values(file, data, count):
    file.write_bytes(yaml.dump(data, Dumper=Odd).encode("utf-8", "surrogatepass"))
    swept(file, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "parameters: {a: {values: %s}, b: {values: %s}, c: {values: %s}, d: {values: %s}}",
            "a grid of 100000000 trials",
        ),
        ("parameters: {a: {min: 1, max: 1000000000000}}", "a: a grid of 1,000,000,000,000 values"),
        ("parameters: {a: {distribution: q_uniform, min: 0.0, max: 1.0, q: 0.0}}", "a: q = 0.0 must be above 0"),
        (
            "parameters: {a: {distribution: q_uniform, min: 0.0, max: 1.0, q: 1.0e-9}}",
            "a: a grid of 1,000,000,000 values",
        ),
        ("parameters: {a: {distribution: q_uniform, min: .nan, max: 1.0}}", "a: min = nan is not a number"),
        (
            "parameters: {a: {min: 0.5, max: 2, distribution: int_uniform}}",
            "not a whole number, which int_uniform needs",
        ),
        (
            "method: random\nparameters: {a: {values: [1, 2], probabilities: [0.5, 0.6]}}",
            "probabilities = [0.5, 0.6]: one for each",
        ),
        ("method: random\nparameters: {a: {values: [1, 2], probabilities: [1]}}", "probabilities = [1]: one for each"),
        ("parameters: {a: {values: [2001-01-01]}}", "datetime.date(2001, 1, 1) is neither text"),
        ("parameters: {a: {values: [.nan]}}", "nan is neither text, a finite number"),
        ("parameters: {a=b: {value: 1}}", "parameters.a=b: no path of a recipe's key"),
        ("parameters: {a.b: {value: 1}, a: {parameters: {b: {value: 2}}}}", "parameters.a.b is there twice"),
        ("parameters: {a: {parameters: 3}}", "parameters.a has `parameters`: give it some"),
        ("parameters: {a: {distribution: [1], value: 1}}", "distribution [1] is unknown"),
        ("parameters: {a: {value: 1}}\nrun_cap: 1000000000000000000000000", "run_cap = 1000000000000000000000000"),
        ("parameters: {a: {value: 1}}\nmetric: {name: [x]}", "metric = {'name': ['x']}"),
        ("method: random\nparameters: {a: {distribution: normal, mu: 1, sigma: -1}}", "a: sigma = -1 must be above 0"),
        (
            "method: random\nparameters: {a: {distribution: log_uniform, min: 1, max: 5000}}",
            "max = 5000: outside -300 .. 300",
        ),
    ],
)
def test_sweeps_that_have_no_end_or_no_sense(file, text, message):
    text = text if text.startswith("method") else f"method: grid\n{text}"
    file.write_text(text.replace("%s", str(list(range(100)))))
    with in_time(), pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        trials_of(read_sweep(file))
    assert message in str(error.value)


def test_the_first_trials_of_a_huge_grid_are_given(file):
    values = str(list(range(100)))
    file.write_text(
        f"method: grid\nparameters: {{a: {{values: {values}}}, b: {{values: {values}}}, c: {{values: {values}}}}}"
    )
    with in_time():
        assert trials_of(read_sweep(file), count=3) == [{"a": 0, "b": 0, "c": c} for c in range(3)]
    with pytest.raises(ValueError, match="--count 10001: more than 10,000 trials"):
        trials_of(read_sweep(file), count=10001)
