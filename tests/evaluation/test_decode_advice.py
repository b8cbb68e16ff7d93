"""Pairs of window and lookahead: their measurement through the command line, the choice, and the words."""

import json
from statistics import mean, stdev

import pytest
from commands import sets

from zipar_train.decoding import decoder as module
from zipar_train.decoding.generator import load
from zipar_train.evaluation import likelihood
from zipar_train.evaluation.decode_advice import DecodeAdvice, Pair, fastest, lines, sentence
from zipar_train.evaluation.likelihood import milliseconds
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit


@pytest.fixture
def advised(tiny, tmp_path, run):
    """Run `advise` on a model after one step; returns (status, stdout, stderr)."""
    fit(load_recipe("digits-base", [*tiny, "trainer.max_steps=1", "trainer.limit_val_batches=1"]))
    fixed = ["--recipe", "digits-base", *sets([*tiny, "evaluate.seeds=[7]"]), "--checkpoint", tmp_path / "run"]
    return lambda *arguments: run("advise", *fixed, "--images", "20", *arguments)


@pytest.mark.slow
def test_pairs_are_measured_and_the_fastest_is_named(advised, tmp_path, monkeypatch):
    """Passes against the generator's own of the same images; each pair keeps its cache from round to round."""
    states = []

    class State(module.DecodeState):
        def __init__(self, *args, **kwargs):
            states.append(kwargs["lookahead"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "DecodeState", State)
    given = ["--tolerance", "10", "--windows", "2", "--lookahead", "9,4", "--batch-size", "2"]
    status, out, err = advised(*given, "--json", "a.json")
    assert status == 0, err
    assert "passes and time" in err
    assert states == [0, 4, 9, 0, 4, 9]
    told = json.loads((tmp_path / "a.json").read_text())["decode"]
    pairs = told["pairs"]
    assert [(pair["window"], pair["lookahead"]) for pair in pairs] == [(8, 0), (8, 4), (8, 9), (2, 0), (2, 4), (2, 9)]
    assert told["batch_size"] == 2 and told["images"] in range(6, 19, 2)
    generator, labels = load(tmp_path / "run"), [k % 10 for k in range(2, 2 + told["images"])]
    for pair in pairs:
        how = {"window": pair["window"], "lookahead": pair["lookahead"]}
        passes = generator.generate(labels, seed=7, first=2, pixels=False, **how).passes.tolist()
        assert (pair["passes"], pair["passes_std"]) == pytest.approx((mean(passes), stdev(passes)))
        assert pair["share"] == pytest.approx(pair["milliseconds"] / pairs[0]["milliseconds"])
    assert pairs[2]["passes_std"] > 0
    best = min(pairs, key=lambda pair: pair["milliseconds"])
    assert told["fastest"] == best
    tables, smallest, last = out.rstrip().rsplit("\n", 2)
    assert f"{told['images']} generated images for each window within the tolerance" in tables
    assert smallest.startswith("Smallest window within 1000.00% of next-token's bits: 2 (28 passes")
    assert last == sentence(DecodeAdvice(**told), tolerance=10)


def test_numbers_out_of_range_are_named(tiny, run):
    for wrong, message in {
        ("--lookahead", "16,0"): "--lookahead 0 must be 1 .. 65536 slots",
        ("--lookahead", "65537"): "--lookahead 65537 must be 1 .. 65536 slots",
        ("--lookahead", "many"): "--lookahead 'many': write whole numbers",
        ("--batch-size", "0"): "--batch-size 0 must be 1 .. 65536 images",
        ("--batch-size", "65537"): "--batch-size 65537 must be 1 .. 65536 images",
    }.items():
        status, out, err = run("advise", "--recipe", "digits-base", *sets(tiny), "--checkpoint", "none", *wrong)
        assert status == 2 and not out and message in err and "Traceback" not in err


def pair(window: int, lookahead: int, passes: float, std: float, time: float) -> Pair:
    return Pair(
        window=window, lookahead=lookahead, passes=passes, passes_std=std, milliseconds=time, share=time / 101.4
    )


PLAIN, AHEAD = pair(8, 0, 64, 0, 101.4), pair(8, 32, 20.25, 3.04, 35.2)
WINDOW, BOTH = pair(4, 0, 40, 0, 72.1), pair(4, 32, 14.9, 2.08, 25.3)
QUICK = pair(4, 64, 1100.5, 2, 0.3512)


def test_the_fastest_pair_is_that_with_the_least_time():
    assert fastest([PLAIN, AHEAD, WINDOW, BOTH]) == BOTH
    assert fastest([PLAIN, AHEAD, WINDOW]) == AHEAD
    assert fastest([PLAIN, pair(4, 0, 40, 0, 101.4)]) == PLAIN  # the wider window if nothing is gained


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (BOTH, "window 4 with lookahead 32 (14.9 ± 2.1 passes, 25 ms per image"),
        (AHEAD, "next-token with lookahead 32 (20.2 ± 3.0 passes, 35 ms per image"),
        (WINDOW, "window 4 without lookahead (40 passes, 72 ms per image"),
        (QUICK, "window 4 with lookahead 64 (1,100.5 ± 2.0 passes, 0.35 ms per image"),
        (PLAIN, "next-token without lookahead (64 passes, 101 ms per image"),
    ],
)
def test_the_recommendation_in_words(best, words):
    advice = DecodeAdvice(batch_size=1, images=9, pairs=[PLAIN, best], fastest=best)
    compared = "" if best is PLAIN else "; next-token without lookahead: 64 passes, 101 ms"
    start = "Fastest within 1.00% of next-token's bits at batch size 1: "
    assert sentence(advice, tolerance=0.01) == f"{start}{words}{compared})."


def test_the_table_of_pairs():
    found = lines(DecodeAdvice(batch_size=1, images=9, pairs=[PLAIN, BOTH], fastest=BOTH))
    assert [line.split() for line in found] == [
        ["window", "lookahead", "passes", "ms/image", "of", "next-token's"],
        ["8", "none", "64", "101", "100%"],
        ["4", "32", "14.9", "±", "2.1", "25", "25%"],
    ]


def test_times_are_medians_over_rounds_of_different_images(monkeypatch):
    """Ways take turns and hear the round's number; the first round does not count; slow ones stop after three more."""
    now, calls = [0.0], []
    monkeypatch.setattr(likelihood, "perf_counter", lambda: now[0])

    def way(name, seconds):
        def work(turn):
            calls.append((turn, name))
            now[0] += seconds[turn]

        return work

    found = milliseconds({"a": way("a", [9, 1, 7, 2, 3, 4]), "b": way("b", [1, 1, 1, 1, 5, 5])}, rounds=5)
    assert calls == [(turn, name) for turn in range(6) for name in "ab"]
    assert found == {"a": 3000, "b": 1000}
    calls.clear()
    assert milliseconds({"a": way("a", [90, 10, 30, 20, 40])}, rounds=4, seconds=60) == {"a": 20_000}
    assert [turn for turn, _ in calls] == [0, 1, 2, 3]
