"""Plans that hypothesis draws."""

from hypothesis import strategies as st

from zipar_train import Grid, Plan

STAND_INS = ("nearest", "completed", "released")


@st.composite
def grids(draw, height=5, width=5, kinds=("plain", "row ends", "preview")):
    """Grids of at most these sides: without anything, with row ends, or after a preview of at most 3 x 3 codes."""
    kind, sides = draw(st.sampled_from(kinds)), (draw(st.integers(1, height)), draw(st.integers(1, width)))
    preview = Grid(draw(st.integers(1, 3)), draw(st.integers(1, 3))) if kind == "preview" else None
    return Grid(*sides, row_end=kind == "row ends", preview=preview)


@st.composite
def windows(draw, grid):
    """A window of a grid, and of its preview, as arguments of `Plan.zipar`."""
    window = {"window": draw(st.integers(1, grid.row_length))}
    if grid.preview and draw(st.booleans()):
        window["preview_window"] = draw(st.integers(1, grid.preview.row_length))
    return window


@st.composite
def plans(
    draw,
    stand_ins=STAND_INS,
    row_ends=(False, True),
    first_rows=("complete", "overlapping"),
):
    grid = Grid(draw(st.integers(1, 9)), draw(st.integers(1, 9)), row_end=draw(st.sampled_from(row_ends)))
    return Plan.zipar(
        grid,
        window=draw(st.integers(1, grid.row_length)),
        stand_in=draw(st.sampled_from(stand_ins)),
        first_row=draw(st.sampled_from(first_rows)),
        prompt=draw(st.integers(1, 4)),
    )
