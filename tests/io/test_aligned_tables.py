"""Tables of text, beside a definition with str.ljust and str.rjust."""

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipar_train.io.tables import aligned

ONE_COLUMN = st.characters(min_codepoint=33, max_codepoint=0x17F, exclude_categories=("C", "Z", "M"))
WORDS = st.lists(st.text(ONE_COLUMN, max_size=12), max_size=3).map(" ".join).map(str.strip)


def by_hand(rows: list[list[str]], align: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align.ljust(len(widths), align[-1])
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if sign == "<" else cell.rjust(width)
            for cell, width, sign in zip(row, widths, signs, strict=False)
        ]
        lines.append("  ".join(cells).rstrip(" "))
    return lines


@given(st.data())
def test_tables_are_those_of_ljust_and_rjust(data):
    columns = data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.lists(WORDS, min_size=columns, max_size=columns), min_size=1, max_size=6))
    align = data.draw(st.sampled_from([">", "<", "<>", ">><", "<><"]))
    assert aligned(rows, align) == by_hand(rows, align)


def test_a_table_by_hand():
    rows = [["drawn by", "window", "ms"], ["zipar-train, plain", "8", "1,234"], ["†", "16", ""]]
    assert aligned(rows, "<>") == [
        "drawn by            window     ms",
        "zipar-train, plain       8  1,234",
        "†                       16",
    ]
    assert aligned([["6", " 1.23% (5.00%)"], ["16", "12.34% (9.00%)"]], "><") == [
        " 6   1.23% (5.00%)",
        "16  12.34% (9.00%)",
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "[bold]tench[/bold]",
        "[/]",
        "[link=http://a.b]c",
        ":smile: and 'text', 12, None, http://a.b/c",
        "tench \\[Tinca tinca]",
        "1.234 ± 0.005 †",
        "word " * 2000 + "end",
        "x" * 20_000,
    ],
)
def test_cells_stand_as_they_are(cell):
    rows = [["class", "FD", "note"], [cell, "1.5", cell], ["b", "20", "c"]]
    for align in ("<>", ">", "<"):
        assert aligned(rows, align) == by_hand(rows, align)


def test_wide_characters_take_two_columns():
    """As terminals show them: the second column begins at the same place."""
    lines = aligned([["金魚", "1.50"], ["goldfish", "22.5"], ["サメ [鮫]", "3"]], "<>")
    assert [line.split()[0] for line in lines] == ["金魚", "goldfish", "サメ"]
    widths = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in lines]
    assert len(set(widths)) == 1 and lines[1] == "goldfish   22.5"


def test_tabs_become_spaces():
    assert aligned([["a", "b\tc"], ["d", "e"]]) == ["a  b       c", "d          e"]


def test_tables_without_rows_or_cells():
    assert aligned([]) == [] and aligned([[""], [""]]) == ["", ""]
    assert aligned([["a", "b"], ["", ""], ["c", "d"]]) == ["a  b", "", "c  d"]


def test_rows_have_the_same_number_of_cells():
    with pytest.raises(ValueError, match="shorter"):
        aligned([["a", "b"], ["c"]])


def test_the_terminal_makes_no_difference(monkeypatch):
    rows = [["trial", "minutes"], ["007", "1.3"]]
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "4", "TERM": "dumb", "JUPYTER_COLUMNS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert aligned(rows) == ["trial  minutes", "  007      1.3"]


def test_rich_is_imported_for_a_table_alone():
    code = "import sys, zipar_train.io.tables, zipar_train.cli.app; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
