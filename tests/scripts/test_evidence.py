"""docs/evidence.md and the scripts that make it."""

import json
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipar_train import Grid, Plan, load
from zipar_train.recipe.load import load_recipe

HERE = Path(__file__).parents[2]
SCRIPTS, PAGE = HERE / "scripts" / "evidence", HERE / "docs" / "evidence.md"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    return tables


def test_every_table_has_its_place_on_the_page_and_every_place_a_table():
    text = "".join(path.read_text() for path in SCRIPTS.glob("*.py"))
    written = set(re.findall(r'write\(\s*"([a-z-]+)",\s*OUT', text))
    written |= set(re.findall(r'compare\("([a-z-]+)"', text))
    assert len(written) >= 9
    assert set(re.findall(r"<!-- ([a-z-]+) -->\n(?:.*\n)*?<!-- /\1 -->", PAGE.read_text())) == written


def test_a_table_takes_the_place_of_the_one_before(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(tables, "provenance", lambda results: "2 cores of a CPU; torch 2; revision abc1234")
    page = tmp_path / "evidence.md"
    page.write_text("before\n<!-- mixes -->\n<!-- /mixes -->\nafter\n<!-- rates -->\nkept\n<!-- /rates -->\n")
    for value in ("1", "2"):
        tables.write("mixes", tmp_path / "out", tables.table(["a", "b"], [[value, "x"]]), "seed 0, 5 images")
    told = "| a | b |\n| --- | --- |\n| 2 | x |\n\n`scripts/evidence/run mixes`; seed 0, 5 images; "
    told += "2 cores of a CPU; torch 2; revision abc1234.\n"
    assert (
        page.read_text()
        == f"before\n<!-- mixes -->\n{told}<!-- /mixes -->\nafter\n<!-- rates -->\nkept\n<!-- /rates -->\n"
    )
    assert (tmp_path / "out" / "mixes.md").read_text() == told
    with pytest.raises(AssertionError, match="has no place for lora"):
        tables.write("lora", tmp_path / "out", ["x"], "")


def test_stand_ins_are_as_far_off_as_columns_and_rows_say(tables):
    """On pictures whose colour is their column, or their row."""
    import colours

    side, window = colours.SIDE, 6
    column, row = (
        np.broadcast_to(axis, (2, side * side, 1))
        for axis in np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=0).reshape(2, 1, -1, 1)
    )
    off = {
        rule: [
            colours.apart(picture, Plan.zipar(Grid(side, side), window=window, stand_in=rule))
            for picture in (column, row)
        ]
        for rule in ("completed", "released")
    }
    assert (
        off["completed"][0] == 0 and 2.5 < off["completed"][1] <= 3
    )  # four windows are a row; the first rows are near
    assert off["released"][1] == 1


def test_the_headline_takes_seeds_together(tables, tmp_path, monkeypatch):
    """From rows as `evaluate --json` writes them: 0.9 bits and a FD of 3 a seed later are 0.1 bits and 1 more."""
    import models
    import reporting

    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "evidence.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("headline", "released", "adaptive")))
    monkeypatch.setattr(tables, "DOCS", page.parent)
    for module in (tables, reporting):
        monkeypatch.setattr(module, "PICTURES", page.parent / "evidence")
    monkeypatch.setattr(models, "trained", lambda recipe, run, *overrides, **more: run)
    monkeypatch.setattr(reporting, "OUT", tmp_path)
    (tmp_path / "fresh-0").mkdir()
    (tmp_path / "fresh-0" / "samples.png").write_bytes(b"picture")

    def evaluated(name, checkpoint, *arguments):
        seed, rows = int(name[-1]), []
        base, planned = models.MNIST_14.base(seed).name, [14, 4, 2] if "control" in name else tables.WINDOWS
        for run in (base, checkpoint.name):
            narrow = tables.WINDOWS[1:]
            for mode, windows in (("planned", planned), ("released", narrow), ("adaptive", narrow)):
                if mode == "planned" or f"--{mode}" in arguments and (mode == "adaptive" or run == base):
                    rows += [
                        {
                            "checkpoint": run,
                            "mode": mode,
                            "window": window,
                            "passes": 10.5 + window,
                            "bits": 0.9 + 0.1 * seed if mode == "planned" else None,
                            **{score: {"mean": 3.0 + seed} for score in ("fid", "precision", "recall")},
                            "class_accuracy": {"mean": 0.25},
                        }
                        for window in windows
                    ]
        return rows

    monkeypatch.setattr(reporting, "evaluated", evaluated)
    reporting.headline()
    told = page.read_text()
    scores = " | 4.000 ± 1.000" * 3 + " | 25.0 ± 0.0 |"
    assert f"| untuned | 7 | 18 | 1.0000 ± 0.1000{scores}" in told
    assert f"| {tables.CONTROL} | 2 | 12 | 1.0000 ± 0.1000{scores}" in told
    assert f"| {tables.TUNED} | 1 | 12 | 1.0000 ± 0.1000{scores}" in told
    assert f"| untuned | 4 | 14{scores}" in told and f"| {tables.TUNED} | 7 | 17.5{scores}" in told
    assert told.count("\n| untuned |") == 6 + 5 + 5 and told.count(f"\n| {tables.CONTROL} |") == 3
    assert told.count("`scripts/evidence/run headline`; seeds 0, 1, 2, 10,000 fresh images") == 3
    assert (page.parent / "evidence" / "headline.png").read_bytes().startswith(b"\x89PNG")
    assert (page.parent / "evidence" / "samples.png").read_bytes() == b"picture"


def test_what_is_closed_is_of_the_bits_above_the_limit(tables):
    assert tables.closed(0.8, untuned=0.9, limit=0.7) == pytest.approx(0.5)
    assert tables.closed(0.7, untuned=0.7005, limit=0.7) is None  # nothing to speak of can be closed
    assert tables.pm([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and tables.pm([1.0], 1) == "1.0" and tables.pm([], 1) == "-"


def test_trials_have_names_of_their_own_and_recipes_that_exist(tables):
    """Each trial's overrides make a valid recipe, and its variant's arguments exist."""
    import inspect

    import tuning
    import variants

    names = [tables.slug(words) for words, _, _ in tuning.TRIALS]
    assert len(set(names)) == len(names) >= 20
    known = set(inspect.signature(variants.Variant).parameters)
    for words, variant, overrides in tuning.TRIALS:
        assert set(variant) <= known, words
        load_recipe("mnist", overrides)


def test_a_comparison_measures_trials_against_untuned_model_and_limits(tables, monkeypatch):
    import tuning

    written = []
    monkeypatch.setattr(tuning, "untuned_bits", lambda: {14: 0.75, 7: 0.76, 4: 0.78, 3: 0.8, 2: 0.85, 1: 1.0})
    monkeypatch.setattr(tuning, "limit", lambda dataset, window: {"curve": [0.9, 0.75], "bits": 0.7})
    monkeypatch.setattr(tuning, "trained", lambda *trial: {14: 0.753, 7: 0.751, 4: 0.753, 3: 0.76, 2: 0.77, 1: 1.0})
    monkeypatch.setattr(tuning, "write", lambda name, out, lines, words, results: written.extend([*lines, *results]))
    tuning.compare("tuning", [("a trial", {}, [])])
    assert written[2].startswith("| **untuned** | 0.7500 | 0.7600 | 0.7800")
    assert written[3].startswith("| **limit** |  | 0.7500 | 0.7500")
    assert written[4].endswith("| +0.40% | 90% | 90% | 80% | 80% | 0% |") and written[5:] == ["trial: a trial"]


def test_the_windows_table_has_limits_and_shares(tables, tmp_path, monkeypatch):
    import models
    import reporting

    bits = {"mnist-base": 0.9, "mnist": 0.75}

    def kind(run):
        return run.name.rstrip("-012")

    monkeypatch.setattr(models, "trained", lambda recipe, run, *overrides, **more: run)
    monkeypatch.setattr(reporting, "limit", lambda dataset, window: {"curve": [], "bits": 0.7})
    monkeypatch.setattr(
        reporting, "bits_on", lambda shards, run, windows: dict.fromkeys(windows, bits[run.name.rstrip("-012")])
    )
    written = []
    monkeypatch.setattr(reporting, "write", lambda name, out, lines, words: written.extend(lines))
    reporting.windows()
    three = "0.9000 ± 0.0000 | 0.7500 ± 0.0000 |"
    assert f"| 2 | {three} 0.7000 | 0.00 ± 0.00 | -16.67 ± 0.00 | 75 ± 0 |" in written
    assert f"| 6 | {three}  | 0.00 ± 0.00 | -16.67 ± 0.00 | - |" in written


def test_a_result_is_measured_once_and_kept_with_its_machine(tables, tmp_path, monkeypatch):
    import measured

    monkeypatch.setattr(measured, "FILE", tmp_path / "docs" / "measured.json")
    calls = []

    def measure():
        calls.append(1)
        measured.measured("another step's", lambda: {7: 0.5})
        return [len(calls)]

    assert measured.measured("a", measure) == measured.measured("a", measure) == [1] and len(calls) == 1
    kept = json.loads((tmp_path / "docs" / "measured.json").read_text())
    assert kept["another step's"]["value"] == {"7": 0.5} and set(kept) == {"a", "another step's"}
    assert " cores of " in kept["a"]["machine"] and kept["a"]["torch"] == version("torch").partition("+")[0]
    kept["a"] |= {"machine": "1 core", "revision": "abc"}
    (tmp_path / "docs" / "measured.json").write_text(json.dumps(kept))
    told = measured.provenance(["a", "another step's"])
    assert told.startswith("1 core, ") and " abc" in told and measured.provenance([]).count(" cores of ") == 1


def test_results_on_the_page_are_of_revisions_of_this_repository(tables):
    import measured

    for name, result in measured.results().items():
        assert set(result) == {"value", "machine", "torch", "revision", "date"}, name
        assert re.fullmatch(r"[0-9a-f]{7,12}", result["revision"]), f"{name}: measured with uncommitted changes"


def test_the_published_untuned_model_is_what_trials_start_from(tables, monkeypatch):
    import models

    monkeypatch.setattr(models, "trained", lambda recipe, run, *overrides, **more: run)
    published = PAGE.parent / "evidence" / "mnist-base-0"
    assert models.MNIST_14.base(0) == published and models.MNIST_14.base(1) == models.RUNS / "mnist-base-1"
    assert models.MNIST_14.base(0, "zipar.windows={2: 1}", name="scratch-2") == models.RUNS / "mnist-scratch-2-0"
    generator = load(published)
    assert generator.recipe.name == "mnist-base" and generator.generate([3], window=4, seed=0).passes.tolist() == [76]


def test_the_frontier_has_a_row_of_panels_for_each_dataset(tables, tmp_path):
    import frontier

    found = [
        {"model": model, "window": window, "mode": mode, "lookahead": ahead, "passes": 10.0 * window, "fid": 1 / window}
        | {"milliseconds": {"1": 5.0 * window, "32": 1.0 * window}}
        for model in (tables.UNTUNED, tables.TUNED)
        for mode, ahead in (("planned", 0), ("planned", 32), ("adaptive", 0))
        for window in (8, 4, 2, 1)
    ]
    assert [p["window"] for p in frontier.line(found, tables.TUNED, "planned", 32)] == [8, 4, 2, 1]
    for count in (1, 2):
        frontier.draw({f"data {at}": found for at in range(count)}, tmp_path / f"{count}.png")
    heights = [Image.open(tmp_path / f"{count}.png").height for count in (1, 2)]
    assert heights[1] > 1.5 * heights[0]


def test_steps_are_listed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["steps.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "steps.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0 and "headline" in printed.out and not printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heading"], "no step heading: use data, natural, headline"),
        (["data"], "data needs --images"),
        (["tuning"], "make them with `scripts/evidence/run data --images FOLDER`"),
    ],
)
def test_steps_say_what_they_need(monkeypatch, capsys, arguments, said):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["steps.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "steps.py"), run_name="__main__")
    assert ended.value.code == 2 and said in capsys.readouterr().err
