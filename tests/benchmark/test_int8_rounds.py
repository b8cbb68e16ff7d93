"""Int8 weights in both tables of `bench`: rows beside those of the dtype, with the floor and memory of their bytes."""

import json
from time import perf_counter

import pytest
import torch
from commands import sets
from small import TINY

from zipar_train import Grid, Plan
from zipar_train.benchmark import roofline
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import OURS, ROUNDED
from zipar_train.benchmark.roofline import Rates, Work, measure
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.int8 import int8_layers, to_int8
from zipar_train.recipe.load import load_recipe

RATES = Rates(copy=1e10, matmul=1e11)  # of the fixture
BENCH = ("bench", "--recipe", "digits", *sets(TINY), "--repeats", "1", "--dtype", "float32", "--int8")
ROUNDED_WEIGHTS = 16 * 3 * 16 + 16 * 16 + 2 * 32 * 16 + 16 * 32


def work_of(recipe):
    return Work.of(
        random_family(recipe.model, [8, 8], seed=0, dtype=torch.float32, device=torch.device("cpu")),
    )


@pytest.fixture
def rounded(monkeypatch):
    """Counts of int8 layers of the models that passes were made with."""
    seen, real = [], Decoder._pass

    def spy(self, *given, **how):
        seen.append(len(int8_layers(self.family.model)))
        return real(self, *given, **how)

    monkeypatch.setattr(Decoder, "_pass", spy)
    return seen


@pytest.mark.usefixtures("known_rates")
def test_passes_by_rows(run, tmp_path, rounded):
    status, out, err = run(
        *BENCH, "--rows", "2,8", "--no-baselines", "--json", tmp_path / "r.json", "--png", tmp_path / "r.png"
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["rows"], row["method"], row["int8"]) for row in rows] == [
        (2, "plain", False), (2, "int8", True), (8, "plain", False), (8, "int8", True)
    ]  # fmt: skip
    assert {*rounded} == {0, 4} and rounded.count(0) == rounded.count(4)
    recipe = load_recipe("digits", TINY)
    plan, work = Plan.raster(Grid(8, 8)), work_of(recipe)
    for row in rows:
        how = {"slots": row["slots"], "rows": 2, "size": 4}
        least, floor = (1000 * work.middle_floor(plan, RATES, **how, int8=int8) for int8 in (True, row["int8"]))
        assert (row["int8_floor_ms"], row["floor_ms"]) == pytest.approx((least, floor))
        assert row["times_floor"] == pytest.approx(row["pass_ms"] / row["floor_ms"])
    assert rows[0]["floor_ms"] > rows[1]["floor_ms"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("known_rates")
def test_whole_images(run, tmp_path, rounded):
    status, out, err = run(*BENCH, "--windows", "8,1", "--no-baselines", "--json", tmp_path / "r.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["method"], row["window"]) for row in rows] == [
        (OURS, 8), (ROUNDED, 8), (OURS, 1), (ROUNDED, 1)
    ]  # fmt: skip
    assert {*rounded} == {0, 4}
    recipe = load_recipe("digits", TINY)
    work, passes = work_of(recipe), {8: 64, 1: 22}
    for row in rows:
        plan = Plan.zipar(Grid(8, 8), window=row["window"], **recipe.zipar.rule)
        floor = work.floor(plan, RATES, rows=2, size=4, int8=row["method"] == ROUNDED)
        assert (row["passes"], row["floor_ms"]) == pytest.approx((passes[row["window"]], 1000 * floor / plan.passes))
        assert row["method"] in out


def test_memory_counts_bytes(monkeypatch):
    from zipar_train.benchmark.decoders import Decoders

    recipe = load_recipe("digits", TINY)
    family = random_family(recipe.model, [8, 8], seed=0, dtype=torch.bfloat16, device=torch.device("cpu"))
    whole = sum(p.nbytes for p in family.model.parameters())
    decoders = Decoders(family, recipe, baselines=False, compiled=False, int8=True)
    assert decoders.weights == {False: whole, True: whole - ROUNDED_WEIGHTS + 4 * (48 + 16 + 64 + 16)}


@pytest.mark.slow
def test_the_rate_of_integers_is_measured_on_a_cpu():
    """Beside a product timed here: some CPUs multiply integers faster than floats, others 30 times slower."""
    left, right = (to_int8(torch.randn(512, 512))[0] for _ in range(2))
    times = []
    for _ in range(7):
        start = perf_counter()
        torch._int_mm(left, right.t())
        times.append(perf_counter() - start)
    rate = 2 * 512**3 / min(times)
    found = measure(torch.device("cpu"), torch.float32).int8
    assert found is not None and rate / 8 < found < 8 * rate


@pytest.mark.parametrize(("speed", "rows"), [(1e9, 512), (4e9, 1024), (1e12, 2048)])
def test_a_slow_cpu_multiplies_small_matrices(monkeypatch, speed, rows):
    """2,048 rows of bfloat16 take a CPU that emulates it tens of seconds; the rate is the same at fewer."""
    multiplied = []

    def seconds(work, device, *, repeat=7):
        multiplied.append(work())
        return [2 * multiplied[-1] ** 3 / speed] * repeat

    monkeypatch.setattr(roofline, "seconds", seconds)
    assert roofline._rate(lambda size: lambda: size, torch.device("cpu")) == pytest.approx(speed)
    assert multiplied[-1] == max(multiplied) == rows
    assert roofline._rate(lambda size: lambda: size, torch.device("cuda")) == pytest.approx(speed)
    assert multiplied[-1] == 8192


def test_training_steps_have_no_int8(run):
    status, _, err = run("bench", "--recipe", "digits", *sets(TINY), "--train", "--int8")
    assert status != 0 and "--int8 does not apply to --train" in err
