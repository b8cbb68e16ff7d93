"""Spoilt recipes: one message that names them, or all within its range; never a traceback, nor a hang.

`ZIPAR_FUZZ=5000 pytest tests/recipe/test_fuzz.py` tries thousands of each kind.
"""

import contextlib

import lightning as L
import pytest
import yaml
from commands import TINY
from fuzzing import JUNK, ODD, VALUES, Odd, examples, in_time, spoilt_text, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from ranges import TRAINER
from verdicts import PLAIN, TEXTS, judged, planned, swept

from zipar_train.recipe.load import recipe_folder
from zipar_train.sweep.overrides import overrides_of_agent
from zipar_train.training.trainer import build_datamodule, build_module, build_trainer

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_files_made_to_be_slow_are_refused_at_once(file, text):
    file.write_text(text)
    swept(file, 3)
    file.write_text(UNTRAINED + text)
    assert judged(file) is None or text in ("", "#" * 10**5)


ACCEPTABLE = [st.tuples(st.just(name), st.sampled_from(good)) for name, (good, _) in TRAINER.items() if good]


@pytest.mark.slow
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
