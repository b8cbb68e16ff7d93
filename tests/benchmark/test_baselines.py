"""Other ways of drawing beside ours: they draw what they should, for every family, with nothing to download."""

import json

import pytest
import torch
from commands import sets
from families import StockLlama, llamagen
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig

from zipar_train import Grid, Plan
from zipar_train.benchmark.baselines import eager_loop
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import CAUSAL, EAGER, OURS, PLAIN, SDPA, STOCK
from zipar_train.benchmark.stock import Stock
from zipar_train.benchmark.turns import compilations
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import conditions
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams

pytestmark = pytest.mark.usefixtures("known_rates")


class PaddedLlama(StockLlama):
    """One whose prompts are padded at the left, differently when made unconditional."""

    def padding(self, condition):
        return torch.arange(self.prompt_length) < (condition % self.prompt_length)[:, None]


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_the_eager_loop_draws_what_the_released_decoder_draws_for_any_grid(data):
    """Row ends, longer prompts, padding, every window: in float64, to the code."""
    row_end = data.draw(st.booleans(), label="row end")
    grid = Grid(
        data.draw(st.integers(1, 4), label="rows"), data.draw(st.integers(2, 5), label="columns"), row_end=row_end
    )
    window = data.draw(st.integers(1, grid.row_length), label="window")
    prompt = data.draw(st.integers(1, 3), label="prompt")
    made = data.draw(st.sampled_from([StockLlama, PaddedLlama]), label="family")
    family = made(grid, prompt=prompt, seed=data.draw(st.integers(0, 3), label="seed"))
    sampling = SamplingParams(guidance=data.draw(st.sampled_from([1.0, 2.5]), label="guidance"), top_k=5)
    numbers = code_seeds([0, 1], grid.num_codes, seed=1)
    plan = Plan.zipar(grid, window=window, stand_in="released", prompt=prompt)
    drawn = eager_loop(family, [0, 2], numbers, sampling, window=window)
    assert torch.equal(drawn, Decoder(family, plan, released=True)([0, 2], numbers, sampling))


def tiny(name: str, *more: str):
    """Overrides that make a shipped recipe of captions tiny, on a grid of 4 x 6."""
    shape = [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.hidden_size=16",
        "model.ffn_size=24",
        "model.grid=[4,6]",
        "model.codebook_size=12",
        "zipar.windows={6: 1, 2: 1}",
        "evaluate.windows=[6, 2]",
        "data.micro_batch_size=2",
        *more,
    ]
    if name == "llamagen-xl-t2i":
        return [*shape, "model.t5_features.tokens=4", "model.t5_features.features=6"]
    preview = ["model.preview=[2,3]"] if name == "glm-image" else []
    return [*shape, *preview, "model.token_prompt.tokens=9", "model.token_prompt.vocabulary=900"]


CAPTIONED = ["lumina-mgpt-7b-512", "emu3-gen", "janus-pro-1b", "simplear-0.5b-1024", "llamagen-xl-t2i"]
GLM_IMAGE = "glm-image"  # without `generate`: transformers has it only for the larger model


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CAPTIONED, GLM_IMAGE])
def test_bench_of_captioned_recipes_from_the_command_line(run, tmp_path, name):
    """With all baselines, and nothing to download: the tokenizer of text is not there either."""
    options = sets(tiny(name))
    full = 7 if name in CAPTIONED[:2] else 6
    status, out, err = run(
        "bench", "--recipe", name, *options, "--windows", f"{full},2", "--repeats", "1", "--json", tmp_path / "b.json"
    )
    assert status == 0, err + out
    rows = {(row["method"], row["window"]): row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    stock = {(STOCK, full)} if name != GLM_IMAGE else set()
    assert set(rows) == {(way, w) for way in (OURS, PLAIN, EAGER) for w in (full, 2)} | stock
    assert rows[OURS, full]["passes"] == (24 if stock else 24 + 6)
    if stock:
        assert rows[STOCK, full]["passes"] == (27 if full == 7 else 24)  # a pass for each row end between rows
    assert ("generate is left out: it needs the larger model" in out) is not bool(stock)
    assert rows[OURS, 2]["code_match"] == 1
    assert ("takes a pass for each row end too, 27 an image" in out) == (full == 7)
    status, out, err = run(
        "bench", "--train", "--recipe", name, *options, "--repeats", "1", "--json", tmp_path / "t.json"
    )
    assert status == 0, err + out
    report = json.loads((tmp_path / "t.json").read_text())
    assert [(row["attention"], row["window"]) for row in report["rows"]] == [(CAUSAL, full), (SDPA, 2)]
    assert "without the teacher of tune.distill = 0.8" in out


@pytest.mark.parametrize("name", CAPTIONED)
def test_stock_generate_draws_the_next_token_codes(name):
    """Greedily, from padded prompts, in float64: those of our decoder, row ends forced between rows."""
    recipe = load_recipe(name, tiny(name))
    family = random_family(
        recipe.model, recipe.model.grid, seed=recipe.seed, dtype=torch.float64, device=torch.device("cpu")
    )
    with torch.no_grad():
        for parameter in family.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    condition = family.check(conditions(recipe.model, 3))
    padding = torch.arange(family.prompt_length) < torch.tensor([[0], [1], [2]])
    condition = condition._replace(padding=padding)
    sampling = SamplingParams(temperature=0)
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    own = family.model.get_input_embeddings()
    greedy = Decoder(family, plan)(condition, code_seeds([0, 1, 2], 24, seed=0), sampling)
    assert len(greedy.unique()) > 3
    assert torch.equal(Stock(family)(condition, sampling), greedy.flatten(1))
    assert Stock(family)(condition, SamplingParams(guidance=2.0)).shape == (6, 24)
    assert family.model.get_input_embeddings() is own


@pytest.mark.slow
def test_generate_compiles_in_its_first_call_alone():
    """As on CUDA, where it compiles by itself; here by the backend that leaves operators as they are."""
    family, sampling = llamagen(4, 5), SamplingParams(temperature=0)
    stock = Stock(family)
    plain = stock([0, 1], sampling)
    family.model.generation_config.compile_config = CompileConfig(backend="eager", mode=None)
    family.model.generation_config.compile_config._compile_all_devices = True
    torch.compiler.reset()
    counts = [compilations()]
    for _ in range(3):
        assert torch.equal(stock([0, 1], sampling), plain)
        counts.append(compilations())
    torch.compiler.reset()
    assert counts[1] > counts[0]
    assert counts[1] == counts[2] == counts[3]
