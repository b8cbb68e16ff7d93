"""Spoilt recipes and sweeps: one message that names them, or all within its range; never a traceback, nor a hang.

`ZIPAR_FUZZ=5000 pytest tests/recipe/test_fuzz.py` tries thousands of each kind.
"""

import contextlib
import copy
import io
import json
import resource
import sys

import lightning as L
import pytest
import torch
import yaml
from commands import TINY
from fuzzing import JUNK, ODD, VALUES, Odd, examples, in_time, spoilt_text, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from ranges import RANGES, TRAINER, beyond

from zipar_train import cli
from zipar_train.io import safe_yaml as plain
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import dump, load_recipe, parse, recipe_folder, shipped
from zipar_train.recipe.schema import RecipeError
from zipar_train.sweep.distributions import MOST, SPREADS
from zipar_train.sweep.overrides import overrides_of, overrides_of_agent
from zipar_train.sweep.spec import read_sweep
from zipar_train.sweep.trials import trials_of
from zipar_train.training.trainer import build_datamodule, build_module, build_trainer

TEXTS = {name: (recipe_folder() / f"{name}.yaml").read_text() for name in shipped()}
PLAIN = {name: plain.parse(text, loader=plain.Recipes) for name, text in TEXTS.items()}
SWEEPS = [path.read_text() for path in sorted((recipe_folder() / "sweeps").glob("*.yaml"))]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Trainers set what holds for all of torch."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.backends.cudnn.benchmark = False


def judged(path, overrides=()):
    """The recipe if it is accepted, and everything that then must hold; None after one message."""
    with in_time():
        try:
            recipe = load_recipe(path, overrides)
        except RecipeError as error:
            message = str(error)
            assert path.name in message or "--set" in message
            assert message.strip() and len(message) < 60_000 and "Traceback" not in message
            return None
        again = parse(plain.parse(dump(recipe), loader=plain.Recipes), where="its dump")
    assert again == recipe
    assert beyond(recipe.model_dump()) == []
    json.dumps(recipe.model_dump(), allow_nan=False)
    with in_time():
        windows = {*recipe.zipar.windows, *recipe.evaluate.windows, *(recipe.data.val_windows or ())}
        for window in windows:
            Plan.zipar(recipe.model.raster, window=window, prompt=recipe.model.prompt, **recipe.zipar.rule)
    return recipe


def planned(path, *more):
    """`zipar-train plan`: its table, or one message."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = ["zipar-train", "plan", "--recipe", str(path), *more]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        in_time(),
    ):
        patch.setattr(sys, "argv", argv)
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    assert status in (0, 2), err.getvalue()
    assert (status == 0) == ("next-token passes" in out.getvalue() and not err.getvalue())
    assert "Traceback" not in err.getvalue()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "spoilt.yaml"


@examples(100)
@given(text=spoilt_text(list(TEXTS.values())))
def test_recipes_with_spoilt_lines(file, text):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    if judged(file):
        planned(file, "--no-memory")


@examples(100)
@given(data=st.binary(max_size=200), text=st.sampled_from(list(TEXTS.values())), where=st.floats(0, 1))
def test_recipes_with_foreign_bytes(file, data, text, where):
    whole = text.encode()
    at = int(where * len(whole))
    file.write_bytes(whole[:at] + data + whole[at + len(data) // 2 :])
    judged(file)


@examples(250)
@given(data=spoilt_values(list(PLAIN.values())))
def test_recipes_with_spoilt_values(file, data):
    file.write_bytes(yaml.dump(data, Dumper=Odd).encode("utf-8", "surrogatepass"))
    if judged(file):
        planned(file, "--no-memory")


SECTIONS = [(key, value) for raw in PLAIN.values() for key, value in raw.items() if isinstance(value, dict)]
PARTS = sorted({*(key for key, _ in SECTIONS), *(str(name) for _, section in SECTIONS for name in section)})
PATHS = st.lists(
    st.sampled_from([*PARTS, "0", "1", "-1", "24", "²", "١", "9" * 50, "", " ", "é", "[0]", "\ud800"]),
    min_size=1,
    max_size=4,
).map(".".join)
KNOWN = st.sampled_from(sorted({f"{key}.{name}" for key, section in SECTIONS for name in section}))
SAID = ODD.map(
    lambda value: yaml.dump(value, Dumper=Odd, default_flow_style=True).removesuffix("...\n")
) | st.sampled_from(JUNK)


@examples(250)
@given(
    name=st.sampled_from(list(TEXTS)),
    overrides=st.lists(st.tuples(KNOWN | PATHS, SAID).map("=".join) | st.sampled_from(JUNK), min_size=1, max_size=3),
)
def test_overrides(name, overrides):
    judged(recipe_folder() / f"{name}.yaml", overrides)


PRINTED = st.one_of(
    ODD.map(lambda value: "9" * 5000 if isinstance(value, int) and value > 10**1000 else str(value)),
    st.sampled_from(["1j", "...", "{1, 2}", "b'x'", "[1j]", "{'b': {1: 2j}}", "-" * 5000 + "1", "{'²': 1}", "1e999"]),
)


@examples(60)
@given(argument=st.tuples(KNOWN | PATHS, PRINTED | SAID).map("=".join) | st.sampled_from(JUNK))
def test_agents_arguments(argument):
    with in_time():
        try:
            overrides = overrides_of_agent([argument])
        except ValueError:
            return
    judged(recipe_folder() / "digits.yaml", overrides)


UNTRAINED = yaml.safe_dump({key: value for key, value in PLAIN["digits"].items() if key != "trainer"})
BOMBS = {
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)),
    "merged laughs": "a: &a {k: 1}\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 9)}]}}\n" for i in range(20)),
    "itself": "name: &a [*a]",
    "itself as key": "? &a [*a]\n: 1",
    "deep": "a: " + "[" * 30_000,
    "deep blocks": "".join(" " * i + f"a{i}:\n" for i in range(600)),
    "long key": "k" * 200_000 + ": 1",
    "many keys": "".join(f"k{i}: 1\n" for i in range(8_000)),
    "many keys of the trainer": "  # \n".join(["trainer:", *(f"  k{i}: 1" for i in range(5_000))]),
    "comments": "#" * 10**5,
    "large": "#" * 10**6,
    "variables": "name: " + "${a:-" * 40_000,
    "long number": "seed: " + "9" * 100_000,
    "sixties": "seed: 1" + ":0" * 60_000,
    "empty tags": "seed: !!int ''",
    "keys that are no keys": "{[a]: 1, {b: 1}: 2}",
    "alias without anchor": "name: *a",
    "nothing": "",
    "zeros": "\0" * 100,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_files_made_to_be_slow_are_refused_at_once(file, text):
    file.write_text(text)
    swept(file, 3)
    file.write_text(UNTRAINED + text)
    assert judged(file) is None or text in ("", "#" * 10**5)


ACCEPTABLE = [st.tuples(st.just(name), st.sampled_from(good)) for name, (good, _) in TRAINER.items() if good]


@examples(60, share=0.2)
@given(
    arguments=st.lists(st.one_of(ACCEPTABLE) | st.tuples(st.sampled_from(sorted(TRAINER)), VALUES), max_size=4),
    ema=st.sampled_from(["null", "0.9"]),
)
def test_trainers_are_built_or_refused_in_one_message(file, tmp_path, arguments, ema):
    raw = {**PLAIN["digits-base"], "trainer": {"accelerator": "cpu", **dict(arguments)}}
    file.write_bytes(yaml.dump(raw, Dumper=Odd).encode("utf-8", "surrogatepass"))
    recipe = judged(file, [f"run_dir={tmp_path}/run", f"optim.ema_decay={ema}"])
    if recipe is None:
        return
    with in_time():
        try:
            assert isinstance(build_trainer(recipe), L.Trainer)
        except ValueError as error:
            assert any(words in str(error) for words in ("trainer: Lightning refuses", "optim.global_batch_size = "))  # noqa: PT017


@examples(40, share=0.1)
@given(data=spoilt_values([{key: PLAIN["digits-base"][key] for key in ("model", "zipar", "data", "tune", "optim")}]))
def test_what_is_accepted_and_small_can_be_made(file, tmp_path, data):
    file.write_bytes(yaml.dump({**PLAIN["digits-base"], **data}, Dumper=Odd).encode("utf-8", "surrogatepass"))
    recipe = judged(file, [override for override in TINY if not override.startswith("model.")])
    if recipe is None:
        return
    with in_time(), pytest.raises((ValueError, OSError)):
        build_datamodule(recipe)  # there are no shards
    model = recipe.model
    if (
        model.size is None
        and (model.num_layers or 0) * (model.hidden_size or 0) ** 2 + model.codebook_size * (model.hidden_size or 0)
        < 10**6
    ):
        with in_time(), contextlib.suppress(ValueError, OSError):
            build_module(recipe)


def widths(draw_from):
    """A number within a range: an end, or anything between."""
    low, high = draw_from.low, draw_from.high
    between = st.integers(low, high) if draw_from.whole else st.floats(low, high)
    return (st.sampled_from(draw_from.inside()) | between).filter(lambda value: value in draw_from)


NUMBERS = [
    st.tuples(st.just(path.replace("*", "0").replace("windows.0", "windows.8")), widths(found))
    for path, found in RANGES.items()
    if "#" not in path
]
CHOICES = {
    "tune.activation_checkpointing": [True, False],
    "tune.attention": ["sdpa", "flex_attention"],
    "zipar.stand_in": ["nearest", "latest", "above", "completed", "released"],
    "zipar.seen": ["until_replaced", "by_itself"],
    "zipar.first_row": ["complete", "overlapping"],
    "trainer.precision": ["32", "16", "bf16", "16-true", "bf16-true", "64-true", 64, None],
    "model.tokenizer": [None, "palette", "vq16"],
    "evaluate.dtype": ["float32", "bfloat16", None],
}
CHANGES = NUMBERS + [st.tuples(st.just(path), st.sampled_from(values)) for path, values in CHOICES.items()]
LESS = ["tune.compile=false", "tune.distill=0"]


def set_at(data, path, value):
    *sections, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in sections:
        inside = data.get(part) if isinstance(data, dict) else data[part] if part < len(data) else None
        if not isinstance(inside, dict | list):
            return
        data = inside
    if isinstance(data, dict) or last < len(data):
        data[last] = value


@examples(40)
@given(name=st.sampled_from(list(PLAIN)), numbers=st.lists(st.one_of(CHANGES), min_size=1, max_size=4))
def test_numbers_within_their_ranges_are_planned(file, name, numbers):
    data = copy.deepcopy(PLAIN[name])
    for path, value in numbers:
        set_at(data, path, value)
    file.write_text(yaml.dump(data, Dumper=Odd))
    if judged(file):
        planned(file, "--no-memory")


@examples(3, share=0.05)
@given(name=st.sampled_from(list(PLAIN)), numbers=st.lists(st.one_of(CHANGES), min_size=1, max_size=4))
def test_memory_of_numbers_within_their_ranges_is_told(file, name, numbers):
    data = copy.deepcopy(PLAIN[name])
    data["model"] |= {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "size": None}
    for path, value in numbers:
        set_at(data, path, value)
    file.write_text(yaml.dump(data, Dumper=Odd))
    recipe = judged(file, LESS)
    if recipe and (recipe.model.num_layers or 0) < 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        planned(file, *(part for override in LESS for part in ("--set", override)))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * 2**20, "it took more than 3 GiB"


SMALL = ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=null", "model.size=null"]


@examples(3, share=0.02)
@given(data=spoilt_values([PLAIN["digits-base"], PLAIN["llamagen-xl-t2i"], PLAIN["emu3-gen"], PLAIN["janus-pro-1b"]]))
def test_memory_is_told_for_whatever_is_accepted(file, data):
    file.write_bytes(yaml.dump(data, Dumper=Odd).encode("utf-8", "surrogatepass"))
    if judged(file, SMALL):
        planned(file, *(part for override in SMALL for part in ("--set", override)))


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def swept(path, count):
    with in_time():
        try:
            trials = trials_of(read_sweep(path), count=count)
        except ValueError as error:
            message = str(error)
            assert len(message) < 5000 and any(word in message for word in (path.name, "grid of", "--count"))
            return
        assert 1 <= len(trials) <= (count or MOST)
        for trial in trials[:3]:
            json.dumps(trial, allow_nan=False)
            with contextlib.suppress(RecipeError):
                load_recipe("digits", overrides_of(trial))


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


@examples(150)
@given(text=spoilt_text(SWEEPS), count=st.sampled_from([None, 3]))
def test_sweeps_with_spoilt_lines(file, text, count):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    swept(file, count)


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
        ("parameters: {a: {distribution: q_uniform, min: .nan, max: 1.0}}", "a: min = nan is no number"),
        ("parameters: {a: {min: 0.5, max: 2, distribution: int_uniform}}", "no whole number, which int_uniform needs"),
        (
            "method: random\nparameters: {a: {values: [1, 2], probabilities: [0.5, 0.6]}}",
            "probabilities = [0.5, 0.6]: one for each",
        ),
        ("method: random\nparameters: {a: {values: [1, 2], probabilities: [1]}}", "probabilities = [1]: one for each"),
        ("parameters: {a: {values: [2001-01-01]}}", "datetime.date(2001, 1, 1) is no text"),
        ("parameters: {a: {values: [.nan]}}", "nan is no text, no finite number"),
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
