"""The benchmark's own claims: what it measures against does what it says, and the floor is what it is said to be."""

import json
import mmap
import time

import numpy as np
import pytest
import torch
from commands import sets
from families import StockLlama, llamagen, llamagen_t2i
from small import TINY
from torch.utils.flop_counter import FlopCounterMode

from zipar_train import Grid, Plan
from zipar_train.benchmark.baselines import eager_loop
from zipar_train.benchmark.decode import bench_decode
from zipar_train.benchmark.results import CAUSAL, EAGER, OURS, PLAIN, SDPA, STOCK
from zipar_train.benchmark.roofline import Rates, Work, measure, seconds
from zipar_train.benchmark.stock import Stock
from zipar_train.benchmark.train import bench_train
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.memory import Peak
from zipar_train.decoding.sampling import code_seeds
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams


@pytest.mark.parametrize("window", [6, 4, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_eager_loop_draws_what_the_released_decoder_draws(window, guidance):
    family, sampling = llamagen(6, 6), SamplingParams(guidance=guidance, top_k=5)
    labels, numbers = [k % 3 for k in range(40)], code_seeds(list(range(40)), 36, seed=3)
    plan = Plan.zipar(family.grid, window=window, stand_in="released")
    theirs = eager_loop(family, labels, numbers, sampling, window=window)
    assert torch.equal(theirs, Decoder(family, plan, released=True)(labels, numbers, sampling))
    if window == 2:
        assert not torch.equal(theirs, Decoder(family, plan)(labels, numbers, sampling))


def test_the_eager_loop_hides_padding_too():
    family, sampling = llamagen_t2i(4, 5), SamplingParams(guidance=2.0)
    captions, numbers = family.check([torch.randn(n, 6) for n in (3, 1)]), code_seeds([0, 1], 20, seed=0)
    plan = Plan.zipar(family.grid, window=2, stand_in="released", prompt=3)
    drawn = eager_loop(family, captions, numbers, sampling, window=2)
    assert torch.equal(drawn, Decoder(family, plan, released=True)(captions, numbers, sampling))


def test_stock_generate_draws_every_code():
    family, sampling = llamagen(4, 5), SamplingParams(temperature=0)
    greedy = Decoder(family, Plan.raster(family.grid))([0, 1, 2], code_seeds([0, 1, 2], 20, seed=0), sampling)
    assert torch.equal(Stock(family)([0, 1, 2], sampling), greedy.flatten(1))
    assert Stock(family)([0, 1, 2], SamplingParams(guidance=2.0)).shape == (6, 20)


@pytest.mark.slow
@pytest.mark.parametrize("window", [6, 3, 1])
def test_operations_are_those_that_torch_counts(window):
    """Of all matrix products of a whole decode, by torch's own counter, which does not know attention on a CPU."""
    family = llamagen(6, 6, dtype=torch.float32)
    plan, work = Plan.zipar(family.grid, window=window), Work.of(family)
    with FlopCounterMode(display=False) as counter:
        Decoder(family, plan)([0, 1], code_seeds([0, 1], 36, seed=0), SamplingParams(guidance=2.0))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    norms = sum(p.numel() for p in family.model.model.parameters() if p.ndim < 2)
    # the head is computed for all slots of the image; stand-ins and replaced ends of rows predict no code
    products = 2 * (work.body - norms) * len(plan) + 2 * work.head * len(plan)
    assert sum(n for op, n in counted.items() if "attention" not in op) == 4 * products
    pairs = work.forward(plan) - 2 * (work.body * len(plan) + work.head * 36)
    assert pairs == 4 * 2 * 16 * int(plan.visible().sum())  # queries on keys, and weights on values; 2 layers, width 16


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("row_end", [False, True])
def test_the_floor_is_the_sum_over_passes(row_end, int8):
    grid = Grid(5, 6, row_end=row_end)
    plan, family = Plan.zipar(grid, window=3, prompt=2), StockLlama(grid, prompt=2)
    work, rates, rows, size = Work.of(family), Rates(copy=1000.0, matmul=6000.0, int8=9000.0), 4, 2
    assert work.body == sum(p.numel() for p in family.model.model.parameters()) - 12 * 16
    assert (work.head, work.key, work.attention) == (7 * 16, 2 * 2 * 16, 4 * 2 * 16)
    total, kinds = 0.0, set()
    for step in range(plan.passes):
        fed = [q for q in range(len(plan)) if plan.step[q] == step]
        drawn = sum(plan.target[q] >= 0 for q in fed)
        pairs = sum(
            plan.step[k] <= step < plan.expires[k] and plan.position[k] <= plan.position[q]
            for q in fed
            for k in range(len(plan))
        )
        moved = size * (work.head + rows * work.key * sum(plan.step <= step)) / rates.copy
        moved += (1 if int8 else size) * work.body / rates.copy
        done = rows * (2 * work.head * drawn + work.attention * pairs) / rates.matmul
        done += rows * 2 * work.body * len(fed) / (rates.int8 if int8 else rates.matmul)
        kinds.add(moved > done)
        total += max(moved, done)
    assert kinds == {True, False}  # both bind somewhere
    assert np.isclose(work.floor(plan, rates, rows=rows, size=size, int8=int8), total)


@pytest.mark.slow
def test_rates_are_plausible():
    rates = measure(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.copy < 1e13
    assert 1e8 < rates.matmul < 1e15


@pytest.mark.slow
def test_work_is_timed_on_all_threads_and_once_a_number():
    """Timer's own default is one thread."""
    before, seen = torch.get_num_threads(), []

    def work():
        seen.append(torch.get_num_threads())
        time.sleep(0.2)

    torch.set_num_threads(2)
    try:
        taken = seconds(work, torch.device("cpu"), repeat=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(taken) == 2 and 0.2 <= min(taken) < 0.4 and set(seen) == {2}


def test_peak_sees_what_is_gone_again():
    with Peak(torch.device("cpu")) as peak:
        fresh = mmap.mmap(-1, 64 * 2**20)  # malloc might reuse what earlier tests have freed
        torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
        del fresh
    if peak.bytes is None:
        pytest.skip("this system keeps no high-water mark of memory")
    assert 60 * 2**20 < peak.bytes < 100 * 2**20
    with Peak(torch.device("cpu")) as peak:
        pass
    assert peak.bytes < 10 * 2**20


@pytest.mark.slow
def test_rows_of_the_report_hang_together():
    recipe = load_recipe("digits", TINY)
    report = bench_decode(recipe, windows=[8, 2, 99], batches=[1, 3], grids=[8, 4], rounds=2, progress=False)
    keys = [(row.method, row.grid[0], row.window, row.batch) for row in report.rows]
    assert len(set(keys)) == len(keys)
    ways = [(OURS, 8), (PLAIN, 8), (EAGER, 8), (STOCK, 8), (OURS, 2), (PLAIN, 2), (EAGER, 2)]
    assert keys[:7] == [(way, 8, window, 1) for way, window in ways]
    assert set(keys[7:]) == {(OURS, 8, 8, 3), (OURS, 8, 2, 3), (OURS, 4, 2, 1), (OURS, 4, 2, 3)}
    for row in report.rows:
        plan = Plan.zipar(Grid(*row.grid), window=row.window)
        assert row.passes == plan.passes
        assert np.isclose(row.pass_ms * row.passes, row.image_ms * row.batch)
        assert np.isclose(row.images_per_second * row.image_ms, 1000)
        assert np.isclose(row.pass_ms / row.floor_ms, row.times_floor)
        assert row.times_floor > 1
        assert row.code_match == (1.0 if row.method in (OURS, PLAIN) and (row.batch, row.grid[0]) == (1, 8) else None)


@pytest.mark.slow
def test_training_steps_hang_together():
    recipe = load_recipe("digits", TINY)
    report = bench_train(recipe, window=2, batches=[2], grids=[8, 4], rounds=2, progress=False, device="cpu")
    assert [(row.attention, row.grid[0], row.slots) for row in report.rows] == [
        (CAUSAL, 8, 64),
        (SDPA, 8, 70),
        (CAUSAL, 4, 16),
        (SDPA, 4, 18),
    ]
    assert report.choices() == {70: SDPA, 18: SDPA}
    for row in report.rows:
        assert 0 < row.utilisation < 1
        assert np.isclose(row.tokens_per_second * row.step_ms, 1000 * 2 * row.grid[0] ** 2)


@pytest.mark.slow
def test_bench_from_the_command_line(run, tmp_path):
    options = sets(TINY)
    status, out, _ = run(
        "bench",
        "--recipe",
        "digits",
        *options,
        "--windows",
        "8,2",
        "--repeats",
        "1",
        "--batch-sizes",
        "1,2",
        "--json",
        tmp_path / "b.json",
        "--png",
        tmp_path / "b.png",
    )
    assert status == 0
    assert "x floor" in out
    assert "as fast as eager loop, as released" in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert len(report["rows"]) == 9
    assert report["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = run(
        "bench",
        "--recipe",
        "digits",
        *options,
        "--train",
        "--batch-sizes",
        "2",
        "--repeats",
        "1",
        "--json",
        tmp_path / "t.json",
    )
    assert "70 slots: --set tune.attention=sdpa, the only one that trains on this device" in out
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "9"], "no window of [9] fits a grid of [[8, 8]]"),
        (["--windows", "0"], "--windows: 0 must be at least 1"),
        (["--grids", "8,-4"], "--grids: -4 must be at least 1"),
        (["--batch-sizes", "a"], "--batch-sizes 'a': write whole numbers"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown: use float32 or bfloat16"),
        (["--train", "--png", "x.png"], "--png does not apply to --train"),
        (["--train", "--windows", "9"], "window 9 does not fit a row of 8 tokens"),
        (["--batch-sizes", "10000000000"], "images at once need"),
    ],
)
def test_mistakes_are_one_message(run, arguments, message):
    status, _, errors = run("bench", "--recipe", "digits", *arguments)
    assert status == 2
    assert message in errors
