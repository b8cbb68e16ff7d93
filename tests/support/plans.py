"""Plans that hypothesis draws."""

from hypothesis import strategies as st

from zipar_train import Grid, Plan

STAND_INS = ("nearest", "latest", "above", "completed", "released")


@st.composite
def plans(
    draw,
    stand_ins=STAND_INS,
    row_ends=(False, True),
    seen=("until_replaced", "by_itself"),
    first_rows=("complete", "overlapping"),
    by_row=(False, True),
):
    grid = Grid(draw(st.integers(1, 9)), draw(st.integers(1, 9)), row_end=draw(st.sampled_from(row_ends)))
    window = st.integers(1, grid.row_length)
    if draw(st.sampled_from(by_row)):
        window = st.lists(window, min_size=grid.height - 1, max_size=grid.height - 1)
    return Plan.zipar(
        grid,
        window=draw(window),
        stand_in=draw(st.sampled_from(stand_ins)),
        seen=draw(st.sampled_from(seen)),
        first_row=draw(st.sampled_from(first_rows)),
        prompt=draw(st.integers(1, 4)),
    )
