"""Plans that hypothesis draws."""

from hypothesis import strategies as st

from zipar_train import Grid, Plan

STAND_INS = ("nearest", "completed", "released")


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
