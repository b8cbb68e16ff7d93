"""Passes by their rows from the command line: the rows and floors of the report, mistakes and failures."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from commands import sets
from small import TINY

from zipar_train import Grid, Plan
from zipar_train.benchmark.baselines import EagerLoop
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import EAGER
from zipar_train.benchmark.roofline import Rates, Work, middle
from zipar_train.benchmark.row_methods import METHODS, PASSES
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")
BENCH = ("bench", "--recipe", "digits", *sets(TINY))


def family_of(recipe, dtype=torch.float32):
    """The model of a benchmark of this recipe."""
    return random_family(recipe.model, recipe.model.grid, seed=recipe.seed, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("fed", "keys", "numbers", "operations"),
    [  # a prompt of 2 and 15 codes: 17 slots, 8 of them in the first half
        (1, 8, 4 * 5 * 8, 4 * (2 * 120 * 1 + 3 * 8)),
        (4, 8, 4 * 5 * 8, 4 * (2 * 120 * 4 + 3 * (5 + 6 + 7 + 8))),
        (8, 10, 4 * 5 * 10, 4 * (2 * 120 * 8 + 3 * sum(range(3, 11)))),
        (15, 17, 4 * 5 * 17, 4 * (2 * 120 * 15 + 3 * sum(range(3, 18)))),
    ],
)
def test_the_floor_of_a_pass_in_the_middle(fed, keys, numbers, operations):
    """Two images under guidance, elements of 2 bytes: weights and keys once, and the head for each slot."""
    work, plan = Work(body=100, head=20, attention=3, key=5), Plan.raster(Grid(4, 4), prompt=2)
    assert middle(plan, fed) == keys
    for rates in (Rates(copy=1000.0, matmul=1e9), Rates(copy=1e9, matmul=1000.0)):
        for int8, weights in ((False, 240), (True, 100 + 40)):  # the head's are not rounded
            seconds = max((weights + 2 * numbers) / rates.copy, operations / rates.matmul)
            floor = work.middle_floor(plan, rates, slots=fed, rows=4, size=2, int8=int8)
            assert floor == pytest.approx(seconds)
        integers = replace(rates, int8=4 * rates.matmul)
        operations_saved = 3 / 4 * 4 * 2 * 100 * fed  # the layers'; attention and the head have the dtype
        seconds = max((140 + 2 * numbers) / rates.copy, (operations - operations_saved) / rates.matmul)
        assert work.middle_floor(plan, integers, slots=fed, rows=4, size=2, int8=True) == pytest.approx(seconds)
        floor = work.middle_floor(plan, integers, slots=fed, rows=4, size=2)
        assert floor == work.middle_floor(plan, rates, slots=fed, rows=4, size=2)


@pytest.mark.slow
def test_rows_from_the_command_line(run, tmp_path, monkeypatch):
    """Passes of every method, all at one place; of 64 slots, the fed ones end with the first half or later."""
    seen, real, loop = [], Decoder._pass, EagerLoop.run_pass

    def spy(self, state, shape, sampling, *, keep):
        start = state.slot.tolist()
        result = real(self, state, shape, sampling, keep=keep)
        held = [int(layer.values.abs().sum((0, 1, 3)).count_nonzero()) for layer in state.cache.slot_layers]
        method = "lookahead" if sampling.lookahead else "plain"
        seen.append((method, start, len(state.prompt), shape.slots, shape.keys, sampling.guidance, held))
        return result

    def spy_loop(self, inputs):
        loop(self, inputs)
        held = [int(layer.values.abs().sum((0, 1, 3)).count_nonzero()) for layer in self.memory.cache.slot_layers]
        keys, images = inputs[-1] + 1, len(self.seeds)
        assert list(inputs) == list(range(inputs[0], keys))
        seen.append((EAGER, [inputs[0]] * images, len(self.prompt), len(inputs), keys, self.sampling.guidance, held))

    monkeypatch.setattr(Decoder, "_pass", spy)
    monkeypatch.setattr(EagerLoop, "run_pass", spy_loop)
    status, out, err = run(
        *BENCH,
        *("--rows", "8,1,2,126,8", "--batch-sizes", "1,2", "--repeats", "2", "--dtype", "float32"),
        *("--set", "sampling.lookahead=5", "--json", tmp_path / "r.json", "--png", tmp_path / "r.png"),
    )
    assert status == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    recipe = load_recipe("digits", TINY)
    work = Work.of(family := family_of(recipe))
    assert (report["dtype"], report["guidance"], report["failures"], report["passes"]) == ("float32", 1.5, [], 10)
    passes, methods = ((1, 1, 1, 32), (2, 2, 1, 32), (8, 2, 4, 32), (126, 2, 63, 64)), ("plain", "lookahead", EAGER)
    assert [
        tuple(row[name] for name in ("batch", "rows", "slots", "keys", "guided", "method")) for row in report["rows"]
    ] == [
        (batch, batch * rows, fed, keys, copies == 2, method)
        for batch in (1, 2)
        for rows, copies, fed, keys in passes
        for method in methods
    ]
    for row in report["rows"]:
        fed, keys, copies = row["slots"], row["keys"], (1 + row["guided"]) * row["batch"]
        assert row["rows"] == fed * copies
        pairs = work.attention * sum(range(keys - fed + 1, keys + 1))
        done = copies * (2 * (work.body + work.head) * fed + pairs) / 1e11
        for name, weight in (("floor_ms", 4), ("int8_floor_ms", 1)):
            moved = (weight * work.body + 4 * work.head + 4 * copies * work.key * keys) / 1e10
            assert row[name] == pytest.approx(1000 * max(moved, done))
        others = [each for each in report["rows"] if (each["batch"], each["method"]) == (row["batch"], row["method"])]
        assert row["times_floor"] == pytest.approx(row["pass_ms"] / row["floor_ms"])
        assert row["against_fewest"] == pytest.approx(row["pass_ms"] / others[0]["pass_ms"])
        assert (row["warm_ups"], row["rounds"]) == (1, 2)
    assert family.codebook_size * 16 == work.head
    for batch in (1, 2):
        for method in methods:
            mine = [each[1:] for each in seen if each[0] == method and len(each[1]) == batch]
            steady = Counter((*set(start), copies, fed, keys) for start, copies, fed, keys, *_ in mine)
            for _, copies, fed, keys in passes:  # a warm-up and two rounds
                place = (keys - fed, copies * batch, fed, keys)
                # once more: the one that fills the cache of guided passes, and the last of unguided ones
                assert steady[place] - 3 * PASSES["cpu"] == (1 if (copies, fed) in ((1, 1), (2, 63)) else 0), place
            assert {guidance for _, copies, *_, guidance, _ in mine if copies == batch} == {1.0}
            assert {guidance for _, copies, *_, guidance, _ in mine if copies == 2 * batch} == {1.5}
            # guided: the prompt's, one of 63 slots; unguided: the prompt's and 31 of one slot
            assert len(mine) == 4 * 3 * PASSES["cpu"] + (1 + 1) + (1 + 31)
            for start, copies, _, keys, _, held in mine:  # 63 slots at once fill the whole cache
                assert held == [64 if copies == 2 * batch and start[0] else max(keys, held[0])]
    head, _, *table = out.split("\n")[: 3 + 2 * 12]
    assert head.startswith("digits, random weights, float32, guidance 1.5; CPU")
    assert (
        " ".join(table[0].split()) == "rows slots images method ms/pass spread floor x floor int8 floor x fewest rows"
    )
    cells = [line.split() for line in table[1:]]
    assert cells[0][:5] == ["unguided", "1", "1", "1", "plain"] and cells[0][-1] == "1.00"
    assert cells[3][:4] == ["2", "1", "1", "plain"] and cells[14][:6] == ["unguided", "2", "1", "2", "eager", "loop,"]
    assert [line[:3] for line in cells[3:12:3]] == [["2", "1", "1"], ["8", "4", "1"], ["126", "63", "1"]]
    assert [line[:3] for line in cells[15::3]] == [["4", "1", "2"], ["16", "4", "2"], ["252", "63", "2"]]
    assert out.count("unguided") == 6 + 1  # the rows, and a note
    assert "a pass" not in table[0] and "it attends to half of the 64 slots" in out
    assert "note: eager loop, as released: these passes feed consecutive codes" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_without_guidance_rows_are_slots(run, tmp_path):
    options = ("--rows", "3,5", "--repeats", "1", "--no-baselines", "--set", "sampling.guidance=1")
    status, out, err = run(*BENCH, *options, "--json", tmp_path / "r.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["rows"], row["slots"], row["method"], row["guided"]) for row in rows] == [
        (3, 3, "plain", False),
        (5, 5, "plain", False),
    ]
    assert [row["against_fewest"] == 1 for row in rows] == [True, False]
    assert "unguided" not in out and "eager loop" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "2,3"], "3 rows are no guided pass, which has 2 for each slot: use an even number, 1 for"),
        (["--rows", "128"], "128 rows feed 64 slots, more than an image of 8 x 8 has: use 1 .. 126"),
        (["--rows", "64", "--set", "sampling.guidance=1"], "64 rows feed 64 slots, more than an image of 8 x 8 has"),
        (["--rows", "4,0"], "--rows: 0 must be at least 1"),
        (["--rows", "a"], "--rows 'a': write whole numbers"),
        (["--rows", ""], "--rows '': write whole numbers"),
        (["--rows", "4", "--train"], "--rows does not apply to --train"),
        (["--train", "--compiled"], "--compiled does not apply to --train"),
        (["--train", "--no-baselines"], "--no-baselines does not apply to --train"),
        (["--rows", "4", "--windows", "8"], "--windows does not apply to --rows"),
        (["--rows", "4", "--grids", "8"], "--grids does not apply to --rows"),
        (["--rows", "4", "--batch-sizes", "10000000000"], "10,000,000,000 images at once with 4 rows each need"),
        (["--slots", "4"], "No such option: --slots"),
    ],
)
def test_mistakes_are_one_message(run, arguments, message):
    status, _, errors = run(*BENCH, *arguments)
    assert status == 2
    assert message in errors and "Traceback" not in errors


def test_rows_that_fail_leave_those_of_others(run, tmp_path, monkeypatch):
    """One that memory does not hold, and one for which it runs out in one method."""
    real, needed = Decoder._pass, memory.decode_bytes

    def scarce(self, state, shape, sampling, *, keep):
        if shape.slots == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return real(self, state, shape, sampling, keep=keep)

    def large(*args, lookahead, **how):
        return 2**60 if lookahead == 32 else needed(*args, lookahead=lookahead, **how)

    monkeypatch.setattr(Decoder, "_pass", scarce)
    monkeypatch.setattr(memory, "decode_bytes", large)
    status, out, _ = run(*BENCH, "--rows", "2,16,32,64", "--repeats", "1", "--json", tmp_path / "r.json")
    assert status == 1
    for name in ("plain", EAGER):
        assert f"not measured: {name}, 64 rows, window 8, batch 1, 8x8: 1 images at once with 64 rows each need" in out
    assert "not measured: plain, 16 rows, window 8, batch 1, 8x8: OutOfMemoryError: CUDA out of memory" in out
    report = json.loads((tmp_path / "r.json").read_text())
    found = [(row["rows"], row["method"]) for row in report["rows"]]
    assert found == [(2, "plain"), (2, EAGER), (16, EAGER), (32, "plain"), (32, EAGER)]
    assert len(report["failures"]) == 3


def test_a_method_that_cannot_be_built_leaves_the_others(run, tmp_path, monkeypatch):
    """Its rows are failures, and the ratios of the others do not refer to it."""

    def broken(model):
        raise torch.OutOfMemoryError("no room for another model")

    monkeypatch.setitem(METHODS, "plain", METHODS["plain"]._replace(prepare=broken))
    status, out, _ = run(*BENCH, "--rows", "2,4", "--repeats", "1", "--json", tmp_path / "r.json")
    assert status == 1 and out.count("OutOfMemoryError: no room for another model") == 2
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["rows"], row["method"]) for row in rows] == [(2, EAGER), (4, EAGER)]
