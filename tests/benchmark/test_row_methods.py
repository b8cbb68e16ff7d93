"""The methods of passes by their rows: each does the work of its rows, and is built and freed in its turn."""

import gc
import weakref
from collections import Counter

import graphs
import pytest
import torch
from small import TINY
from torch.utils.flop_counter import FlopCounterMode

from zipar_train import Plan
from zipar_train.benchmark import row_methods
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import EAGER
from zipar_train.benchmark.roofline import Work, middle
from zipar_train.benchmark.row_methods import METHODS, PASSES, MethodRun, Setting
from zipar_train.benchmark.rows import bench_rows
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import FusedLlama
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")
CAPTIONED = [  # of a shipped recipe whose rows end with a token, on a grid of 4 x 6
    *("model.size=null", "model.num_layers=2", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=24"),
    *("model.grid=[4,6]", "model.codebook_size=12", "zipar.windows={6: 1, 2: 1}", "evaluate.windows=[6, 2]"),
    *("model.token_prompt.tokens=9", "model.token_prompt.vocabulary=900", "data.micro_batch_size=2"),
]


def family_of(recipe, dtype=torch.float32):
    """The model of a benchmark of this recipe."""
    return random_family(recipe.model, recipe.model.grid, seed=recipe.seed, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["plain", "lookahead", EAGER])
@pytest.mark.parametrize(("guided", "fed"), [(False, 1), (True, 1), (True, 4), (True, 16)])
def test_a_pass_does_the_operations_of_its_rows(monkeypatch, name, guided, fed):
    """By torch's own counter: 2 for each row, and each weight of the layers and the head."""
    monkeypatch.setattr(row_methods, "PASSES", {"cpu": 1})
    recipe = load_recipe("digits", TINY)
    plan = Plan.raster(recipe.model.raster)
    run = MethodRun(METHODS[name], lambda: family_of(recipe), {guided: Setting(recipe, plan, 3, guided, 16)})
    run(fed, guided=guided)
    with FlopCounterMode(display=False) as counter:
        run(fed, guided=guided)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    family, rows = family_of(recipe), 3 * (1 + guided) * fed
    norms = sum(p.numel() for p in family.model.parameters() if p.ndim < 2)
    work = Work.of(family)
    assert counted["aten.mm"] == 2 * rows * (work.body - norms + work.head)
    # the released loop's attention is made of products: queries and weights, with the whole cache of 1 + 64
    assert counted.get("aten.bmm", 0) == (2 * rows * 65 * 16 * 2 if name == EAGER else 0)


@pytest.mark.parametrize("name", ["emu3-gen", "lumina-mgpt-7b-512"])
def test_the_passes_of_both_loops_generate_the_same_codes(monkeypatch, name):
    """From a cache without gaps, whose later tokens each pass inserts again, in float64."""
    monkeypatch.setattr(row_methods, "PASSES", {"cpu": 2})
    recipe = load_recipe(name, CAPTIONED)
    plan = Plan.raster(recipe.model.raster, prompt=recipe.model.prompt)
    setting = Setting(recipe, plan, 2, True, 8)

    def build():
        family = family_of(recipe, torch.float64)
        with torch.no_grad():
            for parameter in family.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(20)
        return family

    runs = {way: MethodRun(METHODS[way], build, {True: setting}) for way in ("plain", EAGER)}
    for fed in (8, 1, 5, 1):
        for run in runs.values():
            run(fed, guided=True)
        ours, theirs = runs["plain"].passes[True].decoder, runs[EAGER].passes[True].loop
        codes = torch.cat([theirs.generated[target] for target in range(24)], dim=1)
        assert torch.equal(ours.state.tokens[:, :24], codes)
        assert len(theirs.memory.held) == theirs.memory.cache.get_seq_length() == middle(plan, fed)
    assert len(codes.unique()) > 3


def test_another_method_is_one_more_entry(monkeypatch):
    """With a model, passes and a condition of its own."""
    prepared, ran = [], []

    def passes(family, setting):
        assert prepared == [family.model] and setting.most == 4
        return ran.append

    monkeypatch.setitem(METHODS, "another", row_methods.Method(passes, prepared.append, lambda asked: asked.baselines))
    how = {"rows": [2, 8], "rounds": 1, "progress": False}
    report = bench_rows(load_recipe("digits", TINY), **how)
    assert [row.method for row in report.rows] == ["plain", EAGER, "another"] * 2 and not report.failures
    assert Counter(ran) == {1: 2 * PASSES["cpu"], 4: 2 * PASSES["cpu"]}
    assert [row.method for row in bench_rows(load_recipe("digits", TINY), baselines=False, **how).rows] == ["plain"] * 2


def test_the_compiled_method_compiles_a_fused_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(row_methods, "compile_body", compiled.append)
    how = {"rows": [2, 4], "rounds": 1, "progress": False, "compiled": True}
    report = bench_rows(load_recipe("digits", TINY), **how)
    assert [row.method for row in report.rows] == ["plain", "compiled", EAGER] * 2
    assert len(compiled) == 1 and isinstance(compiled[0].base_model, FusedLlama)


@pytest.mark.parametrize("together", [True, False])
def test_methods_are_freed_when_their_turns_are_over(monkeypatch, together):
    """Where memory holds one at a time, they take turns in groups, and a note says so."""
    alive, most, left, build = weakref.WeakSet(), [], [], random_family

    def counted(*args, **how):
        gc.collect()
        alive.add(family := build(*args, **how))
        most.append(len(alive))
        return family

    monkeypatch.setattr("zipar_train.benchmark.rows.random_family", counted)
    recipe = load_recipe("digits", TINY)
    family, plan = family_of(recipe), Plan.raster(recipe.model.raster)
    weights = sum(p.nbytes for p in family.model.parameters())
    one = weights + memory.decode_bytes(family, plan, 1, rows=2, slots=len(plan), lookahead=4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(one * (2.3 if together else 1.3)))

    def save(report):  # after each round, and at the end of a group
        gc.collect()
        left.append(len(alive))

    report = bench_rows(recipe, rows=[2, 8], rounds=1, progress=False, save=save)
    assert left == ([2, 0] if together else [1, 0, 1, 0])
    assert most == ([1, 2] if together else [1, 1])
    assert len(report.rows) == 4 and not report.failures
    note = "batch 1: memory does not hold all methods at once. They took turns in 2 groups, one after the other: "
    assert [each for each in report.notes if "groups" in each] == ([] if together else [f"{note}plain; {EAGER}"])


def test_no_pass_is_captured_in_a_counted_round(monkeypatch):
    graphs.install(monkeypatch)
    monkeypatch.setattr(Decoder.__init__, "__kwdefaults__", {"released": False, "capture": True})
    recorded = []
    report = bench_rows(
        load_recipe("digits", TINY),
        rows=[2, 32],
        rounds=2,
        baselines=False,
        progress=False,
        save=lambda report: recorded.append(graphs.Graph.recorded),
    )
    assert recorded[0] == 2 and len(set(recorded)) == 1
    # all but the first of each number; 2 passes of 16 slots have filled the first half of the image
    assert graphs.Graph.replayed == (3 * PASSES["cpu"] - 1) + (2 + 3 * PASSES["cpu"] - 1)
    assert [row.warm_ups for row in report.rows] == [1, 1]
