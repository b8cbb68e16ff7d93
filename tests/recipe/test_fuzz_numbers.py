"""Recipes of numbers within their ranges: each is planned and its memory told.

`ZIPAR_FUZZ=5000 pytest tests/recipe/test_fuzz_numbers.py` tries thousands of each kind.
"""

import copy
import resource

import pytest
import yaml
from commands import sets
from fuzzing import Odd, examples, spoilt_values
from hypothesis import given
from hypothesis import strategies as st
from ranges import RANGES
from verdicts import PLAIN, judged, planned

pytestmark = pytest.mark.usefixtures("as_before")


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
    "zipar.stand_in": ["nearest", "completed", "released"],
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


@pytest.mark.slow
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
        planned(file, *sets(LESS))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * 2**20, "it took more than 3 GiB"


SMALL = ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=null", "model.size=null"]


@examples(3, share=0.02)
@given(data=spoilt_values([PLAIN["digits-base"], PLAIN["llamagen-xl-t2i"], PLAIN["emu3-gen"], PLAIN["janus-pro-1b"]]))
def test_memory_is_told_for_whatever_is_accepted(file, data):
    file.write_bytes(yaml.dump(data, Dumper=Odd).encode("utf-8", "surrogatepass"))
    if judged(file, SMALL):
        planned(file, *sets(SMALL))
