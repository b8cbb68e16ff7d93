"""docs/evidence.md and the scripts that make it."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from zipar_train import Grid, Plan

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
    written |= set(re.findall(r'of_sweep\(\s*"([a-z-]+)"', text))
    assert len(written) >= 9
    assert set(re.findall(r"<!-- ([a-z-]+) -->\n(?:.*\n)*?<!-- /\1 -->", PAGE.read_text())) == written


def test_a_table_takes_the_place_of_the_one_before(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    page = tmp_path / "evidence.md"
    page.write_text("before\n<!-- mixes -->\n<!-- /mixes -->\nafter\n<!-- rates -->\nkept\n<!-- /rates -->\n")
    for value in ("1", "2"):
        tables.write("mixes", tmp_path / "out", tables.table(["a", "b"], [[value, "x"]]))
    told = "| a | b |\n| --- | --- |\n| 2 | x |\n"
    assert (
        page.read_text()
        == f"before\n<!-- mixes -->\n{told}<!-- /mixes -->\nafter\n<!-- rates -->\nkept\n<!-- /rates -->\n"
    )
    assert (tmp_path / "out" / "mixes.md").read_text() == told
    with pytest.raises(AssertionError, match="has no place for lora"):
        tables.write("lora", tmp_path / "out", ["x"])


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
    monkeypatch.setattr(models, "trained", lambda recipe, run, *overrides: run)
    monkeypatch.setattr(reporting, "OUT", tmp_path)
    (tmp_path / "test-0").mkdir()
    (tmp_path / "test-0" / "samples.png").write_bytes(b"picture")

    def evaluated(name, checkpoint, *arguments):
        seed, rows = int(name[-1]), []
        base, planned = models.base(seed).name, [14, 4, 2] if "control" in name else tables.WINDOWS
        for run in (base, checkpoint.name):
            for mode, windows in (("planned", planned), ("released", [7, 4, 2, 1]), ("adaptive", [7, 4, 2, 1])):
                if mode == "planned" or f"--{mode}" in arguments and (mode == "adaptive" or run == base):
                    rows += [
                        {
                            "checkpoint": run,
                            "mode": mode,
                            "window": window,
                            "passes": 10.5 + window,
                            "bits": 0.9 + 0.1 * seed if mode == "planned" else None,
                            "gap_closed": None if window > 2 or run == base or mode != "planned" else 0.5,
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
    assert f"| untuned | 7 | 18 | 1.0000 ± 0.1000 | -{scores}" in told
    assert f"| {tables.CONTROL} | 2 | 12 | 1.0000 ± 0.1000 | 50.0 ± 0.0{scores}" in told
    assert f"| {tables.TUNED} | 1 | 12 | 1.0000 ± 0.1000 | 50.0 ± 0.0{scores}" in told
    assert f"| untuned | 4 | 14{scores}" in told and f"| {tables.TUNED} | 7 | 17.5{scores}" in told
    assert told.count("\n| untuned |") == 13 and told.count(f"\n| {tables.CONTROL} |") == 3
    assert (page.parent / "evidence" / "headline.png").read_bytes().startswith(b"\x89PNG")
    assert (page.parent / "evidence" / "samples.png").read_bytes() == b"picture"


def test_the_gap_is_the_untuned_models(tables):
    untuned = {14: 1.0, 7: 1.004, 2: 1.2}
    assert tables.closed({14: 0.99, 7: 1.0, 2: 1.05}, untuned, 2) == "75%"
    assert tables.closed({14: 0.99, 7: 1.0, 2: 1.05}, untuned, 7) == "-"  # nothing to speak of is lost
    assert tables.pm([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and tables.pm([1.0], 1) == "1.0" and tables.pm([], 1) == "-"


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
        (["heading"], "no step heading: use data, headline"),
        (["data"], "data needs --images"),
        (["mixes"], "make them with `scripts/evidence/run data --images FOLDER`"),
    ],
)
def test_steps_say_what_they_need(monkeypatch, capsys, arguments, said):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["steps.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "steps.py"), run_name="__main__")
    assert ended.value.code == 2 and said in capsys.readouterr().err
