"""Decoding with lookahead in the benchmark of generation: the passes that its images took, beside the floor."""

import json
from statistics import mean, pstdev

import pytest
import torch
from commands import sets
from small import TINY

from zipar_train import Plan
from zipar_train.benchmark import decode
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import AHEAD, EAGER, OURS, PLAIN, STOCK
from zipar_train.benchmark.roofline import Rates, Work
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import conditions
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")
BENCH = ("bench", "--recipe", "digits", *sets(TINY))
NOTE = "note: random weights: lookahead's passes are not those of a trained model; evaluate measures them"


@pytest.mark.slow
def test_decoding_with_lookahead(run, tmp_path, monkeypatch):
    """Beside all others, which have none: the same codes, and the passes that its images took."""
    grouped, called, in_groups, generate = [], [], decode.in_groups, Decoder._generate

    def needs(each, room):
        grouped.append(each)
        return in_groups(each, room)

    def spy(self, condition, seeds, sampling, observe):
        called.append(sampling.lookahead)
        return generate(self, condition, seeds, sampling, observe)

    monkeypatch.setattr(decode, "in_groups", needs)
    monkeypatch.setattr(Decoder, "_generate", spy)
    options = ("--windows", "8,2", "--batch-sizes", "3,1", "--repeats", "1", "--set", "sampling.lookahead=16")
    status, out, err = run(*BENCH, *options, "--json", tmp_path / "b.json", "--png", tmp_path / "b.png")
    assert status == 0, err
    assert (called.count(16), called.count(0), len(called)) == (2 * 4, 2 * 6, 2 * 10)  # a warm-up and a round
    assert all(each[AHEAD, w] > each[OURS, w] for each in grouped for w in (8, 2)) and len(grouped) == 2
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    found = {(row["method"], row["window"], row["batch"]): row for row in rows}
    assert set(found) == {(way, w, 3) for way in (OURS, PLAIN, EAGER, AHEAD) for w in (8, 2)} | {
        (STOCK, 8, 3),
        *((way, w, 1) for way in (OURS, AHEAD) for w in (8, 2)),
    }
    recipe = load_recipe("digits", [*TINY, "sampling.lookahead=16"])
    family = random_family(recipe.model, [8, 8], seed=recipe.seed, dtype=torch.float32, device=torch.device("cpu"))
    work = Work.of(family)
    for (way, window, batch), row in found.items():
        plan = Plan.zipar(family.grid, window=window, **recipe.zipar.rule)
        taken = [plan.passes] * batch
        if way == AHEAD:
            decoder = Decoder(family, plan)
            decoder(conditions(recipe.model, batch), code_seeds(range(batch), 64, seed=recipe.seed), recipe.sampling)
            taken = decoder.passes(batch)
            assert max(taken) < plan.passes
            floor = work.middle_floor(plan, Rates(copy=1e10, matmul=1e11), slots=16, rows=2 * batch, size=4)
            assert row["floor_ms"] == pytest.approx(1000 * floor)
            assert row["passes_spread"] == pytest.approx(pstdev(taken))
            assert row["code_match"] == (1 if batch == 3 else None)
        else:
            assert row["passes_spread"] is None
        assert row["passes"] == pytest.approx(mean(taken))
        assert row["pass_ms"] * max(taken) == pytest.approx(row["image_ms"] * batch)
        assert row["times_floor"] == pytest.approx(row["pass_ms"] / row["floor_ms"])
        shown = f"{mean(taken):.1f}".removesuffix(".0")
        cells = [line.removeprefix(way).split() for line in out.split("\n") if line.startswith(f"{way}  ")]
        assert ["8x8", str(window), str(batch), shown] in [line[:4] for line in cells]
    spreads = [row["passes_spread"] for (way, _, batch), row in found.items() if way == AHEAD and batch == 3]
    assert max(spreads) > 0
    assert out.count(NOTE) == 1
    assert (tmp_path / "b.png").exists()


def test_a_recipe_without_lookahead_has_no_row_of_it(run):
    status, out, err = run(*BENCH, "--windows", "8", "--repeats", "1", "--no-baselines")
    assert status == 0, err
    assert AHEAD not in out and "random weights: lookahead" not in out
