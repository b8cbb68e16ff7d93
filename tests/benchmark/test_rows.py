"""Passes by their rows, and decoding with lookahead: each method's own passes, beside the floor that is said."""

import gc
import json
import weakref
from collections import Counter
from statistics import mean, pstdev

import graphs
import pytest
import torch
from commands import sets
from small import TINY
from torch.utils.flop_counter import FlopCounterMode

from zipar_train import Grid, Plan
from zipar_train.benchmark import decode, row_methods
from zipar_train.benchmark.baselines import EagerLoop
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import AHEAD, EAGER, OURS, PLAIN, STOCK
from zipar_train.benchmark.roofline import Rates, Work, middle
from zipar_train.benchmark.row_methods import METHODS, PASSES, MethodRun, Setting
from zipar_train.benchmark.rows import bench_rows
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import FusedLlama
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import conditions
from zipar_train.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("known_rates")
BENCH = ("bench", "--recipe", "digits", *sets(TINY))
NOTE = "note: random weights: lookahead's passes are not those of a trained model; evaluate measures them"
CAPTIONED = [  # of a shipped recipe whose rows end with a token, on a grid of 4 x 6
    *("model.size=null", "model.num_layers=2", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=24"),
    *("model.grid=[4,6]", "model.codebook_size=12", "zipar.windows={6: 1, 2: 1}", "evaluate.windows=[6, 2]"),
    *("model.token_prompt.tokens=9", "model.token_prompt.vocabulary=900", "data.micro_batch_size=2"),
]


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
        for weight_size, weights in ((None, 240), (2, 240), (1, 120)):
            seconds = max((weights + 2 * numbers) / rates.copy, operations / rates.matmul)
            floor = work.middle_floor(plan, rates, slots=fed, rows=4, size=2, weight_size=weight_size)
            assert floor == pytest.approx(seconds)


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
            moved = (weight * (work.body + work.head) + 4 * copies * work.key * keys) / 1e10
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
    alive, most, build = weakref.WeakSet(), [], random_family

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
    report = bench_rows(recipe, rows=[2, 8], rounds=1, progress=False)
    gc.collect()
    assert not alive and most == ([1, 2] if together else [1, 1])
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
