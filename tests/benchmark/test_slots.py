"""Passes by their slots, and decoding with lookahead: the decoder's own passes, beside the floor that is said."""

import json
from statistics import mean, pstdev

import graphs
import pytest
import torch
from commands import sets
from small import TINY

from zipar_train import Grid, Plan
from zipar_train.benchmark import decode, slots
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import AHEAD, EAGER, OURS, PLAIN, STOCK
from zipar_train.benchmark.roofline import Rates, Work, middle
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import conditions
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")
BENCH = ("bench", "--recipe", "digits", *sets(TINY))
NOTE = "note: random weights: lookahead's passes are not those of a trained model; evaluate measures them"


@pytest.mark.parametrize(
    ("fed", "keys", "numbers", "operations"),
    [  # a prompt of 2 and 15 codes: 17 slots, 8 of them in the first half
        (1, 8, 120 + 4 * 5 * 8, 4 * (2 * 120 * 1 + 3 * 8)),
        (4, 8, 120 + 4 * 5 * 8, 4 * (2 * 120 * 4 + 3 * (5 + 6 + 7 + 8))),
        (8, 10, 120 + 4 * 5 * 10, 4 * (2 * 120 * 8 + 3 * sum(range(3, 11)))),
        (15, 17, 120 + 4 * 5 * 17, 4 * (2 * 120 * 15 + 3 * sum(range(3, 18)))),
    ],
)
def test_the_floor_of_a_pass_in_the_middle(fed, keys, numbers, operations):
    """Two images under guidance, elements of 2 bytes: weights and keys once, and the head for each slot."""
    work, plan = Work(body=100, head=20, attention=3, key=5), Plan.raster(Grid(4, 4), prompt=2)
    assert middle(plan, fed) == keys
    for rates in (Rates(copy=1000.0, matmul=1e9), Rates(copy=1e9, matmul=1000.0)):
        seconds = max(2 * numbers / rates.copy, operations / rates.matmul)
        assert work.middle_floor(plan, rates, slots=fed, rows=4, size=2) == pytest.approx(seconds)


@pytest.mark.slow
def test_slots_from_the_command_line(run, tmp_path, monkeypatch):
    """Passes of the decoder, all from the same slot on; of 64 slots, the fed ones end with the first half or later."""
    seen, real = [], Decoder._pass

    def spy(self, state, shape, sampling, *, keep):
        start = state.slot.tolist()
        result = real(self, state, shape, sampling, keep=keep)
        held = [int(layer.values.abs().sum((0, 1, 3)).count_nonzero()) for layer in state.cache.slot_layers]
        seen.append((start, shape, sampling.lookahead, held))
        return result

    monkeypatch.setattr(Decoder, "_pass", spy)
    status, out, err = run(
        *BENCH,
        *("--slots", "4,1,63,4", "--batch-sizes", "1,2", "--repeats", "2", "--dtype", "float32"),
        *("--json", tmp_path / "s.json", "--png", tmp_path / "s.png"),
    )
    assert status == 0, err
    report = json.loads((tmp_path / "s.json").read_text())
    work = Work.of(family := random_family(load_recipe("digits", TINY).model, [8, 8], seed=0, dtype=None, device="cpu"))
    assert (report["dtype"], report["guidance"], report["failures"]) == ("float32", 1.5, [])
    assert [(row["batch"], row["slots"], row["keys"]) for row in report["rows"]] == [
        (batch, fed, keys) for batch in (1, 2) for fed, keys in ((1, 32), (4, 32), (63, 64))
    ]
    for row in report["rows"]:
        fed, keys, rows = row["slots"], row["keys"], 2 * row["batch"]
        moved = 4 * (work.body + work.head + rows * work.key * keys) / 1e10
        pairs = work.attention * sum(range(keys - fed + 1, keys + 1))
        done = rows * (2 * (work.body + work.head) * fed + pairs) / 1e11
        (one,) = [other for other in report["rows"] if (other["batch"], other["slots"]) == (row["batch"], 1)]
        assert row["floor_ms"] == pytest.approx(1000 * max(moved, done))
        assert row["times_floor"] == pytest.approx(row["pass_ms"] / row["floor_ms"])
        assert row["against_one"] == pytest.approx(row["pass_ms"] / one["pass_ms"])
        assert (row["warm_ups"], row["rounds"]) == (1, 2)
    assert family.codebook_size * 16 == work.head
    for batch in (1, 2):
        passes = [(shape, set(start), held) for start, shape, _, held in seen if len(start) == batch]
        steady = [(shape.slots, shape.keys, *start) for shape, start, held in passes if held == [64]]
        for fed, keys in ((1, 32), (4, 32), (63, 64)):  # a warm-up and two rounds
            assert steady.count((fed, keys, keys - fed)) >= 3 * slots.PASSES
        assert len(passes) == 9 * slots.PASSES + 2  # the prompt's, and one that fills the rest
    assert {lookahead for _, _, lookahead, _ in seen} == {63}
    head, _, *table = out.split("\n")[:9]
    assert head.startswith("digits, random weights, float32, guidance 1.5; CPU")
    assert table[0].split() == ["slots", "batch", "ms/pass", "spread", "floor", "x", "floor", "x", "1", "slot"]
    assert [line.split()[:2] for line in table[1:]] == [[f, b] for b in "12" for f in ("1", "4", "63")]
    assert table[1].split()[-1] == "1.00"
    assert "a pass of next-token's plan in the middle of an image: it attends to half of the 64 slots" in out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_without_one_slot_there_is_no_ratio(run, tmp_path):
    status, out, err = run(*BENCH, "--slots", "2", "--repeats", "1", "--json", tmp_path / "s.json")
    assert status == 0, err
    assert json.loads((tmp_path / "s.json").read_text())["rows"][0]["against_one"] is None
    assert len(out.split("\n")[3].split()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "64"], "64 slots are more than an image of 8 x 8 has: use 1 .. 63"),
        (["--slots", "4,0"], "--slots: 0 must be at least 1"),
        (["--slots", "a"], "--slots 'a': write whole numbers"),
        (["--slots", ""], "--slots '': write whole numbers"),
        (["--slots", "4", "--train"], "--slots does not apply to --train"),
        (["--slots", "4", "--windows", "8"], "--windows does not apply to --slots"),
        (["--slots", "4", "--grids", "8"], "--grids does not apply to --slots"),
        (["--slots", "4", "--compiled"], "--compiled does not apply to --slots"),
        (["--slots", "4", "--no-baselines"], "--no-baselines does not apply to --slots"),
        (["--slots", "4", "--batch-sizes", "10000000000"], "10,000,000,000 images at once need"),
    ],
)
def test_mistakes_are_one_message(run, arguments, message):
    status, _, errors = run(*BENCH, *arguments)
    assert status == 2
    assert message in errors and "Traceback" not in errors


def test_numbers_that_fail_leave_the_rows_of_others(run, tmp_path, monkeypatch):
    """One that memory does not hold, and one for which it runs out."""
    real, check = Decoder._pass, memory.check_memory

    def scarce(self, state, shape, sampling, *, keep):
        if shape.slots == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return real(self, state, shape, sampling, keep=keep)

    def small(*args, lookahead, **how):
        if lookahead == 32:
            raise memory.BatchTooLarge("1 images at once need more")
        check(*args, lookahead=lookahead, **how)

    monkeypatch.setattr(Decoder, "_pass", scarce)
    monkeypatch.setattr(memory, "check_memory", small)
    status, out, _ = run(*BENCH, "--slots", "1,8,16,32", "--repeats", "1", "--json", tmp_path / "s.json")
    assert status == 1
    assert "not measured: pass of 32 slots, window 8, batch 1, 8x8: 1 images at once need more" in out
    assert "not measured: pass of 8 slots, window 8, batch 1, 8x8: OutOfMemoryError: CUDA out of memory" in out
    report = json.loads((tmp_path / "s.json").read_text())
    assert [row["slots"] for row in report["rows"]] == [1, 16]
    assert [failure["method"] for failure in report["failures"]] == ["pass of 32 slots", "pass of 8 slots"]


def test_no_pass_is_captured_in_a_counted_round(monkeypatch):
    graphs.install(monkeypatch)
    monkeypatch.setattr(Decoder.__init__, "__kwdefaults__", {"released": False, "capture": True})
    recorded = []
    report = slots.bench_slots(
        load_recipe("digits", TINY),
        slots=[1, 16],
        rounds=2,
        progress=False,
        save=lambda report: recorded.append(graphs.Graph.recorded),
    )
    assert recorded[0] == 2 and len(set(recorded)) == 1
    # all but the first of each number; 2 passes of 16 have filled the first half of the image
    assert graphs.Graph.replayed == (3 * slots.PASSES - 1) + (2 + 3 * slots.PASSES - 1)
    assert [row.warm_ups for row in report.rows] == [1, 1]


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
